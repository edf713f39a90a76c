"""Training a segmentation network with a non-local block, and looking at its attention.

The command line of :mod:`dnl_ext.cli` is built from this package; it needs the extra ``dnl_ext[cli]``. One idea per
file: `mosaic` and `context` (built-in data), `layouts` and `folders` (your own data), `network`, `metrics`,
`checkpoint`, `trainer`, `progress`, `memory`; `distributed` and `sync_norm` (several processes); `attention`, `figure`,
`demo` and `report` (the demonstration); `restore`, `overlay`, `maps` and `diagnose` (looking at a checkpoint);
`recipes`, `ablation` and `ablation_report`.
"""

"""Training a segmentation network with a non-local block: data, network, trainer, metrics, attention picture.

The command line of :mod:`dnl_ext.cli` is built from this package; it needs the extra ``dnl_ext[cli]``. One idea per
file: `mosaic` (built-in data), `layouts` and `folders` (your own data), `network`, `metrics`, `checkpoint`, `trainer`,
`progress`, `memory`, `attention`, `figure`, `demo` and `report`.
"""

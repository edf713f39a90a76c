"""A model of one multiprocessor: what a compiled kernel costs, without a GPU (docs/gpu-model.md)."""

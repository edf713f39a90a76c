"""Other routes for tests that call the operators on CPU tensors: while `route(name)` is entered, the operators compute

- ``cpu``: as they do;
- ``emulated``: by the CUDA route (glue, drivers, kernels) in the emulator of tests/emulator, on CPU memory;
- ``cuda``: on the GPU, tensors moved there and back with their strides.

Nothing else of a test changes: autograd, layouts and errors are those of the route.
"""

import contextlib
import functools
import hashlib
import pathlib
import warnings

import torch

import dnl_ext

ROOT = pathlib.Path(__file__).parents[1]
OPERATORS = (
    *("mean_subtract", "softmax", "softmax_backward", "unary_forward", "unary_backward"),
    *("pairwise_forward", "pairwise_backward"),
)
HAS_GPU = torch.cuda.is_available() and dnl_ext._C.build_info()["cuda"]

NAME = "dnl_cuda_emulated"
FLAGS = (
    *("-O2", "-march=native", "-ffp-contract=fast"),  # fused multiply-adds, as nvcc makes them
    *("-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"),
)


def onto(x, device):
    """`x` on another device, with its strides, its offset and everything its storage holds."""
    if x.device == torch.device(device):
        return x
    length = x.untyped_storage().nbytes() // x.element_size()
    return x.as_strided((length,), (1,), 0).to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def build_emulated():
    """The library of the emulated operators, built once for the sources it is made of."""
    from torch.utils import cpp_extension

    main = ROOT / "tests/cpp/cuda_emulated.cpp"
    files = [main, *(p for folder in ("csrc", "tests/emulator") for p in (ROOT / folder).rglob("*") if p.is_file())]
    key = hashlib.sha256(repr((torch.__version__, FLAGS)).encode())
    for path in sorted(files):
        key.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode())
        key.update(path.read_bytes())
    folder = ROOT / "build" / f"emulated-{key.hexdigest()[:16]}"
    library = folder / f"{NAME}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        cpp_extension.load(
            NAME,
            [str(main)],
            extra_include_paths=[str(ROOT / "csrc"), str(ROOT / "tests/emulator")],
            extra_cflags=list(FLAGS),
            build_directory=str(folder),
            is_python_module=False,
        )
    return library


@functools.cache
def emulated_library():
    """Builds and loads it; torch.ops.dnl_cuda_emulated then has every operator."""
    path = build_emulated()
    library = torch.library.Library(NAME, "DEF")
    for name in OPERATORS:
        schema = str(getattr(torch.ops.dnl_ext, name).default._schema)
        library.define(schema.removeprefix("dnl_ext::"))
    torch.ops.load_library(path)
    return library


def emulated(name, *arguments):
    """An operator in the emulator. Torch fills its results with NaN first, so that one which nobody wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return getattr(torch.ops.dnl_cuda_emulated, name)(*arguments)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def on_gpu(name, *arguments):
    """An operator of CPU tensors, on the GPU."""
    moved = [onto(x, "cuda:0") if isinstance(x, torch.Tensor) else x for x in arguments]
    result = getattr(torch.ops.dnl_ext, name)(*moved)
    return onto(result, "cpu") if isinstance(result, torch.Tensor) else tuple(onto(x, "cpu") for x in result)


@contextlib.contextmanager
def route(name):
    if name == "cpu":
        yield
        return
    if name == "emulated":
        emulated_library()
    function = {"emulated": emulated, "cuda": on_gpu}[name]
    with torch.library._scoped_library("dnl_ext", "IMPL") as override:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for op in OPERATORS:
                override.impl(op, functools.partial(function, op), "CPU", allow_override=True)
        yield

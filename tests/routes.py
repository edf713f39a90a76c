"""Other routes for tests that call the operators on CPU tensors: while `route(name)` is entered, the operators compute

- ``cpu``: as they do;
- ``emulated``: by the CUDA route (glue, drivers, kernels) in the emulator of tests/emulator, on CPU memory;
- any other, such as ``cuda``: on that device, tensors moved there and back with their strides.

Nothing else of a test changes: autograd, layouts and errors are those of the route.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import pathlib
import sysconfig
import types
import warnings

import builds
import torch

import dnl_ext

ROOT = pathlib.Path(__file__).parents[1]
OPERATORS = (
    *("mean_subtract", "whiten_forward", "whiten_backward"),
    *("softmax", "softmax_backward", "unary_forward", "unary_backward"),
    *("pairwise_forward", "pairwise_backward", "pairwise_part_forward", "pairwise_part_backward"),
)
HAS_GPU = torch.cuda.is_available() and dnl_ext._C.build_info()["cuda"]

OPERATORS_LIBRARY = str(pathlib.Path(dnl_ext.__file__).parent / "libdnl_ext.so")
NAME = "dnl_cuda_emulated"
TURNS = ("ascending", "descending", "random")
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


def build_library(name, main, folders=(), flags=(), links=()):
    """The library `name` of the file `main`, which includes files of `folders`, built once for what it is made of."""
    from torch.utils import cpp_extension

    files = [ROOT / main, *(p for folder in folders for p in (ROOT / folder).rglob("*") if p.is_file())]
    key = hashlib.sha256(repr((torch.__version__, flags)).encode())
    for path in sorted(files):
        key.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode())
        key.update(path.read_bytes())
    folder = ROOT / "build" / f"{name.removeprefix('dnl_cuda_')}-{key.hexdigest()[:16]}"
    library = folder / f"{name}.so"

    def make():
        # torch runs ninja, which lies beside this Python.
        os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
        cpp_extension.load(
            name,
            [str(ROOT / main)],
            extra_include_paths=[str(ROOT / included) for included in folders],
            extra_cflags=list(flags),
            extra_ldflags=list(links),
            build_directory=str(folder),
            is_python_module=False,
        )

    return builds.once(library, make)


def load_other_device():
    """From now on torch has a device `elsewhere`, which dnl_ext has no kernels for: tests/cpp/other_device.cpp.

    It lasts as long as the process.
    """
    path = build_library("other_device", "tests/cpp/other_device.cpp", flags=("-O0",))
    torch.ops.load_library(path)
    torch.utils.rename_privateuse1_backend("elsewhere")
    module = types.ModuleType("elsewhere")
    module.is_available = module.is_initialized = lambda: True
    module.device_count, module.current_device, module._lazy_init = lambda: 1, lambda: 0, lambda: None
    torch._register_device_module("elsewhere", module)


@functools.cache
def emulated_library():
    """Builds and loads it; torch.ops.dnl_cuda_emulated then has every operator. Returns what must stay alive.

    It asks libdnl_ext.so for torch's settings and for the path of a call, as the operators on a GPU do.
    """
    path = build_library(NAME, "tests/cpp/cuda_emulated.cpp", ("csrc", "tests/emulator"), FLAGS, (OPERATORS_LIBRARY,))
    library = torch.library.Library(NAME, "DEF")
    for name in OPERATORS:
        schema = str(getattr(torch.ops.dnl_ext, name).default._schema)
        library.define(schema.removeprefix("dnl_ext::"))
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path)), library


def configure(turns="ascending", seed=0, max_threads=1024):
    """Sets the emulator's options (tests/emulator/state.h)."""
    library, *_ = emulated_library()
    library.configure_emulator(TURNS.index(turns), ctypes.c_uint64(seed), ctypes.c_int64(max_threads))


class HostWork(ctypes.Structure):
    """What the emulated operators asked of torch: tensors that were allocated, calls of its dispatcher, views."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("allocations", "dispatcher_calls", "views"))


def take_host_work():
    """The HostWork since the last call of this."""
    library, *_ = emulated_library()
    work = HostWork()
    library.take_host_work(ctypes.byref(work))
    return work


def on_device(device, name, *arguments):
    """An operator of CPU tensors, on another device."""
    moved = [onto(x, device) if isinstance(x, torch.Tensor) else x for x in arguments]
    result = getattr(torch.ops.dnl_ext, name)(*moved)
    return onto(result, "cpu") if isinstance(result, torch.Tensor) else tuple(onto(x, "cpu") for x in result)


@contextlib.contextmanager
def route(name, seed=0):
    """`seed`: of the order in which emulated threads and blocks get their turns."""
    if name == "cpu":
        yield
        return
    if name == "emulated":
        configure("random", seed)
    with torch.library._scoped_library("dnl_ext", "IMPL") as override:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for op in OPERATORS:
                function = getattr(torch.ops.dnl_cuda_emulated, op).default if name == "emulated" else None
                override.impl(op, function or functools.partial(on_device, f"{name}:0", op), "CPU", allow_override=True)
        yield

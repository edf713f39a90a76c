"""What was built, what this machine has, and which path a given call takes and why. See :func:`show_config`."""

import os
import platform
from collections.abc import Sequence
from typing import Any

import torch

from . import _tuned
from ._load import _C, LEFT_OUT
from ._version import __version__
from .reference import check_whiten_name
from .types import Whitening

__all__ = ["Config", "show_config"]

#: Environment variables that change what runs or how fast; every other DNL_EXT_* that is set is shown too.
VARIABLES = (
    "DNL_EXT_KERNELS",
    "DNL_EXT_CPU_CAPABILITY",
    "DNL_EXT_CUDA_PATH",
    "DNL_EXT_TUNE",
    "DNL_EXT_TUNE_FILE",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OMP_PROC_BIND",
    "GOMP_CPU_AFFINITY",
    "CUDA_VISIBLE_DEVICES",
)
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SHORT = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
#: Whitening that the pairwise operator does itself.
IN_KERNEL = ("channel", "in_nostd", None)
INSTRUCTION_SETS = {
    "generic": "plain C++",
    "avx2": "AVX2",
    "avx512": "AVX-512",
    "avx512_bf16": "AVX-512",
    "avx512_amx": "AMX",
    "neon": "NEON",
    "neon_bf16": "NEON",
}


class Config(dict[str, Any]):
    """What :func:`.show_config` returns: a dict that prints as text. Its values are plain, so ``json.dumps`` takes it.

    Example:
        >>> import json
        >>> from dnl_ext import show_config
        >>> config = show_config()
        >>> str(config).startswith("versions")
        True
        >>> json.loads(json.dumps(config))["versions"]["dnl_ext"] == config["versions"]["dnl_ext"]
        True
    """

    def __str__(self) -> str:
        lines = []
        for title, section in self.items():
            lines.append(title)
            width = max((len(name) for name in section), default=0)
            lines += [f"  {name:<{width}}  {_text(name, value)}" for name, value in section.items()]
        return "\n".join(lines)

    __repr__ = __str__


def show_config(
    query: torch.Tensor | None = None,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    mask_logits: torch.Tensor | None = None,
    *,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    whiten: Whitening | None = "channel",
) -> Config:
    """Describe the build, the machine and, given tensors or a shape, the path that an attention call takes.

    Args:
        query: the query of a :func:`dnl_ext.disentangled_attention` call, or None. The tensors are looked at, not
            computed with; those of ``device="meta"`` will do.
        key: its key, needed with ``query``.
        value: its value, needed with ``query``.
        mask_logits: its logits of the unary term, or None.
        shape: in their place, (N, Dqk, Dv), or (batch, Nq, Nk, Dqk, Dv) where batch counts images times heads.
        dtype: with ``shape``: a torch.dtype or its name ("float32", "fp32", ...). Default float32.
        device: with ``shape``: a device as torch names it ("cpu", "cuda", "mps", "meta", ...). Default "cpu".
        whiten: as in the call.

    Returns:
        Config: ``print`` it, or read it as a dict with the sections "versions", "kernels", "cpu", "cuda", "environment"
        and, for a call, "call". Sizes are in bytes.

    Raises:
        ValueError: a shape, dtype or device that no call can have.

    Example:
        >>> from dnl_ext import show_config
        >>> call = show_config(shape=(4096, 256, 512), dtype="float32", device="cpu")["call"]
        >>> call["map_bytes"]  # what one attention map of 4096 x 4096 would take
        67108864
        >>> call["path"].startswith("tiled")
        True
    """
    config = Config(versions=_versions(), kernels=_kernels(), cpu=_cpu(), cuda=_cuda(), environment=_environment())
    if query is not None:
        if shape is not None or key is None or value is None:
            raise ValueError("show_config: expected query, key and value, or shape alone")
        config["call"] = _call_of_tensors(query, key, value, mask_logits, whiten)
    elif shape is not None:
        batch, queries, keys, width, channels = parse_sizes(shape)
        config["call"] = _call(
            batch, queries, keys, width, channels, parse_dtype(dtype), str(device or "cpu"), whiten, unary=True
        )
    return config


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """A torch.dtype from itself, its name ("float32", "torch.float32") or its short name ("fp32"); None is float32."""
    name = "float32" if dtype is None else str(dtype).removeprefix("torch.")
    name = SHORT.get(name, name)
    if name not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join([*DTYPES, *SHORT])}, got {dtype}")
    return DTYPES[name]


def _versions() -> dict[str, Any]:
    built = _C.build_info()
    try:
        from importlib.metadata import version

        own = version("dnl_ext")
    except ImportError:  # PackageNotFoundError: built in place, not installed
        own = __version__
    return {
        "dnl_ext": own,
        "torch": torch.__version__,
        "torch_built_with": built["torch"],
        "python": platform.python_version(),
        "compiler": built["compiler"],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def has_kernels(device: str) -> bool:
    """Whether tensors on devices of this type have kernels; others are computed as plain PyTorch."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key("dnl_ext::pairwise_forward", key)


def _kernels() -> dict[str, Any]:
    section: dict[str, Any] = {"devices_with": [device for device in ("cpu", "cuda") if has_kernels(device)]}
    if LEFT_OUT:
        section["left_out"] = LEFT_OUT
    return section | {"elsewhere": PLAIN}


def _cpu() -> dict[str, Any]:
    try:
        capability = _C.cpu_capability()
    except ValueError as error:  # DNL_EXT_CPU_CAPABILITY names one that cannot be had
        capability = f"error: {error}"
    return {
        "model": cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": capability,
        "capabilities": dict(_C.cpu_capabilities()),
        "amx": _C.amx_state(),
    }


def cpu_model() -> str:
    """The CPU's name with family and model numbers, or what `platform` knows."""
    found = {}
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                found.setdefault(name.strip(), value.strip())
    except OSError:
        return platform.processor() or platform.machine()
    if "model name" not in found:
        return platform.processor() or platform.machine()
    return f"{found['model name']} (family {found.get('cpu family', '?')}, model {found.get('model', '?')})"


def _cuda() -> dict[str, Any]:
    built = _C.build_info()
    archs = [arch for arch in built["cuda_archs"].replace(",", ";").replace(" ", ";").split(";") if arch]
    section = {"built": built["cuda"], "archs": archs, "torch_cuda": torch.version.cuda, "devices": []}
    if not built["cuda"]:
        section["left_out"] = built["cuda_left_out"]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            capability = torch.cuda.get_device_capability(index)
            name = torch.cuda.get_device_name(index)
            how = arch_cover(archs, capability) if built["cuda"] else None
            section["devices"].append({"name": name, "capability": "{}.{}".format(*capability), "code": how})
    if section["devices"] and built["cuda"]:
        section["measured"] = f"{len(_tuned.known().measured)} calls in {_tuned.file()}"
    return section


def arch_cover(archs: Sequence[str], capability: tuple[int, int]) -> str | None:
    """How a binary built for `archs` ("8.0", "9.0a", "9.0+PTX", ...) runs on a device: "8.0", "9.0+PTX (JIT)" or None.

    Machine code runs on its own major version from its minor version up; PTX on anything as new or newer; an "a"
    architecture on exactly its own.
    """
    major, minor = capability
    best = None
    for arch in archs:
        number = arch.removesuffix("+PTX")
        exact = number.endswith("a")
        own_major, own_minor = (int(part) for part in number.rstrip("af").split("."))
        if (own_major, own_minor) == (major, minor) or (not exact and own_major == major and own_minor <= minor):
            best = max(best or (0, 0, ""), (own_major, own_minor, number))
    if best:
        return best[2]
    ptx = [arch for arch in archs if arch.endswith("+PTX")]
    fits = [arch for arch in ptx if tuple(map(int, arch.removesuffix("+PTX").split("."))) <= (major, minor)]
    return f"{fits[-1]} (JIT)" if fits else None


def _environment() -> dict[str, str | None]:
    names = dict.fromkeys([*VARIABLES, *sorted(name for name in os.environ if name.startswith("DNL_EXT_"))])
    return {name: os.environ.get(name) for name in names}


def parse_sizes(shape: Sequence[int]) -> tuple[int, int, int, int, int]:
    """(batch, Nq, Nk, Dqk, Dv) from (N, Dqk, Dv) or from all five."""
    sizes = [int(size) for size in shape]
    if len(sizes) == 3:
        sizes = [1, sizes[0], *sizes]
    if len(sizes) != 5 or min(sizes) < 0 or min(sizes[2:4]) < 1:
        raise ValueError(f"shape: expected (N, Dqk, Dv) or (batch, Nq, Nk, Dqk, Dv), got {tuple(shape)}")
    batch, queries, keys, width, channels = sizes
    return batch, queries, keys, width, channels


def _call_of_tensors(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask_logits: torch.Tensor | None, whiten: str | None
) -> dict[str, Any]:
    batch = query.shape[:-2].numel()
    named = {"query": query, "key": key, "value": value}
    call = _call(
        batch, query.shape[-2], key.shape[-2], query.shape[-1], value.shape[-1],
        query.dtype, query.device.type, whiten, unary=mask_logits is not None,
        channel_first={f"{name}_channel_first": x.stride(-2) < x.stride(-1) for name, x in named.items()},
    )  # fmt: skip
    call["layout"] = {name: _layout(x) for name, x in named.items()}
    return call


def _layout(x: torch.Tensor) -> str:
    if x.stride(-1) == 1:
        return "rows (channels adjacent)"
    if x.stride(-2) == 1:
        return "channel-first (positions adjacent), read in place"
    return f"strides {x.stride(-2)}, {x.stride(-1)}, read in place"


def _call(
    batch: int,
    queries: int,
    keys: int,
    width: int,
    channels: int,
    dtype: torch.dtype,
    device: str,
    whiten: str | None,
    unary: bool,
    channel_first: dict[str, bool] | None = None,
) -> dict[str, Any]:
    name = str(dtype).removeprefix("torch.")
    parse_dtype(name)
    check_whiten_name(whiten)
    kind = _device_type(device)
    call = {
        "shape": {"batch": batch, "Nq": queries, "Nk": keys, "Dqk": width, "Dv": channels},
        "dtype": name,
        "device": device,
    }
    if kind == "meta":
        call |= {"path": "shapes only", "why": "meta tensors hold no values"}
    elif not has_kernels(kind):
        call |= _plain_path(name, kind)
    elif kind == "cpu":
        call |= _cpu_path(name)
        call |= _cpu_workspace(name, batch, queries, keys, width, channels, whiten, unary)
    else:
        call |= _cuda_path(name, (batch, queries, keys, width, channels), channel_first or {})
    if whiten not in IN_KERNEL:
        call["whiten"] = f"{whiten}, applied to query and key before the operator: two tensors of their sizes"
    call["map_bytes"] = batch * queries * keys * dtype.itemsize
    return call


def _device_type(device: str) -> str:
    try:
        return torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device: expected one that torch knows, got {device!r}") from error


PLAIN = "plain PyTorch: the map made and used in blocks of queries, memory linear in their number"


def _plain_path(dtype: str, device: str) -> dict[str, Any]:
    if device == "cuda":  # a build without CUDA, or for AMD, whose devices torch names so too
        cuda = _cuda()
        why = "the CUDA kernels are not registered" if cuda["built"] else f"built without CUDA: {cuda['left_out']}"
    else:
        why = f"there are no kernels for {device} tensors"
    sums = "float64" if dtype == "float64" else "float32"
    return {"path": PLAIN, "why": LEFT_OUT or why, "products": f"{sums} x {sums} into {sums}, by torch"}


def _cpu_path(dtype: str) -> dict[str, Any]:
    try:
        capability, products = _C.cpu_capability(), _C.pairwise_compute_type(dtype)
    except ValueError as error:
        return {"path": "none", "why": str(error)}
    kernels = INSTRUCTION_SETS.get(capability, capability)
    if products == "bfloat16":
        kernels += " BF16"
    elif capability == "avx512_amx":  # its tiles multiply bfloat16 alone
        kernels = INSTRUCTION_SETS["avx512_bf16"]
    supported = [name for name, has in _C.cpu_capabilities() if has]
    if os.environ.get("DNL_EXT_CPU_CAPABILITY"):
        why = f"DNL_EXT_CPU_CAPABILITY={capability} (this CPU's best is {supported[-1]})"
    else:
        why = f"{capability} is the best of what was built that this CPU has"
    sums = "float64" if dtype == "float64" else "float32"
    return {
        "path": f"tiled, {kernels} micro-kernels",
        "why": why,
        "products": f"{products} x {products} into {sums}",
        "threads": torch.get_num_threads(),
    }


def _cpu_workspace(
    dtype: str, batch: int, queries: int, keys: int, width: int, channels: int, whiten: str | None, unary: bool
) -> dict[str, int]:
    """Bytes the operator allocates once per call beyond inputs, outputs and gradients."""
    forward, backward = _C.pairwise_workspace(
        dtype, batch, queries, keys, width, channels, whiten in ("channel", "in_nostd"), unary, torch.get_num_threads()
    )
    return {"workspace_forward_bytes": forward, "workspace_backward_bytes": backward}


CHAIN = "GEMM chain: cuBLAS products over chunks of the map, own kernels between them"
FUSED = "fused: the map made and used on chip by mma.sync kernels"
HOPPER = "hopper: the map made on chip by wgmma kernels, fed by TMA"


def _cuda_path(dtype: str, sizes: Sequence[int], channel_first: dict[str, bool]) -> dict[str, Any]:
    cuda = _cuda()
    if not cuda["devices"]:
        return {"path": CHAIN, "why": f"built for {', '.join(cuda['archs'])}, but torch sees no GPU here"}
    index = torch.cuda.current_device()
    device = cuda["devices"][index]
    if device["code"] is None:
        return {"path": "none", "why": f"{device['name']} is {device['capability']}; built for {cuda['archs']}"}
    major, minor = torch.cuda.get_device_capability(index)
    count = torch.cuda.get_device_properties(index).multi_processor_count
    return {"code": f"{device['name']} runs {device['code']}"} | cuda_plan(
        dtype, sizes, channel_first, 10 * major + minor, count, _tuned.machine_of(index)
    )


def cuda_plan(
    dtype: str,
    sizes: Sequence[int],
    channel_first: dict[str, bool],
    capability: int,
    multiprocessors: int,
    machine: _tuned.Machine | None = None,
) -> dict[str, Any]:
    """The path of forward and backward on a GPU and why, as the operators choose it (ops/pairwise/pairwise_plan.h).

    Args:
        sizes: (batch, Nq, Nk, Dqk, Dv).
        channel_first: {"query_channel_first": bool, ...} for query, key and value; what is absent lies by rows.
        capability: 10 * major + minor.
        machine: whose measurements count; None for nobody's.
    """
    batch, queries, keys, width, channels = sizes
    query_first, key_first, value_first = (
        bool(channel_first.get(f"{name}_channel_first")) for name in ("query", "key", "value")
    )

    def plan(backward: bool) -> dict[str, Any]:
        layout = (query_first, key_first, value_first)
        call = _tuned.Call(dtype, backward, (batch, queries, keys, width, channels), layout)
        choice = None if machine is None else _tuned.choice(machine, capability, call)
        found = _C.cuda_plan(
            dtype, *sizes, **channel_first, backward=backward, capability=capability, multiprocessors=multiprocessors,
            advised=choice.path if choice else "",
        )  # fmt: skip
        return found | ({"why": choice.why} if choice and found["advised"] else {})

    try:
        forward, backward = plan(False), plan(True)
    except (NotImplementedError, ValueError) as error:
        return {"path": "none", "why": str(error)}
    paths = {"chain": CHAIN, "fused": FUSED, "hopper": HOPPER}
    tf32 = dtype == "float32" and _C.tf32_allowed()
    call = {
        "path": paths[forward["path"]],
        "why": forward["why"],
        "backward": paths[backward["path"]],
        "why_backward": backward["why"],
        "products": f"{'TF32' if tf32 else dtype} into {'float64' if dtype == 'float64' else 'float32'}",
    }
    if "fused_tile" in forward:
        queries, keys = forward["fused_tile"]
        call["fused_forward"] = (
            f"tiles of {queries} queries x {keys} keys, {forward['slices']} x {forward['slice_channels']} channels, "
            f"keys split {forward['splits']} ways, {_bytes(forward['shared_bytes'])} of shared memory"
        )
    return call


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _text(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return _bytes(value)
    if name == "capabilities":
        return ", ".join(f"{key} {'yes' if has else 'no'}" for key, has in value.items())
    if name == "devices":
        shown = (f"{d['name']} ({d['capability']}), code {d['code'] or 'none that fits'}" for d in value)
        return "; ".join(shown) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if value is None:
        return "not set" if name.isupper() else "none"
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)

"""Who computes it: dnl_ext and everything that a user would pick instead.

A method is a function from a case to a function of (query, key, value, mask_logits); it raises Unavailable where it
does not apply, and the reason is printed in place of a figure. What a peer needs to give the same result is part of its
time: the query is centred as a user would write it, `q - q.mean(-2, keepdim=True)` (the keys need none: it changes no
weight), and the unary term, where the case has one, is a softmax and a product.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F

from .case import Case, Inputs

#: A function of (query, key, value, mask_logits).
Attention: TypeAlias = Callable[..., torch.Tensor]
Build = TypeVar("Build", bound=Callable[[Case], Attention | list[Attention]])

#: Rows of a chunk of :func:`chunks`.
CHUNK_ROWS = 512
#: Width up to which SDPA has a fused kernel, and to which :func:`sdpa_slices` cuts the values.
FUSED_WIDTH = 256

#: Tiles that FlexAttention is given, one after the other, where its own do not fit.
FLEX_TILES = tuple(
    {f"BLOCK_{side}": size for side in ("M", "N", "M1", "N1", "M2", "N2")} | {"num_stages": 1} for size in (64, 32, 16)
)


class Unavailable(Exception):
    """The method does not apply to the case here; the message says why.

    Example:
        >>> from dnl_ext.benchmark import METHODS, Case, Unavailable
        >>> try:
        ...     METHODS["sdpa_slices"].build(Case(256, 256, 64, 64))
        ... except Unavailable as reason:
        ...     print(reason)
        Dv <= 256: the same as sdpa_contiguous
    """


@dataclass(frozen=True)
class Method:
    """One way to compute attention: this library's, or what a user would pick instead.

    Attributes:
        name: key in ``METHODS``.
        about: one line that says what it is.
        build: function of a :class:`Case` that returns a function of (query, key, value, mask_logits), or a list of
            them to be tried in turn; raises :class:`Unavailable`.
        devices: where it can run. default: where it runs without being asked for.
        maps: function of a case and its inputs that returns the number of N x N maps held at the peak, for leaving out
            what cannot fit.

    Example:
        >>> from dnl_ext.benchmark import METHODS
        >>> METHODS["eager"].devices
        ('cpu', 'cuda')
    """

    name: str
    about: str  # one line
    build: Callable[[Case], Attention | list[Attention]]  # a list is to be tried in turn
    devices: tuple[str, ...]  # where it can run
    default: tuple[str, ...]  # where it runs without being asked for
    maps: Callable[[Case, Inputs], int]  # case, inputs -> N x N maps held at the peak, for leaving out what cannot fit

    def functions(self, case: Case) -> list[Attention]:
        """What computes a case, to be tried in turn. Raises Unavailable where nothing does."""
        built = self.build(case)
        return built if isinstance(built, list) else [built]


METHODS: dict[str, Method] = {}


def method(
    about: str,
    devices: tuple[str, ...] = ("cpu", "cuda"),
    default: tuple[str, ...] | None = None,
    maps: Callable[[Case, Inputs], int] = lambda case, inputs: 0,
) -> Callable[[Build], Build]:
    def register(build):
        name = build.__name__
        METHODS[name] = Method(name, about, build, devices, devices if default is None else default, maps)
        return build

    return register


def centred(case: Case, query: torch.Tensor) -> torch.Tensor:
    return query - query.mean(-2, keepdim=True) if case.whiten else query


def with_unary(output: torch.Tensor, value: torch.Tensor, mask_logits: torch.Tensor | None) -> torch.Tensor:
    if mask_logits is None:
        return output
    return output + torch.softmax(mask_logits, -1).unsqueeze(-2) @ value


def eager_maps(case: Case, inputs: Inputs | None = None) -> int:
    """Maps that eager attention holds at its peak: S and P in the forward; P, dP and dS in the backward."""
    return 3 if case.training else 2


def sdpa_backend(case: Case, inputs: Inputs, contiguous: bool) -> str | None:
    """Name of the backend that SDPA takes for these inputs: "math" is the one that builds the N x N map."""
    if not hasattr(torch, "_fused_sdp_choice"):
        return None
    tensors = [x.detach() for x in inputs if x is not None][:3]
    if contiguous:
        tensors = [x.contiguous() for x in tensors]
    choice = torch._fused_sdp_choice(*[x.requires_grad_(case.training) for x in tensors], scale=case.scale)
    return {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}.get(int(choice), str(choice))


def sdpa_maps(contiguous: bool) -> Callable[[Case, Inputs], int]:
    def maps(case, inputs):
        if sdpa_backend(case, inputs, contiguous) not in ("math", None):
            return 0
        widened = 2 if case.torch_dtype.itemsize == 2 else 1  # it computes the map in float32
        return (4 if case.training else 3) * widened

    return maps


@method("this library")
def dnl_ext(case: Case) -> Attention:
    from dnl_ext.ops import disentangled_attention

    whiten = "channel" if case.whiten else None
    return lambda q, k, v, m: disentangled_attention(q, k, v, m, scale=case.scale, whiten=whiten)


@method("plain PyTorch, scale folded into the query; keeps N x N maps", maps=eager_maps)
def eager(case: Case) -> Attention:
    def run(q, k, v, m):
        weights = torch.softmax((centred(case, q) * case.scale) @ k.transpose(-1, -2), -1)
        return with_unary(weights @ v, v, m)

    return run


@method("scaled_dot_product_attention on the channel-first views", maps=sdpa_maps(contiguous=False))
def sdpa_views(case: Case) -> Attention:
    def run(q, k, v, m):
        return with_unary(F.scaled_dot_product_attention(centred(case, q), k, v, scale=case.scale), v, m)

    return run


def sdpa_copies(case: Case) -> Attention:
    def run(q, k, v, m):
        q, k, v = (x.contiguous() for x in (centred(case, q), k, v))
        return with_unary(F.scaled_dot_product_attention(q, k, v, scale=case.scale), v, m)

    return run


@method("scaled_dot_product_attention on contiguous copies, transposes included", maps=sdpa_maps(contiguous=True))
def sdpa_contiguous(case: Case) -> Attention:
    return sdpa_copies(case)


@method("the same, values cut to 256 channels a call so that a fused kernel takes them")
def sdpa_slices(case: Case) -> Attention:
    if case.channels <= FUSED_WIDTH:
        raise Unavailable(f"Dv <= {FUSED_WIDTH}: the same as sdpa_contiguous")
    if case.width > FUSED_WIDTH or case.channels % case.width:
        raise Unavailable(f"needs Dqk <= {FUSED_WIDTH} and Dv a multiple of it")

    def run(q, k, v, m):
        q, k = centred(case, q).contiguous(), k.contiguous()
        slices = [part.contiguous() for part in v.split(case.width, -1)]
        parts = [F.scaled_dot_product_attention(q, k, part, scale=case.scale) for part in slices]
        return with_unary(torch.cat(parts, -1), v, m)

    return run


def sdpa_with(backend: str) -> Callable[[Case], Attention]:
    def build(case):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        run = sdpa_copies(case)

        def forced(q, k, v, m):
            with sdpa_kernel(getattr(SDPBackend, backend)):
                return run(q, k, v, m)

        return forced

    return build


@method("SDPA, contiguous copies, FlashAttention backend", devices=("cuda",))
def sdpa_flash(case: Case) -> Attention:
    return sdpa_with("FLASH_ATTENTION")(case)


@method("SDPA, contiguous copies, memory-efficient backend", devices=("cuda",))
def sdpa_efficient(case: Case) -> Attention:
    return sdpa_with("EFFICIENT_ATTENTION")(case)


@method("SDPA, contiguous copies, cuDNN backend", devices=("cuda",))
def sdpa_cudnn(case: Case) -> Attention:
    return sdpa_with("CUDNN_ATTENTION")(case)


@method(f"plain PyTorch in chunks of {CHUNK_ROWS} query rows, buffers reused, map made again in the backward")
def chunks(case: Case) -> Attention:
    return lambda q, k, v, m: with_unary(Chunks.apply(centred(case, q) * case.scale, k, v), v, m)


class Chunks(torch.autograd.Function):
    """y = softmax(q k^T) v, one chunk of query rows at a time; q is already centred and scaled."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        y = q.new_empty(*q.shape[:-1], v.shape[-1])
        logits, weights = Chunks.buffers(q, k, 2)
        for rows, (s, p) in Chunks.each(q, logits, weights):
            torch.matmul(q[..., rows, :], k.transpose(-1, -2), out=s)
            torch.softmax(s, -1, out=p)
            y[..., rows, :] = p @ v
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = ctx.saved_tensors
        dq = torch.empty_like(q)
        wide = torch.promote_types(q.dtype, torch.float32)
        dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in (k, v))
        logits, weights = Chunks.buffers(q, k, 2)
        for rows, (s, p) in Chunks.each(q, logits, weights):
            q_rows, dy_rows = q[..., rows, :], dy[..., rows, :]
            torch.matmul(q_rows, k.transpose(-1, -2), out=s)
            torch.softmax(s, -1, out=p)
            dv += p.transpose(-1, -2) @ dy_rows
            torch.matmul(dy_rows, v.transpose(-1, -2), out=s)
            ds = torch.ops.aten._softmax_backward_data(s, p, -1, p.dtype)
            dq[..., rows, :] = ds @ k
            dk += ds.transpose(-1, -2) @ q_rows
        return dq, dk.to(k.dtype), dv.to(v.dtype)

    @staticmethod
    def buffers(q: torch.Tensor, k: torch.Tensor, count: int) -> list[torch.Tensor]:
        rows = min(CHUNK_ROWS, q.shape[-2])
        return [q.new_empty(*q.shape[:-2], rows, k.shape[-2]) for _ in range(count)]

    @staticmethod
    def each(q: torch.Tensor, *buffers: torch.Tensor) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        for first in range(0, q.shape[-2], CHUNK_ROWS):
            count = min(CHUNK_ROWS, q.shape[-2] - first)
            yield slice(first, first + count), [x[..., :count, :] for x in buffers]


@method("FlexAttention, compiled, contiguous copies", default=("cuda",))
def flex(case: Case) -> list[Attention]:
    from torch.nn.attention.flex_attention import flex_attention

    if case.device == "cpu" and case.training:
        raise Unavailable("no backward on the CPU")
    attention = torch.compile(flex_attention, dynamic=False)

    def with_options(options):
        def run(q, k, v, m):
            q, k, v = (x.contiguous() for x in (centred(case, q), k, v))
            return with_unary(attention(q, k, v, scale=case.scale, kernel_options=options), v, m)

        return run

    # Its own choice first; smaller tiles where that runs out of shared memory, as it does at widths over 256.
    return [with_options(None), *map(with_options, FLEX_TILES if case.device != "cpu" else ())]


@method("torch.compile of eager", default=("cuda",), maps=eager_maps)
def compiled(case: Case) -> Attention:
    return torch.compile(eager(case), dynamic=False)


@method("FFPA, query, key padded with zeros to the width of the values", devices=("cuda",))
def ffpa(case: Case) -> Attention:
    try:
        from ffpa_attn import ffpa_attn_func  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise Unavailable(f"ffpa_attn is not installed ({error})") from None
    if case.dtype not in ("bf16", "fp16"):
        raise Unavailable("takes bf16 and fp16 only")
    pad = case.channels - case.width
    if pad < 0:
        raise Unavailable("Dqk > Dv")

    def run(q, k, v, m):
        q, k = F.pad(centred(case, q).contiguous(), (0, pad)), F.pad(k.contiguous(), (0, pad))
        return with_unary(ffpa_attn_func(q, k, v.contiguous(), scale=case.scale), v, m)

    return run


@method("FlashAttention (flash_attn 3 where installed, else 2)", devices=("cuda",))
def flash_attn(case: Case) -> Attention:
    try:
        from flash_attn_interface import flash_attn_func  # pyright: ignore[reportMissingImports]
    except ImportError:
        try:
            from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise Unavailable(f"flash_attn is not installed ({error})") from None
    if case.dtype not in ("bf16", "fp16"):
        raise Unavailable("takes bf16 and fp16 only")
    if max(case.width, case.channels) > FUSED_WIDTH or case.width != case.channels:
        raise Unavailable(f"needs Dqk = Dv <= {FUSED_WIDTH}")

    def run(q, k, v, m):  # it wants (batch, positions, heads, channels)
        tensors = [x.transpose(1, 2).contiguous() for x in (centred(case, q), k, v)]
        result = flash_attn_func(*tensors, softmax_scale=case.scale)
        result = result[0] if isinstance(result, tuple) else result
        return with_unary(result.transpose(1, 2), v, m)

    return run

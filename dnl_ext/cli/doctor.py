"""`python -m dnl_ext doctor`: what was built, what runs here and why, and whether it computes the right thing."""

import json as json_module
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import fail

if TYPE_CHECKING:
    import torch

#: Allowed multiple of plain PyTorch's error against float64.
OUTPUT_BAR, GRADIENT_BAR = 2.0, 3.0
#: Roundings below which plain PyTorch's error counts as that many; in float64 it is the truth and has no error.
FLOOR, FLOOR_OF_FLOAT64 = 2.0, 64.0
#: Sizes of the self-check: odd, unequal, more than one tile.
QUERIES, KEYS, WIDTH, CHANNELS = 301, 403, 67, 131


def doctor(
    shape: Annotated[str, typer.Option(help="N,Dqk,Dv: say which path such a call takes and why.")] = "4096,256,512",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, float64 (or fp32, bf16, ...).")] = "float32",
    device: Annotated[str, typer.Option(help="As torch names it (an accelerator where there is one).")] = "",
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show versions, builds and paths, then check forward and backward against plain PyTorch. Exits 1 if broken."""

    from dnl_ext.config import show_config

    device = device or accelerator() or "cpu"
    try:
        sizes = [int(part) for part in shape.split(",")]
        config = show_config(shape=sizes, dtype=dtype, device=device)
    except ValueError as error:
        fail(error)
    checks = self_check()
    healthy = all(check["ok"] for check in checks)
    if json:
        typer.echo(json_module.dumps({**config, "checks": checks, "ok": healthy}, indent=1))
    else:
        typer.echo(str(config))
        typer.echo("self-check (error against float64, as a multiple of plain PyTorch's)")
        for check in checks:
            typer.echo(f"  {'ok    ' if check['ok'] else 'BROKEN'}  {check['name']:<16}  {check['text']}")
        typer.echo("everything works" if healthy else "dnl_ext is broken here: rebuild it, or report the lines above")
    if not healthy:
        raise typer.Exit(1)


def accelerator() -> str:
    """The type of the accelerator that torch sees here, such as "cuda" or "mps"; empty without one."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return "" if found is None else found.type


def self_check() -> list[dict[str, Any]]:
    """Forward and backward of every dtype on the CPU, and on each accelerator that torch sees.

    Returns:
        list of {"name", "ok", "text", "seconds"}; an exception is a check that is not ok.
    """
    import torch

    from dnl_ext.ops._common import sum_type

    devices = ["cpu"]
    if kind := accelerator():
        devices += [f"{kind}:{index}" for index in range(torch.accelerator.device_count())]
    checks = []
    for device in devices:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            if dtype == torch.float64 and sum_type(torch.empty(0, device=device)) != dtype:
                continue  # Apple's GPUs have none
            start = time.perf_counter()
            try:
                ratios = error_ratios(dtype, device)
                bars = {name: OUTPUT_BAR if name == "output" else GRADIENT_BAR for name in ratios}
                ok = all(ratio <= bars[name] for name, ratio in ratios.items())  # NaN is not
                text = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
            except Exception as error:
                ok, text = False, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            name = f"{device} {str(dtype).removeprefix('torch.')}"
            checks.append({"name": name, "ok": ok, "text": text, "seconds": time.perf_counter() - start})
    return checks


def error_ratios(dtype: "torch.dtype", device: str) -> dict[str, float]:
    """Error of dnl_ext over that of dnl_ext.reference, both in `dtype` against float64, per result.

    Inputs are channel-first views with a mean, on logits hot enough that the softmax is not flat.
    """
    import torch

    import dnl_ext

    generator = torch.Generator().manual_seed(0)

    def conv_output(channels, positions, mean):
        x = torch.randn(1, channels, positions, generator=generator) + mean
        return x.to(dtype).transpose(1, 2)

    tensors = [conv_output(WIDTH, QUERIES, 1.0), conv_output(WIDTH, KEYS, 1.0), conv_output(CHANNELS, KEYS, 0.0)]
    tensors.append(torch.randn(1, KEYS, generator=generator).to(dtype))
    grad_output = conv_output(CHANNELS, QUERIES, 0.0)
    exact_type = torch.float64

    def results(function, kind, where):
        inputs = [x.to(where, kind).detach().requires_grad_() for x in tensors]
        output = function(*inputs, scale=0.5)
        grads = torch.autograd.grad(output, inputs, grad_output.to(where, kind))
        names = ("output", "query", "key", "value", "mask")
        return {name: x.detach().cpu().to(exact_type) for name, x in zip(names, (output, *grads), strict=True)}

    truth = results(dnl_ext.reference.disentangled_attention, exact_type, "cpu")
    plain = results(dnl_ext.reference.disentangled_attention, dtype, device)
    fused = results(dnl_ext.disentangled_attention, dtype, device)
    ratios = {}
    for name, exact in truth.items():
        norm = exact.norm().item()
        floor = (FLOOR_OF_FLOAT64 if dtype == exact_type else FLOOR) * torch.finfo(dtype).eps
        own, peer = ((x[name] - exact).norm().item() / norm for x in (fused, plain))
        ratios[name] = own / max(peer, floor)
    return ratios

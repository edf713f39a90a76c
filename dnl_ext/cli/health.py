"""What `doctor` does: versions, builds and paths, and whether what runs here computes the right thing.

It needs torch alone, and so is there without the extra `cli` too, with options of its own for that case.
"""

import argparse
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: Of the command's options.
SHAPE, DTYPE = "4096,256,512", "float32"
HELP = {
    "shape": "N,Dqk,Dv: say which path such a call takes and why.",
    "dtype": "float32, bfloat16, float16, float64 (or fp32, bf16, ...).",
    "device": "As torch names it (an accelerator where there is one).",
    "json": "Print one JSON object.",
}
#: Allowed multiple of plain PyTorch's error against float64.
OUTPUT_BAR, GRADIENT_BAR = 2.0, 3.0
#: Roundings below which plain PyTorch's error counts as that many; in float64 it is the truth and has no error.
FLOOR, FLOOR_OF_FLOAT64 = 2.0, 64.0
#: Sizes of the self-check: odd, unequal, more than one tile.
QUERIES, KEYS, WIDTH, CHANNELS = 301, 403, 67, 131


def main(arguments: Sequence[str]) -> int:
    """The command without typer. Returns its exit code."""
    parser = argparse.ArgumentParser(prog="dnl-ext doctor")
    parser.add_argument("--shape", default=SHAPE, help=HELP["shape"])
    parser.add_argument("--dtype", default=DTYPE, help=HELP["dtype"])
    parser.add_argument("--device", default="", help=HELP["device"])
    parser.add_argument("--json", action="store_true", help=HELP["json"])
    options = parser.parse_args(arguments)
    try:
        return 0 if report(options.shape, options.dtype, options.device, options.json) else 1
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


def report(shape: str, dtype: str, device: str, as_json: bool) -> bool:
    """Print what the command prints. Returns whether all is well; ValueError: a wrong option."""
    from dnl_ext.config import show_config

    try:
        sizes = [int(part) for part in shape.split(",")]
    except ValueError:
        raise ValueError(f"--shape: expected numbers such as 4096,256,512, got {shape!r}") from None
    if max(sizes) >= 2**31:
        raise ValueError(f"--shape: expected numbers below {2**31}, got {shape!r}")
    config = show_config(shape=sizes, dtype=dtype, device=device or accelerator() or "cpu")
    checks = self_check()
    healthy = all(check["ok"] for check in checks)
    if as_json:
        print(json.dumps({**config, "checks": checks, "ok": healthy}, indent=1))
        return healthy
    print(config)
    print("self-check (error against float64, as a multiple of plain PyTorch's)")
    for check in checks:
        print(f"  {'ok    ' if check['ok'] else 'BROKEN'}  {check['name']:<16}  {check['text']}")
    print("everything works" if healthy else "dnl_ext is broken here: rebuild it, or report the lines above")
    return healthy


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

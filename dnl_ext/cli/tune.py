"""`python -m dnl_ext tune`: finds out which CUDA path is right, and fastest, on this GPU."""

from typing import TYPE_CHECKING, Annotated

import typer

from .errors import fail

if TYPE_CHECKING:
    from ..tuning import Outcome

LAYOUTS = ("channel_first", "rows")
DIRECTIONS = {"forward": (False,), "backward": (True,), "both": (False, True)}


def _layout(text: str) -> tuple[bool, bool, bool]:
    names = [part.strip() for part in text.split(",")]
    names *= 3 if len(names) == 1 else 1
    if len(names) != 3 or any(name not in LAYOUTS for name in names):
        fail(f"--layout: expected {' or '.join(LAYOUTS)}, once or for query, key and value, got {text!r}")
    query, key, value = (name == "channel_first" for name in names)
    return query, key, value


def _line(outcome: "Outcome") -> str:
    times = sorted(outcome.milliseconds.items(), key=lambda item: item[1])
    found = ", ".join(f"{path} {time:.3f} ms" for path, time in times) or outcome.skipped
    taken = f" -> {outcome.path}" if outcome.path else ""
    return (
        f"{outcome.call.dtype:8} {outcome.call.describe():48} {found or ('wrong' if outcome.wrong else 'right')}{taken}"
    )


def tune(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="N,Dqk,Dv or batch,Nq,Nk,Dqk,Dv; may be repeated (the official block's)."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32 (with TF32), or bf16, ...")] = "bf16,fp16",
    direction: Annotated[str, typer.Option(help="forward, backward or both.")] = "both",
    layout: Annotated[
        str, typer.Option(help="channel_first or rows, once or for query, key and value.")
    ] = "channel_first",
    path: Annotated[list[str] | None, typer.Option(help="A path to try; may be repeated (all).")] = None,
    device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "cuda",
    seconds: Annotated[float, typer.Option(min=0.0, help="Of timing a call and direction.")] = 0.5,
    check_only: Annotated[bool, typer.Option(help="Check the paths; time nothing, keep nothing.")] = False,
    unary: Annotated[bool, typer.Option(help="With the unary term.")] = False,
    seed: Annotated[int, typer.Option(help="Of the numbers.")] = 0,
) -> None:
    """Check every CUDA path against float64, time those that are right, keep the fastest for this GPU.

    What is found goes to a file in the user's cache folder (DNL_EXT_TUNE_FILE names another), for this GPU, driver and
    version; `dnl-ext doctor` shows what a call takes. A path that is wrong, or does not end, is never taken. Exits 1 if
    there is one, with the command that repeats its check.
    """
    import torch

    from .. import _tuned
    from .._load import _C
    from ..config import parse_dtype, parse_sizes
    from ..tuning import Target, usual_calls
    from ..tuning import tune as run

    try:
        dtypes = [str(parse_dtype(name.strip())).removeprefix("torch.") for name in dtype.split(",")]
        shapes = [parse_sizes(text.split(",")) for text in shape or ()]  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        fail(error)
    if direction not in DIRECTIONS:
        fail(f"--direction: expected one of {', '.join(DIRECTIONS)}, got {direction!r}")
    if unknown := [name for name in path or () if name not in _C.cuda_paths()]:
        fail(f"--path: expected one of {', '.join(_C.cuda_paths())}, got {unknown[0]!r}")
    if not device.startswith("cuda"):
        fail(f"--device: expected cuda or cuda:N, got {device!r}; a CPU's instruction set is chosen without measuring")
    layouts = _layout(layout)
    if not (torch.cuda.is_available() and _C.build_info()["cuda"]):
        fail("tune: no GPU that torch can use, or dnl_ext was built without CUDA: see `dnl-ext doctor`")
    torch.backends.cuda.matmul.allow_tf32 = "float32" in dtypes
    if shapes:
        kinds = DIRECTIONS[direction]
        calls = [_tuned.Call(name, back, sizes, layouts) for name in dtypes for sizes in shapes for back in kinds]
    else:
        calls = [call for call in usual_calls(dtypes) if call.backward in DIRECTIONS[direction]]
    outcomes, unwritten = run(
        calls, Target.of(device), paths=path, seconds=seconds, check_only=check_only, unary=unary, seed=seed,
        report=lambda outcome: typer.echo(_line(outcome)),
    )  # fmt: skip
    wrong = [reason for outcome in outcomes for reason in outcome.wrong.values()]
    for reason in wrong:
        typer.echo(f"WRONG {reason}", err=True)
    if unwritten:
        typer.echo(f"warning: {unwritten}", err=True)
    elif any(outcome.path for outcome in outcomes):
        typer.echo(f"kept in {_tuned.file()}")
    if wrong:
        raise typer.Exit(1)

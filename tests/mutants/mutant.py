"""A fault that is planted into a kernel.

A mutant replaces `old`, which must occur exactly once in `file` (under csrc), by `new`. `gate` is the program that must
reject it, of tests/gates or one that tests/gates/programs.py makes of tests/cpp; `mode` how it is built and run:

- ``plain``: values and the emulator's own errors, thread orders in rotation;
- ``order``: the same in each of the three orders, for faults that some orders hide;
- ``asan``: AddressSanitizer and UndefinedBehaviorSanitizer;
- ``tsan``: ThreadSanitizer.

`type` is the element type that is compiled; `cases` how many random cases may be spent on finding it.
"""

from dataclasses import dataclass

BF16, F16, TF32 = "__nv_bfloat16", "__half", "Tf32"


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    gate: str
    mode: str = "plain"
    type: str | None = "float"
    cases: int = 200

"""What `make arm-test` (tests/arm.py) rests on: the count of instructions, on text whose counts are known and on what
the compiler makes of the blocks; and that it says what it lacks."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import arm
import arm_budget
import compilers
import pytest

ROOT = pathlib.Path(__file__).parents[2]
NAME = "_ZN3dnl7counted5blockIfLi6ELNS0_4IntoE0EEEvPKT_"
LOOP = [".LBB0_2:", *["\tfmla\tv0.4s, v1.4s, v2.s[0]"] * 6, "\tldp\tq1, q2, [x0], #32", "\tb.ne\t.LBB0_2"]


def assembly(*lines):
    return "\n".join([f"{NAME}:", *lines, "\tret", f"\t.size\t{NAME}, 8"])


class TestCount:
    def test_of_a_loop(self):
        text = assembly("\tmov\tx1, x2  // fmla", *LOOP)
        assert arm_budget.blocks(text) == {"float32 store": arm_budget.Loop(8, 6, 0)}
        assert not arm_budget.worse(arm_budget.blocks(text), {"float32 store": 0.75})

    def test_an_outer_loop_and_a_branch_forward_are_no_innermost_loop(self):
        text = assembly(".LBB0_1:", "\tcbz\tx3, .LBB0_4", *LOOP, "\tb.lt\t.LBB0_1", ".LBB0_4:")
        assert arm_budget.blocks(text) == {"float32 store": arm_budget.Loop(8, 6, 0)}

    def test_of_gccs_names_of_branches(self):
        text = assembly(*LOOP[:-1], "\tbne\t.LBB0_2")
        assert arm_budget.blocks(text)["float32 store"].share == 0.75

    @pytest.mark.parametrize(
        ("lines", "wrong"),
        [
            (["\tdup\tv3.4s, v1.s[0]"], "less than 0.75"),
            (["\tfmla\tv9.4s, v1.4s, v2.s[0]", "\tstr\tq0, [sp, 16]"], "use the stack"),
        ],
    )
    def test_worse_code_is_found(self, lines, wrong):
        loops = arm_budget.blocks(assembly(LOOP[0], *lines, *LOOP[1:]))
        assert any(wrong in line for line in arm_budget.worse(loops, None))

    def test_a_budget_holds_what_was_better_than_needed(self):
        loops = {"float32 store": arm_budget.Loop(100, 80, 0)}
        assert not arm_budget.worse(loops, {"float32 store": 0.8})
        assert "less than 0.81" in arm_budget.worse(loops, {"float32 store": 0.81})[0]
        assert "no budget" in arm_budget.worse(loops, {})[0]
        assert "no such block" in arm_budget.worse({}, {"float32 store": 0.8})[0]


def test_budget_has_every_block():
    budget = json.loads(arm_budget.BUDGET.read_text())
    names = {f"{type} {into}" for type in arm_budget.TYPES.values() for into in arm_budget.INTO}
    for compiler in ("clang", "gcc"):
        assert set(budget[compiler]["share"]) == names
        assert min(budget[compiler]["share"].values()) >= arm_budget.LEAST_SHARE


@pytest.mark.skipif(not importlib.util.find_spec("ziglang"), reason='needs ziglang: pip install -e ".[dev]" on Linux')
def test_inner_loops_keep_their_budget():
    command = compilers.zig("aarch64-linux-musl")
    loops = arm_budget.blocks(arm_budget.compiled(command))
    assert not arm_budget.worse(loops, json.loads(arm_budget.BUDGET.read_text())["clang"]["share"])


class TestRunner:
    def run(self, *arguments, **environment):
        command = [sys.executable, ROOT / "tests/arm.py", *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)

    def test_it_says_how_to_get_what_it_lacks(self, tmp_path):
        done = self.run(PATH=str(tmp_path))
        assert done.returncode == 3 and "needs qemu-aarch64: apt-get install qemu-user" in done.stderr

    @pytest.mark.parametrize("arguments", [("--cases", "0"), ("--jobs", "0"), ("--compiler", "msvc"), ("--cases", "x")])
    def test_wrong_arguments(self, arguments):
        assert self.run(*arguments).returncode == 2

    def test_kernels_of_other_machines_are_left_out(self):
        assert {"isa_neon", "isa_neon_bf16", "isa_generic", "kernels"} <= {path.stem for path in arm.KERNELS}
        assert not any("avx" in path.stem for path in arm.KERNELS)

"""What tests do where a tool is missing: see toolchain.py and compilers.py."""

import compilers
import pytest
import toolchain


class TestLeftOut:
    def test_one_line_for_all_and_one_part_for_each_remedy(self):
        reasons = ["Skipped: needs mmcv: make it", "needs mmseg: make it", "Skipped: needs mmcv: make it"]
        reasons += ["long form; give --slow", "needs cmake: pip install cmake"]
        line = "Tests left out: 3 need mmcv, mmseg (make it); 1 need cmake (pip install cmake)"
        assert toolchain.left_out(reasons) == line

    def test_nothing_is_said_of_other_reasons(self):
        assert toolchain.left_out(["Skipped: long form; give --slow", "has a GPU"]) is None

    @pytest.mark.parametrize("reason", [toolchain.NO_GPU, *(f"needs {row[-1]}" for row in compilers.PURPOSES.values())])
    def test_the_reasons_have_its_form(self, reason):
        assert toolchain.left_out([reason])


class TestCompilers:
    def test_gnu_does_not_stand_in_for_the_thread_sanitizer_of_clang(self, monkeypatch):
        toolchain.skip_without_compiler("tsan-gnu")
        _, flags, condition, lacking = compilers.PURPOSES["tsan"]
        monkeypatch.setitem(compilers.PURPOSES, "tsan", (compilers.GNU, flags, condition, lacking))
        assert compilers.find.__wrapped__("tsan") is None

    def test_a_compiler_that_is_not_there_or_makes_nothing(self):
        assert not compilers.works(("no-such-compiler",), "1")
        assert not compilers.works(("true",), "1")

    def test_a_missing_compiler_skips_with_its_remedy(self, monkeypatch):
        monkeypatch.setattr(compilers, "find", lambda purpose: None)
        with pytest.raises(pytest.skip.Exception, match="needs clang and its ThreadSanitizer: pip install"):
            toolchain.skip_without_compiler("tsan")

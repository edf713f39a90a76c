"""The file of measured paths: what it survives, what it loses, and the choice made from it. No path runs."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dnl_ext import _tuned
from dnl_ext._tuned import Call, Machine, Measured, Verdict

MACHINE = Machine("NVIDIA H100", "580.65.06", "2.11.0", "0.1.0")
CALL = Call("bfloat16", False, (1, 4096, 4096, 256, 512))
RECORD = Measured(MACHINE, CALL, "fused", {"chain": 1.87, "fused": 1.31}, "2026-01-31")
FAULT = Verdict(MACHINE, "fused", "bfloat16", True, 256, 512, "fused: no end within 60 s [dnl-ext tune]", "2026-01-31")


@pytest.fixture(autouse=True)
def path(monkeypatch, tmp_path):
    path = tmp_path / "cache/paths.json"
    monkeypatch.setenv("DNL_EXT_TUNE_FILE", str(path))
    _tuned.forget()
    yield path
    _tuned.forget()


class TestFile:
    def test_what_is_added_is_read_by_another_process(self, path):
        assert _tuned.known().add([RECORD, FAULT]) == ""
        _tuned.forget()
        assert _tuned.known().measured == [RECORD] and _tuned.known().verdicts == [FAULT]
        assert [p.name for p in path.parent.iterdir() if p.suffix == ".json"] == ["paths.json"]

    def test_the_last_record_of_a_call_counts(self, path):
        newer = replace(RECORD, path="chain", date="2026-02-01")
        for record in (RECORD, newer):
            _tuned.known().add([record])
        _tuned.forget()
        assert _tuned.known().measured == [newer]

    def test_is_read_once(self, path):
        assert _tuned.known().measured == []
        _tuned.Known(path).add([RECORD])
        assert _tuned.known().measured == []

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "[]",
            "null",
            "\x00\xff",
            '{"schema": 1}',
            '{"schema": 1, "measured": 3, "verdicts": []}',
            99999 * "[",
        ],
    )
    def test_garbage_counts_as_empty_and_is_written_over(self, path, text):
        path.parent.mkdir()
        path.write_text(text)
        with pytest.warns(UserWarning, match="cannot be read"):
            assert _tuned.known().measured == []
        with pytest.warns(UserWarning, match="cannot be read"):
            assert _tuned.known().add([RECORD]) == ""
        _tuned.forget()
        assert _tuned.known().measured == [RECORD]

    def test_bytes_that_are_no_text(self, path):
        path.parent.mkdir()
        path.write_bytes(b"\xff\xfe\x00{")
        with pytest.warns(UserWarning, match="cannot be read"):
            assert _tuned.known().measured == []

    @pytest.mark.parametrize(
        "change",
        [
            lambda row: row.pop("machine"),
            lambda row: row.update(machine="H100"),
            lambda row: row["machine"].update(gpu=3),
            lambda row: row["machine"].update(vendor="x"),
            lambda row: row.update(path="warp"),
            lambda row: row.update(path=["fused"]),
            lambda row: row["call"].update(sizes=[1, 2, 3]),
            lambda row: row["call"].update(sizes=["a"] * 5),
            lambda row: row["call"].pop("dtype"),
            lambda row: row.update(milliseconds={"fused": "fast"}),
            lambda row: row.update(milliseconds=None),
            lambda row: row.update(wrong={"fused": "off by 7 times"}),  # what is wrong is never chosen
            lambda row: row.update(note="of another version"),
            lambda row: row["call"].update(dtype=["bfloat16"]),
            lambda row: row["call"].update(backward=1),
            lambda row: row["call"].update(sizes=[1, -4, 8, 8, 8]),
            lambda row: row["call"].update(sizes=[1, 10**400, 8, 8, 8]),
            lambda row: row.update(date=None),
        ],
    )
    def test_a_record_that_is_none_is_left_out_and_others_stay(self, path, change):
        _tuned.known().add([RECORD, FAULT])
        document = json.loads(path.read_text())
        bad = json.loads(json.dumps(document["measured"][0]))
        change(bad)
        document["measured"].insert(0, bad)
        path.write_text(json.dumps(document))
        _tuned.forget()
        assert _tuned.known().measured == [RECORD] and _tuned.known().verdicts == [FAULT]

    @pytest.mark.parametrize("change", [{"reason": None}, {"width": [1]}, {"channels": 0}, {"channel_first": [True]}])
    def test_a_verdict_that_is_none_is_left_out(self, path, change):
        _tuned.known().add([FAULT])
        document = json.loads(path.read_text())
        document["verdicts"][0] |= change
        path.write_text(json.dumps(document))
        _tuned.forget()
        assert _tuned.known().verdicts == []

    def test_a_verdict_is_of_its_order_in_memory(self, path):
        _tuned.known().add([FAULT])
        call = replace(CALL, backward=FAULT.backward, dtype=FAULT.dtype, sizes=(1, 9, 9, FAULT.width, FAULT.channels))
        assert _tuned.verdict(MACHINE, FAULT.path, call) == FAULT
        assert _tuned.verdict(MACHINE, FAULT.path, replace(call, channel_first=(True, False, True))) is None

    def test_a_file_of_another_version_is_left_alone(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"schema": 2, "measured": {}}')
        assert "of another version" in _tuned.known().add([RECORD])
        assert path.read_text() == '{"schema": 2, "measured": {}}'

    @pytest.mark.skipif(os.name != "posix", reason="modes and links of POSIX")
    def test_a_shared_file_stays_shared_and_a_link_a_link(self, path, tmp_path):
        shared = tmp_path / "shared.json"
        shared.write_text("{}")
        shared.chmod(0o664)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(shared)
        assert _tuned.known().add([RECORD]) == ""
        assert path.is_symlink() and shared.stat().st_mode & 0o777 == 0o664
        _tuned.forget()
        assert _tuned.known().measured == [RECORD]

    def test_without_a_home_nothing_is_written(self, monkeypatch, tmp_path):
        monkeypatch.delenv("DNL_EXT_TUNE_FILE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # HOME not set, a uid that nobody knows
        monkeypatch.chdir(tmp_path)
        assert "lasts for this process" in _tuned.known().add([RECORD])
        assert _tuned.known().measured == [RECORD] and list(tmp_path.iterdir()) == []

    def test_another_layout_is_not_read(self, path):
        _tuned.known().add([RECORD])
        document = json.loads(path.read_text())
        path.write_text(json.dumps(document | {"schema": _tuned.SCHEMA + 1}))
        _tuned.forget()
        assert _tuned.known().measured == []

    def test_two_writers_lose_nothing(self, path):
        code = "import sys; sys.path.insert(0, sys.argv[1]); import test_tuned_file as t\n"
        code += "for n in range(1, 21):\n"
        code += "    call = t.replace(t.CALL, sizes=(int(sys.argv[2]), n, n, 8, 8))\n"
        code += "    t._tuned.known().add([t.replace(t.RECORD, call=call)])"
        here = Path(__file__).parent
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        writers = [subprocess.Popen([sys.executable, "-c", code, here, str(k)], env=environment) for k in (1, 2)]
        assert [writer.wait() for writer in writers] == [0, 0]
        assert len(_tuned.known().measured) == 40
        assert sorted(p.name for p in path.parent.iterdir()) == ["paths.json", "paths.json.lock"]

    def test_a_folder_that_cannot_be_written_keeps_the_choice_for_this_process(self, path):
        path.parent.write_text("a file where the folder would be")
        why = _tuned.known().add([RECORD])
        assert str(path) in why and "lasts for this process" in why
        assert _tuned.choice(MACHINE, 90, CALL).path == "fused"

    def test_where_it_lies(self, monkeypatch, tmp_path):
        monkeypatch.delenv("DNL_EXT_TUNE_FILE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert _tuned.file() == tmp_path / "dnl_ext" / f"paths-{_tuned.SCHEMA}.json"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert _tuned.file().parent == tmp_path / ".cache/dnl_ext"


class TestChoice:
    @pytest.fixture(autouse=True)
    def chain_by_default(self, monkeypatch):
        monkeypatch.setattr(_tuned, "DEFAULTS", ())

    def test_says_what_was_measured_and_when(self):
        _tuned.known().add([RECORD])
        choice = _tuned.choice(MACHINE, 90, CALL)
        assert choice == _tuned.Choice("fused", "measured on 2026-01-31: fused 1.31 ms, chain 1.87 ms")

    def test_what_is_wrong_is_named(self):
        _tuned.known().add([replace(RECORD, path="chain", milliseconds={"chain": 2.0}, wrong={"fused": "off by 9"})])
        assert _tuned.choice(MACHINE, 90, CALL).why.endswith("chain 2 ms; wrong here: fused")

    @pytest.mark.parametrize("field", ["gpu", "driver", "torch", "dnl_ext"])
    def test_of_another_machine_says_nothing(self, field):
        _tuned.known().add([RECORD])
        choice = _tuned.choice(replace(MACHINE, **{field: "other"}), 90, CALL)
        assert choice.path == "chain" and "dnl-ext tune" in choice.why

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"sizes": (1, 8192, 8192, 256, 512)}, "fused"),  # four times the logits
            ({"sizes": (4, 4096, 4096, 256, 512)}, "fused"),
            ({"sizes": (1, 2048, 4096, 256, 512), "channel_first": (False,) * 3}, "fused"),
            ({"sizes": (1, 16384, 16384, 256, 512)}, "chain"),
            ({"sizes": (4, 4096, 4096, 256, 512), "channel_first": (True, True, False)}, "chain"),
            ({"sizes": (1, 4096, 4096, 256, 256)}, "chain"),
            ({"sizes": (0, 4096, 4096, 256, 512)}, "chain"),
            ({"dtype": "float16"}, "chain"),
            ({"backward": True}, "chain"),
        ],
    )
    def test_calls_near_a_measured_one_take_its_path(self, change, expected):
        _tuned.known().add([RECORD])
        choice = _tuned.choice(MACHINE, 90, replace(CALL, **change))
        assert choice.path == expected
        assert expected == "chain" or "N = 4096, (256, 512)" in choice.why

    def test_the_nearest_counts(self):
        far = replace(RECORD, call=replace(CALL, sizes=(1, 8192, 8192, 256, 512)), path="chain")
        _tuned.known().add([far, RECORD])
        assert _tuned.choice(MACHINE, 90, replace(CALL, sizes=(1, 4096, 5000, 256, 512))).path == "fused"
        assert _tuned.choice(MACHINE, 90, replace(CALL, sizes=(1, 8192, 7000, 256, 512))).path == "chain"


class TestDefault:
    @pytest.fixture(autouse=True)
    def default(self, monkeypatch):
        monkeypatch.setattr(
            _tuned, "DEFAULTS", (_tuned.Default("fused", (80, 89), True, ("bfloat16",), 512, logits=81),)
        )

    @pytest.mark.parametrize(
        ("capability", "change", "expected"),
        [
            (80, {}, "fused"),
            (86, {}, "fused"),
            (90, {}, "chain"),
            (80, {"dtype": "float16"}, "chain"),
            (80, {"backward": False}, "chain"),
            (80, {"sizes": (1, 9, 9, 256, 512)}, "fused"),
            (80, {"sizes": (1, 9, 9, 256, 513)}, "chain"),
            (80, {"sizes": (1, 9, 8, 256, 512)}, "chain"),
        ],
    )
    def test_is_of_the_architecture(self, capability, change, expected):
        choice = _tuned.choice(MACHINE, capability, replace(CALL, **{"backward": True, **change}))
        assert choice.path == expected and choice.unchecked is (expected != "chain")

    def test_of_a_path_that_was_not_built_is_the_chain(self, monkeypatch):
        monkeypatch.setattr(_tuned, "DEFAULTS", (_tuned.Default("warp", (80, 89), True, ("bfloat16",), 512),))
        assert _tuned.choice(MACHINE, 80, replace(CALL, backward=True)).path == "chain"

    def test_waits_for_its_self_check_and_is_off_where_that_fails(self):
        call = replace(CALL, backward=True)
        assert _tuned.choice(MACHINE, 80, call).unchecked
        _tuned.known().add([replace(FAULT, reason="")])
        choice = _tuned.choice(MACHINE, 80, call)
        assert choice.path == "fused" and not choice.unchecked and "2026-01-31" in choice.why
        _tuned.known().add([FAULT])
        choice = _tuned.choice(MACHINE, 80, call)
        assert choice.path == "chain" and not choice.unchecked and "no end within 60 s" in choice.why
        assert _tuned.choice(MACHINE, 80, replace(call, sizes=(1, 64, 64, 128, 512))).unchecked  # other widths

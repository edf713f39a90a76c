"""show_config and `python -m dnl_ext doctor`."""

import json
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import dnl_ext
from dnl_ext._load import _C
from dnl_ext.cli.app import app
from dnl_ext.config import arch_cover, cuda_plan, parse_dtype, show_config


def doctor(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments])


class TestShowConfig:
    def test_says_what_was_built_and_what_runs(self):
        config = show_config()
        assert config["versions"]["torch"] == torch.__version__
        assert config["versions"]["torch_built_with"] and config["versions"]["compiler"]
        assert config["cpu"]["threads"] == torch.get_num_threads()
        assert config["cpu"]["capabilities"][config["cpu"]["capability"]] is True
        assert {"built", "archs", "devices"} <= config["cuda"].keys()
        assert "OMP_NUM_THREADS" in config["environment"]
        assert "call" not in config

    @pytest.mark.skipif(_C.build_info()["cuda"], reason="built with CUDA")
    def test_says_why_there_is_no_cuda(self):
        why = show_config()["cuda"]["left_out"]
        assert why and why in str(show_config())
        assert show_config(shape=(1024, 256, 512), device="cuda")["call"]["why"] == f"built without CUDA: {why}"

    def test_prints_and_is_json(self):
        config = show_config(shape=(1024, 256, 512))
        assert json.loads(json.dumps(config)) == config
        text = str(config)
        for word in ("capability", "path", "why", "micro-kernels", "Dqk 256", torch.__version__):
            assert word in text
        assert repr(config) == text

    def test_path_of_a_shape(self):
        call = show_config(shape=(1024, 256, 512), dtype="bf16")["call"]
        assert call["dtype"] == "bfloat16" and call["path"].startswith("tiled")
        assert call["shape"] == {"batch": 1, "Nq": 1024, "Nk": 1024, "Dqk": 256, "Dv": 512}
        assert call["map_bytes"] == 2 * 1024 * 1024
        assert call["products"].endswith("into float32")
        assert show_config(shape=(8, 4, 4), dtype=torch.float64)["call"]["products"].endswith("into float64")

    def test_workspace_is_linear_in_positions(self):
        calls = [show_config(shape=(n, 64, 64))["call"] for n in (4096, 8192)]
        for name in ("workspace_forward_bytes", "workspace_backward_bytes"):
            small, large = (call[name] for call in calls)
            assert 0 < small < large < 2.2 * small

    def test_path_of_tensors(self):
        query = torch.randn(2, 3, 16, 50).transpose(-1, -2)
        value = torch.randn(2, 3, 40, 8)
        call = show_config(query, query[..., :40, :], value)["call"]
        assert call["shape"] == {"batch": 6, "Nq": 50, "Nk": 40, "Dqk": 16, "Dv": 8}
        assert "channel-first" in call["layout"]["query"] and "rows" in call["layout"]["value"]

    def test_meta_and_cuda(self):
        meta = torch.empty(1, 10, 4, device="meta")
        assert show_config(meta, meta, meta)["call"]["path"] == "shapes only"
        call = show_config(shape=(1024, 256, 256), device="cuda")["call"]
        assert call["path"] == "none" or call["path"].startswith(("GEMM chain", "plain PyTorch"))
        assert call["why"]

    @pytest.mark.parametrize("device", ["mps", "xpu", "mps:0"])
    def test_a_device_without_kernels(self, device):
        config = show_config(shape=(1024, 256, 256), device=device)
        call = config["call"]
        assert call["path"].startswith("plain PyTorch") and device.split(":")[0] in call["why"]
        assert "cpu" in config["kernels"]["devices_with"] and call["path"] == config["kernels"]["elsewhere"]

    def test_cuda_plan_says_which_path_and_why(self, monkeypatch):
        sizes = (1, 16384, 16384, 256, 512)
        monkeypatch.delenv("DNL_EXT_CUDA_PATH", raising=False)
        call = cuda_plan("bfloat16", sizes, {}, 80, 108)
        assert call["path"].startswith("GEMM chain") and "nothing has measured" in call["why"]
        assert "64 queries x 64 keys, 1 x 512 channels" in call["fused_forward"]
        monkeypatch.setenv("DNL_EXT_CUDA_PATH", "fused")
        call = cuda_plan("bfloat16", sizes, {"value_channel_first": True}, 90, 132)
        assert call["path"].startswith("fused") and call["backward"].startswith("fused")
        assert "float32" in cuda_plan("float32", sizes, {}, 90, 132)["why"]
        monkeypatch.setenv("DNL_EXT_CUDA_PATH", "quick")
        assert cuda_plan("bfloat16", sizes, {}, 90, 132)["path"] == "none"

    @pytest.mark.parametrize(
        "arguments",
        [
            {"shape": (1, 2)},
            {"shape": (1, 2, -3)},
            {"shape": (4, 4, 4), "dtype": "int8"},
            {"shape": (4, 4, 4), "device": "tpu"},
            {"query": torch.zeros(1, 2)},
        ],
    )
    def test_bad_arguments(self, arguments):
        with pytest.raises(ValueError, match="expected"):
            show_config(**arguments)

    def test_names_of_dtypes(self):
        assert parse_dtype("torch.bfloat16") == parse_dtype("bf16") == parse_dtype(torch.bfloat16) == torch.bfloat16
        assert parse_dtype(None) == torch.float32

    def test_which_code_a_device_runs(self):
        archs = ["8.0", "9.0+PTX"]
        assert arch_cover(archs, (8, 6)) == "8.0"
        assert arch_cover(archs, (9, 0)) == "9.0"
        assert arch_cover(archs, (12, 0)) == "9.0+PTX (JIT)"
        assert arch_cover(archs, (7, 5)) is None
        assert arch_cover(["9.0a"], (9, 0)) == "9.0a"
        assert arch_cover(["9.0a"], (10, 0)) is None


class TestDoctor:
    def test_healthy(self):
        result = doctor()
        assert result.exit_code == 0, result.output
        assert "everything works" in result.output and "micro-kernels" in result.output
        assert "BROKEN" not in result.output

    def test_json(self):
        result = doctor("--json", "--shape", "64,32,16", "--dtype", "bf16", "--device", "cpu")
        report = json.loads(result.output)
        assert report["ok"] is True and report["call"]["shape"]["Dv"] == 16
        assert {check["name"] for check in report["checks"]} >= {"cpu float32", "cpu bfloat16"}

    @pytest.mark.parametrize("fault", ["output", "gradient", "exception"])
    def test_broken_library_exits_1(self, monkeypatch, fault):
        right = dnl_ext.disentangled_attention

        def wrong(query, key, value, mask_logits=None, **options):
            if fault == "exception":
                raise RuntimeError("no kernel")
            if fault == "gradient":  # right values, a gradient of the query that is off by a hundredth
                query = 1.01 * query - 0.01 * query.detach()
            y = right(query, key, value, mask_logits, **options)
            return 1.001 * y if fault == "output" else y

        monkeypatch.setattr(dnl_ext, "disentangled_attention", wrong)
        result = doctor("--device", "cpu")
        assert result.exit_code == 1
        assert "BROKEN" in result.output

    def test_without_kernels(self):
        """It says that they are left out and why, and checks what runs in their place."""
        environment = {**os.environ, "DNL_EXT_KERNELS": "off"}
        command = [sys.executable, "-m", "dnl_ext", "doctor", "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        report = json.loads(done.stdout)
        assert report["ok"] and report["call"]["path"].startswith("plain PyTorch")
        assert report["kernels"]["devices_with"] == [] and report["cpu"]["capability"] == "none"
        assert report["kernels"]["left_out"] == report["call"]["why"] == "DNL_EXT_KERNELS=off"

    @pytest.mark.parametrize("arguments", [("--shape", "1,2"), ("--shape", "a,b,c"), ("--dtype", "int8")])
    def test_bad_arguments_exit_2(self, arguments):
        assert doctor(*arguments).exit_code == 2


def test_whitening_before_the_operator_is_mentioned():
    assert "ln, applied to query and key before" in dnl_ext.show_config(shape=(64, 8, 8), whiten="ln")["call"]["whiten"]
    for whiten in ("channel", "in_nostd", None):
        assert "whiten" not in dnl_ext.show_config(shape=(64, 8, 8), whiten=whiten)["call"]
    with pytest.raises(ValueError, match=r"^whiten: expected one of"):
        dnl_ext.show_config(shape=(64, 8, 8), whiten="nln")

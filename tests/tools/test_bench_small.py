"""The benchmark of small calls: what it covers, what it counts, what it lets through."""

import json
import math
import time
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import dnl_ext
from dnl_ext import benchmark, modules, ops, reference
from dnl_ext.benchmark import SmallOptions
from dnl_ext.benchmark._small import measure, peers
from dnl_ext.benchmark._small.rows import rows as all_rows
from dnl_ext.cli import bench as command
from dnl_ext.cli.app import app

ONE = SmallOptions(dtypes=("fp32",), directions=("forward",), rounds=3, only="mean_subtract 64x64")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Samples of one call: figures that mean nothing, soon."""
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 1e-6)
    monkeypatch.setattr(command, "LEAST_ROUNDS_OF_SMALL", 3)


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", "--small", *arguments])


class TestRows:
    def test_every_operator_and_block(self):
        rows = all_rows()
        covered = {row.what for row in rows}
        blocks = {name for name in modules.__all__ if isinstance(getattr(modules, name), type)}
        blocks = {name for name in blocks if issubclass(getattr(modules, name), torch.nn.Module)}
        assert covered == set(ops.__all__) | blocks - {"RelationModule"}
        assert len(rows) >= 60 and len({(row.what, row.sizes) for row in rows}) == len(rows)

    @pytest.mark.parametrize("training", [False, True])
    def test_all_methods_are_right(self, training):
        """So a row compares what computes the same, and no method is left out of it for being wrong."""
        for row in all_rows():
            calls, failures = measure._checked(row.make(torch.float32), training)
            assert not failures, (row, failures)
            assert next(iter(calls)) == "dnl_ext" and len(calls) > 1, row
            assert all(x.dtype == torch.float32 for call in calls.values() for x in call())

    def test_gradients_of_inputs_and_parameters(self):
        row = next(row for row in all_rows() if row.what == "GlobalContext2d")
        job = row.make(torch.float32)
        parameters = len(list(dnl_ext.GlobalContext2d(64).parameters()))
        assert len(job.leaves("dnl_ext", True)) == 1 + parameters and job.leaves("dnl_ext", False) == []


class TestFigures:
    def test_are_of_the_fastest_peer(self):
        options = replace(ONE, only="pairwise_attention standard 1x4x8x8")
        cell = benchmark.run_small(options)["cells"][0]
        ratios = {name: method["ratio"] for name, method in cell["methods"].items()}
        assert ratios.pop("dnl_ext") == 1.0
        assert set(ratios) == {"eager", "sdpa_views", "sdpa_contiguous"}
        assert cell["ratio"] == min(ratios.values()) == ratios[cell["best_peer"]]
        for method in cell["methods"].values():
            assert method["quartiles"][0] <= method["ratio"] <= method["quartiles"][1]

    def test_a_slow_library_loses(self, monkeypatch):
        def slow(x, dim=-2):
            end = time.thread_time() + 1e-3
            while time.thread_time() < end:
                pass
            return dnl_ext.mean_subtract(x, dim)

        monkeypatch.setattr(ops, "mean_subtract", slow)
        document = benchmark.run_small(ONE)
        assert document["cells"][0]["ratio"] < 0.5
        assert "1 cells of 1 rows, 1 below 1.0, of 1 three quarters" in benchmark.small_markdown(document)
        assert "**0." in benchmark.small_markdown(document)

    @pytest.mark.parametrize("direction", ["forward", "training"])
    def test_a_wrong_library_has_none(self, monkeypatch, direction):
        monkeypatch.setattr(ops, "mean_subtract", lambda x, dim=-2: 1.1 * dnl_ext.mean_subtract(x, dim))
        cell = benchmark.run_small(replace(ONE, directions=(direction,)))["cells"][0]
        assert cell["ratio"] is None and cell["failures"]["dnl_ext"].startswith("wrong")
        result = bench("--only", ONE.only, "--dtype", "fp32", "--direction", direction, "--threads", "1")
        assert result.exit_code == 1 and "wrong" in result.output

    @pytest.mark.parametrize("fault", [lambda x: 0 * x, lambda x: x.new_full(x.shape, math.nan)])
    @pytest.mark.parametrize("which", [0, -1])
    def test_one_gradient_that_is_wrong_in_bfloat16(self, fault, which):
        """Among many: of the input, or of the last parameter."""
        row = next(row for row in all_rows() if row.what == "DisentangledNonLocal2d" and "1x64x8x8" in row.sizes)
        job = row.make(torch.bfloat16)
        leaf = job.leaves("dnl_ext", True)[which]
        leaf.register_hook(fault)
        calls, failures = measure._checked(job, True)
        assert "dnl_ext" not in calls and failures["dnl_ext"].startswith("wrong")

    def test_a_peer_that_raises_is_left_out(self, monkeypatch):
        def fail(x, dim=-2):
            if x.dtype == torch.float32:
                raise RuntimeError("not here")
            return reference.mean_subtract(x, dim)

        monkeypatch.setitem(peers.PEERS["mean_subtract"], "other", fail)
        cell = benchmark.run_small(ONE)["cells"][0]
        assert "not here" in cell["failures"]["other"] and cell["best_peer"] == "eager"

    def test_threads_are_those_asked_for(self):
        before = torch.get_num_threads()
        document = benchmark.run_small(replace(ONE, threads=(1, 2)))
        assert [cell["threads"] for cell in document["cells"]] == [1, 2] and torch.get_num_threads() == before


class TestCommand:
    def test_table_and_json(self, tmp_path):
        path = tmp_path / "small.json"
        result = bench("--only", "GlobalContext1d", "--dtype", "fp32,bf16", "--threads", "1", "--json", str(path))
        assert result.exit_code == 0, result.output
        assert "4 cells of 1 rows" in result.output and "GlobalContext1d" in result.output
        document = benchmark.load_small(path)
        assert document == json.loads(path.read_text()) and len(document["cells"]) == 4
        again = bench("--load", str(path))
        assert again.exit_code == 0 and "4 cells of 1 rows" in again.output
        text = bench("--load", str(path), "--markdown").output
        assert text.strip() == benchmark.small_markdown(document) and "| GlobalContext1d | 2x32x100 |" in text

    @pytest.mark.parametrize("arguments", [("--only", "nothing"), ("--dtype", "int8"), ("--load", "no_such.json")])
    def test_bad_arguments_exit_2(self, arguments):
        assert bench(*arguments).exit_code == 2

    def test_other_documents_are_refused(self, tmp_path):
        path = tmp_path / "x.json"
        for text in ('{"schema": 1}', '{"small_schema": 99, "cells": []}', "[]", "no json"):
            path.write_text(text)
            with pytest.raises(ValueError, match=r"x\.json"):
                benchmark.load_small(path)

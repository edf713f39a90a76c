"""The fused CUDA path (DNL_EXT_CUDA_PATH=fused): emulated on the CPU, and on a GPU where there is one.

Random cases are held to the bar of tests/accuracy.py. Which tiles, slices and splits they meet depends on the GPU, so
the emulated one changes from case to case: see GPUS. The short form runs CASES of them, --slow runs SLOW_CASES.
"""

import concurrent.futures
import math
import random

import accuracy
import cases
import pytest
import routes
import torch
from toolchain import NO_GPU

import dnl_ext

#: What the fused kernels take; float32 because the fixture `fused` allows TF32.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Of what is multiplied: 10 bits of fraction in TF32.
EPS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: accuracy.EPS_TF32}
#: Compute capability (hence shared memory: 163, 99, 227 KiB) and multiprocessors (more of them, more splits).
GPUS = ("80,4", "89,2", "90,132", "89,24")
CASES, SLOW_CASES, AT_ONCE = 100, 6000, 100
#: Most Dqk of float32 where a block has 99 KiB of shared memory.
WIDTH_IN_99_KIB = 176


@pytest.fixture(params=["emulated", "cuda"])
def fused(request, monkeypatch, allow_tf32):
    """dnl_ext on CPU tensors, by the fused path of a route, TF32 allowed; a function that sets the emulated GPU."""
    if request.param == "cuda" and not routes.HAS_GPU:
        pytest.skip(NO_GPU)
    monkeypatch.setenv("DNL_EXT_CUDA_PATH", "fused")
    allow_tf32(True)
    with routes.route(request.param):
        yield lambda gpu: monkeypatch.setenv("DNL_EXT_EMULATED_GPU", gpu)


def fused_case(seed, gpu):
    """A case within the fused path's limits on `gpu`: Dqk <= 256, any Dv; few keys more often than many."""
    rng = random.Random(seed)

    def size(most):
        kind = rng.random()
        if kind < 0.2:
            return rng.randint(1, 4)
        if kind < 0.4:
            return rng.randrange(8, most, 8)  # aligned rows
        return rng.randint(1, min(80, most)) if kind < 0.7 else rng.randint(1, most)

    nq, nk, dqk, dv = size(200), size(200), size(256), size(700)
    dtype = rng.choice(DTYPES)
    if dtype == torch.float32 and gpu.startswith("89"):
        dqk = min(dqk, WIDTH_IN_99_KIB)
    if rng.random() < 0.15:  # enough tiles of keys to be split
        nk, dv = rng.randint(300, 1000), min(dv, 100)
    lead = rng.choice(((), (1,), (2,), (2, 1)))
    if math.prod(lead) * nq * nk * max(dqk, dv) > 3e6:
        lead, nq = (), min(nq, 80)
    op = rng.choice(cases.ATTENTION)
    names = [name for name in cases.ARGUMENTS[op] if name != "mask_logits" or rng.random() < 0.8]
    layout = rng.choice((None, None, "contiguous", "channel_first"))
    return cases.make_case(
        op,
        lead=lead,
        nq=nq,
        nk=nk,
        dqk=dqk,
        dv=dv,
        mask="mask_logits" in names,
        seed=seed,
        dtype=dtype,
        layouts={name: layout or rng.choice(cases.LAYOUTS) for name in names},
        mean=rng.choice((0.0, 10.0, 30.0)),
        signs=rng.choice(("same", "mixed")),
        options={
            "scale": rng.choice((None, None, 1.25, -1.25, 0.05, 0.0)),
            "whiten": "channel" if rng.random() < 0.75 else None,
        },
        grad=rng.choice(cases.GRADIENTS),
        needs=tuple(name for name in names if rng.random() < 0.85) or tuple(names),
    )


def check_cases(seeds, fused):
    """Fail with every case above the bar."""
    messages = []
    for seed in seeds:
        fused(GPUS[seed % len(GPUS)])
        case = fused_case(seed, GPUS[seed % len(GPUS)])
        if failed := accuracy.failures(case):
            messages.append(f"{case} on {GPUS[seed % len(GPUS)]}\n  " + "\n  ".join(map(str, failed)))
    assert not messages, f"{len(messages)} cases failed\n" + "\n".join(messages)


class TestError:
    @pytest.mark.parametrize("first", range(0, CASES, AT_ONCE))
    def test_is_within_the_bar(self, fused, first):
        check_cases(range(first, first + AT_ONCE), fused)

    @pytest.mark.slow
    @pytest.mark.parametrize("first", range(CASES, SLOW_CASES, AT_ONCE))
    def test_is_within_the_bar_long(self, fused, first):
        check_cases(range(first, first + AT_ONCE), fused)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("layout", ["contiguous", "channel_first"])
    def test_widest_tiles(self, fused, dtype, layout):
        """Full tiles on every kind of GPU: aligned, Dqk = 256, slices of 256 and 512 and two of them."""
        for gpu, dv in (("80,4", 256), ("80,4", 512), ("89,4", 512), ("80,4", 640), ("90,4", 256)):
            fused(gpu)
            dqk = WIDTH_IN_99_KIB if dtype == torch.float32 and gpu.startswith("89") else 256
            accuracy.check(cases.make_case(lead=(), nq=72, nk=136, dqk=dqk, dv=dv, dtype=dtype, layout=layout))


def step(inputs, **options):
    """Output and gradients of one training step."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = dnl_ext.disentangled_attention(*leaves, **options)
    return output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output).cumsum(-1) / output.shape[-1])


def inputs_of(dtype, queries=70, keys=90, width=40, channels=72, batch=(2,)):
    """query, key, value, mask_logits."""
    shapes = ((*batch, queries, width), (*batch, keys, width), (*batch, keys, channels), (*batch, keys))
    return [torch.randn(shape).to(dtype) for shape in shapes]


class TestPath:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_differs_from_the_chain_in_roundings_only(self, fused, monkeypatch, dtype):
        """That the fused kernels ran at all: equal bits would be the chain's."""
        inputs = inputs_of(dtype)
        ours = step(inputs)
        monkeypatch.setenv("DNL_EXT_CUDA_PATH", "chain")
        chain = step(inputs)
        assert not all(torch.equal(x, y) for x, y in zip(ours, chain, strict=True))
        for x, y in zip(ours, chain, strict=True):
            torch.testing.assert_close(x.double(), y.double(), rtol=0, atol=4 * EPS[dtype] * y.abs().max())

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_splits_change_roundings_only(self, fused, dtype):
        inputs = inputs_of(dtype, queries=40, keys=600, width=16, channels=520)
        fused("89,1")
        whole = step(inputs, scale=1.0)
        fused("89,64")
        assert dnl_ext._C.cuda_plan(
            str(dtype).removeprefix("torch."), 2, 40, 600, 16, 520, capability=89, multiprocessors=64
        )["splits"] > 1  # fmt: skip
        for x, y in zip(step(inputs, scale=1.0), whole, strict=True):
            torch.testing.assert_close(x.double(), y.double(), rtol=0, atol=2 * EPS[dtype] * y.abs().max())

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_repeats_are_bit_equal(self, fused, dtype):
        inputs = inputs_of(dtype, keys=400)
        for x, y in zip(step(inputs), step(inputs), strict=True):
            assert torch.equal(x, y)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_not_finite_stays_where_the_reference_has_it(self, fused, dtype):
        for where in range(3):
            for bad in (math.nan, math.inf, -math.inf):
                inputs = inputs_of(dtype)
                inputs[where][0, 3, 5] = bad
                ours = dnl_ext.disentangled_attention(*inputs)
                reference = dnl_ext.reference.disentangled_attention(*inputs)
                assert torch.equal(ours.isfinite(), reference.isfinite())

    @pytest.mark.parametrize(
        ("dtype", "width", "channels", "words"),
        [
            (torch.float64, 16, 16, "and float32 where TF32 is allowed; got float64"),
            (torch.float32, 257, 16, "at most 256 query channels, got 257"),
            (torch.bfloat16, 257, 16, "at most 256 query channels, got 257"),
            (torch.float16, 16, 0, "value channels"),
        ],
    )
    def test_refuses_what_it_cannot_take(self, fused, dtype, width, channels, words):
        with pytest.raises((NotImplementedError, RuntimeError), match=words):
            dnl_ext.disentangled_attention(*inputs_of(dtype, width=width, channels=channels))

    def test_float32_is_refused_where_tf32_is_not_allowed(self, fused, allow_tf32):
        allow_tf32(False)
        with pytest.raises((NotImplementedError, RuntimeError), match="got float32 without TF32"):
            dnl_ext.disentangled_attention(*inputs_of(torch.float32))

    def test_tf32_reaches_the_products_of_the_chain(self, emulated, allow_tf32):
        """What the library does on a GPU, the emulated route does too: the bar of the fused path rests on it."""
        inputs = inputs_of(torch.float32)
        exact = step(inputs)
        allow_tf32(True)
        rounded = step(inputs)
        assert not torch.equal(exact[0], rounded[0])
        torch.testing.assert_close(exact[0], rounded[0], rtol=0, atol=4 * EPS[torch.float32] * exact[0].abs().max())

    def test_old_gpu_and_unknown_path_are_refused(self, emulated, monkeypatch):
        inputs = inputs_of(torch.bfloat16)
        monkeypatch.setenv("DNL_EXT_CUDA_PATH", "fused")
        monkeypatch.setenv("DNL_EXT_EMULATED_GPU", "75,4")
        with pytest.raises((NotImplementedError, RuntimeError), match=r"compute capability 8.0 or later, got 7.5"):
            dnl_ext.disentangled_attention(*inputs)
        monkeypatch.setenv("DNL_EXT_CUDA_PATH", "fast")
        with pytest.raises(ValueError, match="DNL_EXT_CUDA_PATH: expected one of 'chain', 'fused', got 'fast'"):
            dnl_ext.disentangled_attention(*inputs)


def plan(dtype="bfloat16", batches=1, queries=16384, keys=16384, width=256, channels=512, **options):
    return dnl_ext._C.cuda_plan(dtype, batches, queries, keys, width, channels, **options)


class TestTf32:
    """The operators ask torch, by way of the Python module."""

    def test_both_settings_of_torch_are_read(self, allow_tf32):
        matmul = torch.backends.cuda.matmul
        for allowed in (True, False):
            allow_tf32(allowed)
            assert dnl_ext._C.tf32_allowed() is allowed
        if not hasattr(torch._C, "_get_fp32_precision_getter"):
            pytest.skip("this torch has the older setting alone")
        before = matmul.fp32_precision
        try:
            for precision in ("tf32", "ieee"):
                matmul.fp32_precision = precision  # reading allow_tf32 may raise from here on
                assert dnl_ext._C.tf32_allowed() is (precision == "tf32")
        finally:
            matmul.fp32_precision = before

    def test_is_asked_from_any_thread(self, allow_tf32):
        allow_tf32(True)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            assert all(pool.map(lambda _: dnl_ext._C.tf32_allowed(), range(100)))

    def test_decides_the_plan(self, monkeypatch, allow_tf32):
        monkeypatch.setenv("DNL_EXT_CUDA_PATH", "fused")
        allow_tf32(True)
        assert plan(dtype="float32")["path"] == "fused"
        assert plan(dtype="float32", backward=True)["path"] == "chain"
        allow_tf32(False)
        with pytest.raises(NotImplementedError, match="got float32 without TF32"):
            plan(dtype="float32")
        assert plan(dtype="float32", tf32=True)["path"] == "fused"
        with pytest.raises(NotImplementedError, match="got float64"):
            plan(dtype="float64", tf32=True)
        monkeypatch.delenv("DNL_EXT_CUDA_PATH")
        assert plan(dtype="float32", tf32=True)["path"] == "chain"

    @pytest.mark.parametrize("channel_first", [False, True])
    def test_tiles_fit(self, channel_first):
        """163 and 227 KiB hold tiles for every width; 99 KiB for those up to WIDTH_IN_99_KIB."""
        layout = dict.fromkeys(("query_channel_first", "key_channel_first", "value_channel_first"), channel_first)
        for capability, limit, widest in ((80, 163, 256), (90, 227, 256), (100, 227, 256), (89, 99, WIDTH_IN_99_KIB)):
            for width in (1, 16, 64, 100, 176, 256):
                for channels in (1, 64, 256, 512, 2048):
                    p = plan("float32", width=width, channels=channels, capability=capability, tf32=True, **layout)
                    if width > widest:
                        assert "no tile" in p["why"]
                        continue
                    assert 0 < p["shared_bytes"] <= 1024 * limit
                    assert p["slices"] * p["slice_channels"] >= channels > (p["slices"] - 1) * p["slice_channels"]


class TestPlan:
    def test_default_is_the_chain(self, monkeypatch):
        monkeypatch.delenv("DNL_EXT_CUDA_PATH", raising=False)
        for backward in (False, True):
            assert (
                plan(backward=backward)["path"] == "chain" and "nothing has measured" in plan(backward=backward)["why"]
            )
        assert "without TF32" in plan(dtype="float32", tf32=False)["why"]
        assert "at most 256" in plan(width=300)["why"]

    def test_advice_is_taken_where_nothing_is_asked_for(self, monkeypatch):
        monkeypatch.delenv("DNL_EXT_CUDA_PATH", raising=False)
        assert plan(advised="fused")["path"] == "fused" and plan(advised="chain")["path"] == "chain"
        assert plan(advised="fused", width=300)["path"] == "chain"  # it cannot run
        assert plan(advised="fused", dtype="float32", tf32=True, backward=True)["path"] == "chain"
        monkeypatch.setenv("DNL_EXT_CUDA_PATH", "chain")
        assert plan(advised="fused")["path"] == "chain" and plan(path="fused")["path"] == "fused"
        with pytest.raises(ValueError, match="advised: expected one of 'chain', 'fused', got 'fast'"):
            plan(advised="fast")

    @pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
    def test_gpus_that_are_too_old_are_refused(self, dtype):
        with pytest.raises(NotImplementedError, match=r"compute capability 8\.0 or later, got 7\.5"):
            plan(dtype=dtype, capability=75)

    def test_environment_forces_a_path(self, monkeypatch):
        for path in ("chain", "fused"):
            monkeypatch.setenv("DNL_EXT_CUDA_PATH", path)
            assert plan()["path"] == plan(backward=True)["path"] == path
        with pytest.raises(NotImplementedError, match="at most 256 query channels, got 300"):
            plan(width=300)
        assert plan(width=300, backward=True)["path"] == "fused"  # its map takes any width

    @pytest.mark.parametrize("capability", [80, 86, 87, 89, 90, 100, 103, 120])
    @pytest.mark.parametrize("channel_first", [False, True])
    def test_tiles_fit(self, capability, channel_first):
        """Every width has tiles that fit, and the widths of the official block have one slice up to Dv = 512."""
        limit = 1024 * {80: 163, 87: 163, 86: 99, 89: 99, 120: 99}.get(capability, 227)
        layout = dict.fromkeys(("query_channel_first", "key_channel_first", "value_channel_first"), channel_first)
        for width in (1, 16, 64, 100, 200, 256):
            for channels in (1, 64, 256, 512, 700, 2048):
                p = plan(width=width, channels=channels, capability=capability, **layout)
                assert 0 < p["shared_bytes"] <= limit
                assert p["slices"] * p["slice_channels"] >= channels > (p["slices"] - 1) * p["slice_channels"]
                assert p["slice_channels"] <= 512

    def test_official_widths(self):
        assert plan(channels=256)["fused_tile"] == (128, 64) and plan(channels=256)["slices"] == 1
        assert plan(channels=512)["fused_tile"] == (64, 64) and plan(channels=512)["slices"] == 1
        assert plan(channels=512, capability=89)["fused_tile"] == (64, 32)
        assert plan(channels=2048)["slices"] == 4

    def test_keys_are_split_where_queries_do_not_fill_the_chip(self):
        assert plan(queries=64 * 132, multiprocessors=132)["splits"] == 1
        assert plan(queries=1024, multiprocessors=132)["splits"] == 8
        assert plan(queries=1024, keys=64, multiprocessors=132)["splits"] == 1

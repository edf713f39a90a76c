"""The CUDA route of every operator: on a GPU where there is one, and emulated on the CPU.

Values and gradients are held to the bar of tests/accuracy.py, on random cases. What needs the real machine (streams,
graphs, large N, memory) is skipped without one. The emulation runs the same glue, drivers and kernels: see routes.py.
"""

import math

import accuracy
import cases
import pytest
import routes
import torch
from routes import OPERATORS, onto
from toolchain import needs_gpu

import dnl_ext

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


CASES, AT_ONCE = 2000, 100
EMULATED_SHORT, EMULATED_CASES, EMULATED_AT_ONCE = 20, 1000, 50


class Onto(torch.autograd.Function):
    """`onto`, for the tensor and for its gradient."""

    @staticmethod
    def forward(ctx, x, device):
        ctx.device = x.device
        return onto(x, device)

    @staticmethod
    def backward(ctx, grad):
        return onto(grad, ctx.device), None  # device


def on_gpu(op):
    """The fused operator `op` for CPU tensors, computed on the GPU."""
    function = getattr(dnl_ext, op)

    def call(*inputs, **options):
        return Onto.apply(function(*(Onto.apply(x, "cuda:0") for x in inputs), **options), "cpu")

    return call


def failures(seeds, route=lambda op: getattr(dnl_ext, op), **draw):
    """What is above the bar, case by case, so that one run shows all of it."""
    messages = []
    for seed in seeds:
        case = cases.random_case(seed, **draw)
        failed = accuracy.failures(case, route(case.op))
        if failed:
            messages.append(f"{case}\n  " + "\n  ".join(map(str, failed)))
    return messages


def report(messages):
    assert not messages, f"{len(messages)} cases failed\n" + "\n".join(messages)


def inputs_on(device, dtype, *, batch=(2,), queries=37, keys=45, width=16, channels=24, channel_first=False, seed=0):
    """query, key, value, mask_logits."""
    generator = torch.Generator().manual_seed(seed)

    def make(*shape):
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)
        return x.transpose(-2, -1).contiguous().transpose(-2, -1) if channel_first else x

    tensors = make(*batch, queries, width), make(*batch, keys, width), make(*batch, keys, channels)
    return *tensors, make(*batch, keys, 1)[..., 0]


def step(inputs, **options):
    """Output and gradients of one training step."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = dnl_ext.disentangled_attention(*leaves, **options)
    return output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output).cumsum(-1) / output.shape[-1])


class TestRegistration:
    @pytest.mark.skipif(not dnl_ext._C.build_info()["cuda"], reason="needs dnl_ext built with CUDA: make gpu-check")
    @pytest.mark.parametrize("name", OPERATORS)
    def test_every_operator_has_a_cuda_kernel(self, name):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dnl_ext::{name}", "CUDA")


class TestEmulated:
    def test_error_is_within_the_bar(self, emulated):
        report(failures(range(EMULATED_SHORT), large=0))

    @pytest.mark.slow
    @pytest.mark.parametrize("first", range(0, EMULATED_CASES, EMULATED_AT_ONCE))
    def test_error_is_within_the_bar_long_form(self, emulated, first):
        report(failures(range(first, first + EMULATED_AT_ONCE), large=0))

    def test_what_a_kernel_may_not_do_is_an_exception(self, emulated):
        routes.configure(max_threads=64)
        with pytest.raises(RuntimeError, match="the number of threads of a block is 256, expected 1 to 64"):
            dnl_ext.mean_subtract(torch.randn(5, 3))
        routes.configure()
        dnl_ext.mean_subtract(torch.randn(5, 3))

    @pytest.mark.slow
    def test_whitening_is_within_the_bar(self, emulated):
        report(failures(range(EMULATED_CASES // 4), op="whiten", large=0))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("positions", "batch"), [(40, 1), (97, 3), (1100, 1)])
    def test_a_call_allocates_its_results_and_one_workspace(self, emulated, dtype, positions, batch):
        """However many products and kernels it has; products cost neither a view nor a call of the dispatcher."""
        operators = torch.ops.dnl_cuda_emulated
        *qkv, mask = inputs_on("cpu", dtype, batch=(batch,), queries=positions, keys=positions, channel_first=True)

        def taken(results, workspaces):
            work = routes.take_host_work()
            assert (work.allocations, work.dispatcher_calls, work.views) == (len(results) + workspaces, 0, 0)
            return results

        routes.take_host_work()
        taken(operators.pairwise_forward(*qkv, None, 0.25, "channel", True), 1)
        results = taken(operators.pairwise_forward(*qkv, mask, 0.25, "channel", True), 2)  # pooling has one of its own
        grad = torch.randn_like(results[0])
        needs = (0.25, "channel", True, True, True, True)
        taken(operators.pairwise_backward(grad, *qkv, mask, *results, *needs), 1)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_empty_batch_and_no_queries(self, emulated, dtype):
        check_empty("cpu", dtype)

    def test_too_many_leading_dimensions_are_refused(self, emulated):
        x = torch.randn((2,) * 20)[(slice(None), 0) * 9]  # nine leading dimensions, none of which merge, then (2, 2)
        with pytest.raises(NotImplementedError, match="leading dimensions"):
            dnl_ext.mean_subtract(x)


def check_empty(device, dtype):
    for batch, queries in (((0,), 5), ((2, 0, 3), 5), ((2,), 0)):
        inputs = inputs_on(device, dtype, batch=batch, queries=queries)
        output, dq, dk, dv, dm = step(inputs)
        assert output.shape == (*batch, queries, 24)
        for grad, x in zip((dq, dk, dv, dm), inputs, strict=True):
            assert grad.shape == x.shape
            assert not grad.any()


@needs_gpu
class TestValues:
    @pytest.mark.parametrize("first", range(0, CASES, AT_ONCE))
    def test_error_is_within_the_bar(self, first):
        report(failures(range(first, first + AT_ONCE), on_gpu, large=0.1))

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("channel_first", [False, True])
    @pytest.mark.parametrize("sizes", [(2600, 72000, 64, 48), (2501, 70001, 24, 40)])
    def test_several_chunks(self, dtype, channel_first, sizes):
        """Maps of more than 512 MiB, odd numbers of queries and keys, on the GPU against float64 on the GPU."""
        queries, keys, width, channels = sizes
        inputs = inputs_on("cuda", dtype, batch=(1,), queries=queries, keys=keys, width=width, channels=channels,
                           channel_first=channel_first)  # fmt: skip
        assert_within_bar(inputs, dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("tf32", [False, True])
    def test_large_means(self, dtype, tf32, allow_tf32):
        """Centring comes before any rounding to TF32. The bar is the reference's error under the same setting."""
        allow_tf32(tf32)
        q, k, v, m = inputs_on("cuda", dtype, queries=512, keys=512, width=64, channels=64)
        assert_within_bar((q + 30, k + 30, v + 30, m), dtype)

    @pytest.mark.parametrize("channel_first", [False, True])
    @pytest.mark.parametrize(("width", "channels"), [(16, 48), (64, 256), (176, 300)])
    def test_tf32(self, width, channels, channel_first, allow_tf32):
        """float32 where TF32 is allowed, by either path; tails of every tile, and several slices."""
        allow_tf32(True)
        inputs = inputs_on("cuda", torch.float32, queries=523, keys=389, width=width, channels=channels,
                           channel_first=channel_first)  # fmt: skip
        assert_within_bar(inputs, torch.float32)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_empty_batch_and_no_queries(self, dtype):
        check_empty("cuda", dtype)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("where", range(4))
    def test_not_finite_stays_where_the_reference_has_it(self, dtype, bad, where):
        inputs = list(inputs_on("cuda", dtype))
        inputs[where][0, 3] = bad
        fused, reference = dnl_ext.disentangled_attention(*inputs), dnl_ext.reference.disentangled_attention(*inputs)
        assert torch.equal(fused.isfinite(), reference.isfinite())

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("needs", range(1, 16))
    def test_absent_gradients_change_no_other(self, dtype, needs):
        inputs = inputs_on("cuda", dtype)
        _, *complete = step(inputs)
        leaves = [x.detach().requires_grad_(bool(needs >> i & 1)) for i, x in enumerate(inputs)]
        output = dnl_ext.disentangled_attention(*leaves)
        wanted = [x for x in leaves if x.requires_grad]
        grads = iter(torch.autograd.grad(output, wanted, torch.ones_like(output).cumsum(-1) / output.shape[-1]))
        for x, whole in zip(leaves, complete, strict=True):
            if x.requires_grad:
                assert torch.equal(next(grads), whole)

    def test_output_has_the_layout_of_query(self):
        inputs = inputs_on("cuda", torch.float32, channel_first=True)
        output, dq, dk, dv, _ = step(inputs)
        assert output.stride(-2) == 1
        for grad, x in zip((dq, dk, dv), inputs, strict=False):
            assert grad.stride() == x.stride()


def assert_within_bar(inputs, dtype):
    """Fused against the reference, both on the GPU, in errors against float64 on the GPU."""

    def reference(tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        output = dnl_ext.reference.disentangled_attention(*leaves)
        seed = torch.ones_like(output).cumsum(-1) / output.shape[-1]
        return output.detach(), *torch.autograd.grad(output, leaves, seed)

    truth = reference([x.double() for x in inputs])
    ours, theirs = step(inputs), reference(inputs)
    if dtype == torch.float64:
        for x, t in zip(ours, truth, strict=True):
            assert (x - t).norm() <= 1e-11 * t.norm() + 1e-11
        return
    names = ("output", "query", "key", "value", "mask_logits")
    for name, x, y, t in zip(names, ours, theirs, truth, strict=True):
        bar = accuracy.BAR["output" if name == "output" else "gradient"]
        error, allowed = (x.double() - t).norm().item(), bar * (y.double() - t).norm().item()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@needs_gpu
class TestMachine:
    def test_non_default_stream_orders_with_it(self):
        """On a busy side stream nothing may run ahead on the default one."""
        inputs = inputs_on("cuda", torch.float32, queries=600, keys=600)
        expected = step(inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            late = [torch.full_like(x, math.nan) for x in inputs]
            torch.cuda._sleep(100_000_000)
            for x, y in zip(late, inputs, strict=True):
                x.copy_(y)
            got = step(late)
        stream.synchronize()
        for x, y in zip(got, expected, strict=True):
            assert torch.equal(x, y)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_cuda_graph(self, dtype):
        """Capture fails on a synchronisation or a copy from the host, and replay shows work on another stream."""
        inputs = inputs_on("cuda", dtype, batch=(2, 3), queries=300, keys=300)
        leaves = [x.clone().requires_grad_() for x in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())

        def run():
            output = dnl_ext.disentangled_attention(*leaves)
            return output, *torch.autograd.grad(output, leaves, torch.ones_like(output).cumsum(-1) / output.shape[-1])

        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run()
        fresh = inputs_on("cuda", dtype, batch=(2, 3), queries=300, keys=300, seed=1)
        with torch.no_grad():
            for x, y in zip(leaves, fresh, strict=True):
                x.copy_(y)
        graph.replay()
        torch.cuda.synchronize()
        for x, y in zip(captured, step(fresh), strict=True):
            assert torch.equal(x, y)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_repeats_are_bit_equal(self, dtype):
        for seed in range(20):
            n, m, d, c = 97 + 41 * seed, 131 + 29 * seed, 8 + 3 * seed, 16 + 5 * seed
            inputs = inputs_on("cuda", dtype, queries=n, keys=m, width=d, channels=c, seed=seed)
            first = step(inputs)
            for _ in range(12):
                for x, y in zip(step(inputs), first, strict=True):
                    assert torch.equal(x, y)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_more_than_2_to_31_pairs(self, dtype):
        """N * N > 2^31. Rows of the map are checked against float64 for a sample of queries and keys."""
        n = 50_000
        inputs = inputs_on("cuda", dtype, batch=(1,), queries=n, keys=n, width=8, channels=8)
        q, k, v, m = (x.double()[0] for x in inputs)
        output, dq, dk, dv, _ = step(inputs)
        grad = (torch.ones(1, n, 8, device="cuda", dtype=dtype).cumsum(-1) / 8).double()[0]
        q, k = q - q.mean(0), k - k.mean(0)
        u = m.softmax(0)
        pooled = u @ v
        rows = torch.tensor([0, 1, 21_474, 42_949, 42_950, n - 1], device="cuda")
        lse = torch.cat([(q[i : i + 2000] @ k.T / math.sqrt(8)).logsumexp(-1) for i in range(0, n, 2000)])
        p = (q[rows] @ k.T / math.sqrt(8) - lse[rows, None]).exp()
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(output[0, rows].double(), p @ v + pooled, rtol=tolerance, atol=tolerance)
        columns = (k[rows] @ q.T / math.sqrt(8) - lse).exp()  # P transposed
        expected = columns @ grad + u[rows, None] * grad.sum(0)
        torch.testing.assert_close(dv[0, rows].double(), expected, rtol=tolerance, atol=tolerance)
        assert dq.isfinite().all() and dk.isfinite().all()
        assert abs(dk.double().sum(1)).max() <= tolerance * n * dk.double().abs().mean()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_memory_is_linear(self, dtype):
        """Peak memory of a step beyond inputs and results: doubling N may double it, and a chunk's share is bounded."""

        def peak(n):
            inputs = inputs_on("cuda", dtype, batch=(1,), queries=n, keys=n, width=64, channels=64)
            step(inputs)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            results = step(inputs)
            torch.cuda.synchronize()
            kept = sum(x.numel() * x.element_size() for x in results)
            return torch.cuda.max_memory_allocated() - before - kept

        peaks = {n: peak(n) for n in (8192, 16384, 32768, 65536)}
        assert peaks[16384] <= 2.2 * peaks[8192]
        assert peaks[65536] <= 2.2 * peaks[32768]
        assert peaks[65536] <= 1.25 * 2**30, peaks  # two chunks of 512 MiB; four N x N maps in bfloat16 would be 34 GB

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_second_device(self):
        first = inputs_on("cuda:0", torch.float32)
        with torch.cuda.device(0):
            got = step([x.to("cuda:1") for x in first])
        for x, y in zip(got, step(first), strict=True):
            assert x.device.index == 1
            torch.testing.assert_close(x.cpu(), y.cpu())


class TestErrorsOfTorch:
    """What torch throws below an operator reaches Python with torch's type and text."""

    def call(self):
        q, k, v, m = (torch.randn(sizes) for sizes in ((5, 3), (7, 3), (7, 4), (7,)))
        return dnl_ext.disentangled_attention(q, k, v, m)

    def test_out_of_memory(self, emulated, monkeypatch):
        monkeypatch.setenv("DNL_EXT_EMULATED_FULL", "1")
        with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory\. Tried to allocate 2\.00 GiB"):
            self.call()

    def test_out_of_memory_in_a_backward(self, emulated, monkeypatch):
        q = torch.randn(5, 3, requires_grad=True)
        output = dnl_ext.pairwise_attention(q, torch.randn(7, 3), torch.randn(7, 4))
        monkeypatch.setenv("DNL_EXT_EMULATED_FULL", "1")
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
            output.sum().backward()

    def test_out_of_memory_for_a_copy_of_what_a_forward_saved(self, emulated, monkeypatch):
        stats = torch.zeros(5, 4)[:, ::2]
        q, k, v, dy = torch.zeros(5, 3), torch.zeros(7, 3), torch.zeros(7, 4), torch.zeros(5, 4)
        saved = (dy, stats, torch.zeros(0), torch.zeros(0), torch.zeros(0))
        monkeypatch.setenv("DNL_EXT_EMULATED_FULL", "1")
        with pytest.raises(torch.OutOfMemoryError):
            torch.ops.dnl_ext.pairwise_backward(dy, q, k, v, None, *saved, 1.0, None, True, True, True, False)

"""Hopper's kernels (DNL_EXT_CUDA_PATH=hopper) through the operators: emulated on the CPU, and on a GPU of compute
capability 9.0 where there is one. Random cases of the kernels themselves: tests/gates/hopper.cpp."""

import accuracy
import cases
import pytest
import routes
import torch
from toolchain import NO_GPU

import dnl_ext

DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=["emulated", "cuda"])
def hopper(request, monkeypatch):
    """dnl_ext on CPU tensors, by Hopper's kernels of a route."""
    if request.param == "cuda" and not (routes.HAS_GPU and "9.0a" in dnl_ext._C.build_info()["cuda_archs"]):
        pytest.skip(NO_GPU)
    if request.param == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    monkeypatch.setenv("DNL_EXT_CUDA_PATH", "hopper")
    monkeypatch.setenv("DNL_EXT_EMULATED_GPU", "90,3")
    with routes.route(request.param):
        yield


class TestError:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("layout", ["contiguous", "channel_first"])
    @pytest.mark.parametrize("sizes", [(72, 136, 40, 72), (129, 97, 64, 200), (1, 300, 7, 1)])
    def test_is_within_the_bar(self, hopper, dtype, layout, sizes):
        nq, nk, dqk, dv = sizes
        accuracy.check(cases.make_case(lead=(2,), nq=nq, nk=nk, dqk=dqk, dv=dv, dtype=dtype, layout=layout))


class TestPath:
    def test_differs_from_the_chain_in_roundings_only(self, hopper, monkeypatch):
        """That Hopper's kernels ran at all: equal bits would be the chain's."""
        inputs = [torch.randn(2, *shape).to(torch.bfloat16) for shape in ((70, 40), (90, 40), (90, 72), (90,))]
        ours = dnl_ext.disentangled_attention(*inputs)
        monkeypatch.setenv("DNL_EXT_CUDA_PATH", "chain")
        chain = dnl_ext.disentangled_attention(*inputs)
        assert not torch.equal(ours, chain)
        torch.testing.assert_close(ours.double(), chain.double(), rtol=0, atol=2.0**-5 * chain.abs().max())

    def test_repeats_are_bit_equal(self, hopper):
        inputs = [torch.randn(2, *shape).to(torch.bfloat16) for shape in ((140, 40), (200, 40), (200, 72), (200,))]

        def gradients():
            leaves = [x.detach().requires_grad_() for x in inputs]
            output = dnl_ext.disentangled_attention(*leaves)
            return torch.autograd.grad(output, leaves, torch.ones_like(output).cumsum(-1))

        for x, y in zip(gradients(), gradients(), strict=True):
            assert torch.equal(x, y)

    def test_refuses_what_it_cannot_take(self, hopper):
        x = torch.randn(1, 8, 4)
        with pytest.raises((NotImplementedError, RuntimeError), match="takes bfloat16 and float16, got float32"):
            dnl_ext.disentangled_attention(x, x, x, x[..., 0])


class TestPlan:
    @pytest.fixture(autouse=True)
    def asked_for(self, monkeypatch):
        monkeypatch.setenv("DNL_EXT_CUDA_PATH", "hopper")

    def plan(self, dtype="bfloat16", width=256, channels=512, capability=90, **options):
        options = {"hopper_built": True, "backward": True, **options}
        return dnl_ext._C.cuda_plan(dtype, 1, 16384, 16384, width, channels, capability=capability, **options)

    def test_types(self):
        for dtype in ("bfloat16", "float16"):
            assert self.plan(dtype)["path"] == "hopper" and self.plan(dtype)["why"] == "DNL_EXT_CUDA_PATH=hopper"

    def test_forward(self):
        for channels, slices in ((1, 1), (256, 1), (257, 2), (1024, 4)):
            plan = self.plan(channels=channels, backward=False, multiprocessors=132)
            assert plan["path"] == "hopper" and plan["slices"] == slices and plan["splits"] == 1
            assert plan["shared_bytes"] <= 227 * 1024

    def test_width_is_bounded_in_the_forward_alone(self):
        assert self.plan(width=300)["path"] == "hopper"
        with pytest.raises(NotImplementedError, match="at most 256 query channels, got 300"):
            self.plan(width=300, backward=False)

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"dtype": "float32"}, "got float32"),
            ({"dtype": "float64"}, "got float64"),
            ({"capability": 80}, "compute capability 9.0, got 8.0"),
            ({"capability": 100}, "compute capability 9.0, got 10.0"),
            ({"hopper_built": False}, "a build with 9.0a"),
            ({"channels": 0}, "got 256 and 0"),
            ({"width": 0}, "got 0 and 512"),
        ],
    )
    @pytest.mark.parametrize("backward", [False, True])
    def test_obstacles(self, options, words, backward):
        with pytest.raises(NotImplementedError, match=f"DNL_EXT_CUDA_PATH=hopper: .*{words}"):
            self.plan(backward=backward, **options)

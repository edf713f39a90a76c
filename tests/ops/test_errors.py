"""Wrong tensors raise, on both routes: another type, dtype, layout or device.

A fault replaces one argument of a valid call (calls.py). What reaches our checks names the argument, what was wanted
and what came. What torch itself refuses (a backend without a kernel, a value of no tensor type) is held to its type
alone.
Wrong shapes are in test_errors_of_shape.py, wrong options in test_errors_of_options.py.
"""

import pytest
import torch
from calls import CALLS, EVERY_CALL, call, expect, says, several, tensors, with_fault
from toolchain import TORCH, needs_kernels

import dnl_ext
from dnl_ext import _load
from dnl_ext._load import LEFT_OUT


class TestCallsThemselves:
    """Without a fault, every call of the table succeeds; a table of invalid calls would prove nothing."""

    @pytest.mark.parametrize(("route", "name"), EVERY_CALL)
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_succeed(self, route, name, device):
        call(route, name, CALLS[route](device)[name])


class TestNonTensors:
    @tensors
    def test_none_is_a_type_error(self, route, name, argument):
        if argument == "mask_logits" and name in ("disentangled_attention", "pairwise_forward", "pairwise_backward"):
            pytest.skip("None leaves the unary term out")
        arguments = with_fault(route, name, argument, lambda x: None)
        error = expect(TypeError, route, name, arguments)
        assert str(error).startswith(f"{argument}: expected a torch.Tensor, got None")

    @tensors
    @pytest.mark.parametrize("fault", [list, lambda x: x.numpy(), lambda x: 3, lambda x: 0.5, lambda x: "query"])
    def test_anything_else_is_refused(self, route, name, argument, fault):
        arguments = with_fault(route, name, argument, fault)
        if route == "public":  # torch's own schema check speaks on the other route
            expect(TypeError, route, name, arguments, match=rf"^{argument}: expected a torch\.Tensor, got ")
        else:
            expect((TypeError, RuntimeError), route, name, arguments, match=argument)


class TestDtypes:
    @tensors
    @pytest.mark.parametrize(
        "dtype",
        [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16],
    )
    def test_other_than_float_is_a_value_error(self, route, name, argument, dtype):
        arguments = with_fault(route, name, argument, lambda x: torch.zeros(x.shape, dtype=dtype))
        expect(ValueError, route, name, arguments, match=says(argument))

    @tensors
    @pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.complex32])
    def test_complex_is_not_implemented(self, route, name, argument, dtype):
        arguments = with_fault(route, name, argument, lambda x: torch.zeros(x.shape, dtype=dtype))
        expect(NotImplementedError, route, name, arguments, match=says(argument))

    @several
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("device", ["cpu", "meta"])
    def test_mixed_dtypes_are_a_value_error(self, route, name, argument, dtype, device):
        arguments = with_fault(route, name, argument, lambda x: x.to(dtype), device)
        # The first tensor sets the dtype, so a fault in it is found in the next one.
        expect(ValueError, route, name, arguments, match=r"^\w+: expected .*, got ")

    @tensors
    @pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
    def test_other_than_float_is_refused_on_meta_too(self, route, name, argument, dtype):
        arguments = with_fault(
            route, name, argument, lambda x: torch.zeros(x.shape, dtype=dtype, device="meta"), device="meta"
        )
        expect((ValueError, NotImplementedError), route, name, arguments)


@pytest.mark.filterwarnings("ignore")
class TestLayouts:
    KINDS = (
        ("sparse_coo", lambda x: x.to_sparse()),
        ("sparse_csr", lambda x: x.reshape(x.shape[0], -1).to_sparse_csr()),
        ("mkldnn", lambda x: x.contiguous().to_mkldnn()),
        ("quantized", lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)),
        ("nested", lambda x: torch.nested.nested_tensor(list(x))),
        ("jagged", lambda x: torch.nested.nested_tensor([torch.randn(3, 2), torch.randn(2, 2)], layout=torch.jagged)),
    )

    @tensors
    @pytest.mark.parametrize(("kind", "fault"), KINDS, ids=[kind for kind, _ in KINDS])
    def test_are_not_implemented(self, route, name, argument, kind, fault):
        arguments = with_fault(route, name, argument, fault)
        match = rf"^{argument}: expected a dense strided tensor, got a " if route == "public" else None
        expect(NotImplementedError, route, name, arguments, match=match)


class TestDevices:
    @several
    @pytest.mark.parametrize(("device", "other"), [("cpu", "meta"), ("meta", "cpu")])
    def test_mixed_are_a_value_error(self, route, name, argument, device, other):
        arguments = with_fault(route, name, argument, lambda x: torch.empty_like(x, device=other), device)
        error = expect(
            ValueError, route, name, arguments, match=r"^\w+: expected the device of \w+ \(|on the device of"
        )
        assert "cpu" in str(error) and "meta" in str(error)

    @pytest.mark.parametrize("route", ["public", "raw"])
    def test_one_tensor_on_the_meta_device_stays_there(self, route):
        (x, *_) = CALLS[route]("meta")["mean_subtract"].values()
        y = call(route, "mean_subtract", CALLS[route]("meta")["mean_subtract"])
        assert y.device.type == "meta" and y.shape == x.shape


def test_memory_that_there_is_not_is_refused_with_torch_s_own_words():
    """An output of 2^50 floats, of inputs that take no memory. Before 2.13 torch writes its words to stderr alone."""
    q = torch.zeros(1, 1).expand(2**40, 1)
    told = TORCH >= (2, 13) or LEFT_OUT  # without kernels it is torch that raises
    words = r"(?i)allocate .*memory" if told else r"allocating a tensor of shape \(1099511627776, 1024\).* failed"
    with pytest.raises(RuntimeError, match=words) as ours:
        dnl_ext.pairwise_attention(q, torch.zeros(3, 1), torch.zeros(3, 2**10), whiten=None)
    with pytest.raises(RuntimeError) as torchs:
        torch.empty(2**40, 2**10)
    assert type(ours.value) is type(torchs.value)


@needs_kernels
class TestRoutesToPython:
    """How errors get from the kernels to Python (csrc/core/python_errors.h), whichever this torch takes."""

    WRONG = ((torch.int64, ValueError), (torch.complex64, NotImplementedError))

    @pytest.fixture(autouse=True)
    def chosen(self):
        yield
        _load._route_errors()

    @pytest.mark.parametrize("route", ["registered", "pybind", "torch"])
    def test_one_keeps_types_and_all_keep_texts(self, route):
        _load._C.route_errors(route)
        keeps = route == "torch" if TORCH >= (2, 15) else route == "pybind"
        for dtype, error in self.WRONG:
            with pytest.raises((error, RuntimeError), match=r"^x: expected") as raised:
                torch.ops.dnl_ext.softmax(torch.zeros(3, dtype=dtype))
            assert not keeps or raised.type is error

    def test_the_chosen_one_keeps_types(self):
        _load._C.route_errors("torch" if TORCH < (2, 15) else "pybind")  # which does not
        _load._route_errors()
        for dtype, error in self.WRONG:
            with pytest.raises(error, match=r"^x: expected") as raised:
                torch.ops.dnl_ext.softmax(torch.zeros(3, dtype=dtype))
            assert raised.type is error

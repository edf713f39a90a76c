"""Every operator in plain PyTorch: dnl_ext/ops/plain.py. Without kernels, the tests of the operators pass."""

import math
import os
import pathlib
import subprocess
import sys

import accuracy
import cases
import pytest
import routes
import toolchain
import torch

from dnl_ext._load import LEFT_OUT, schemas
from dnl_ext.ops import _common, plain

TESTS = pathlib.Path(__file__).parents[1]
#: Operator by operator, and every one of them; the rest is long, or about processes of its own.
SHORT_FORM = ("ops", "--once", "--ignore=ops/test_memory.py", "--ignore=ops/test_second.py")


def run_python(*arguments, **environment):
    paths = [TESTS.parent, TESTS, TESTS / "ops", os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), **environment}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=TESTS, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


class TestSchemas:
    @pytest.mark.parametrize("schema", schemas(), ids=lambda schema: schema.split("(")[0])
    def test_what_is_registered_is_what_the_file_says(self, schema):
        """dnl_ext/schemas.inc: with kernels the compiled library registers it, without them Python does."""
        operator = getattr(torch.ops.dnl_ext, schema.split("(")[0]).default
        assert str(operator._schema) == f"dnl_ext::{schema}"

    def test_every_operator_has_one(self):
        assert {schema.split("(")[0] for schema in schemas()} == set(routes.OPERATORS)


@toolchain.needs_kernels
class TestWithoutKernels:
    """In processes of their own, with DNL_EXT_KERNELS=off, where `needs_kernels` leaves these tests out."""

    def test_operator_tests_pass(self):
        text = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", *SHORT_FORM, DNL_EXT_KERNELS="off")
        assert int(text.split(" passed")[0].split()[-1]) > 200

    @pytest.mark.slow
    def test_operator_tests_pass_long_form(self):
        run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "ops", DNL_EXT_KERNELS="off")

    def test_nothing_compiled_is_loaded(self):
        code = "import sys, dnl_ext, torch; assert 'dnl_ext._C' not in sys.modules\n"
        code += "assert not torch._C._dispatch_has_kernel_for_dispatch_key('dnl_ext::softmax', 'CPU')"
        run_python("-c", code, DNL_EXT_KERNELS="off")

    def test_it_warns_of_nothing_that_was_asked_for(self):
        code = "import warnings; warnings.simplefilter('error'); import dnl_ext, torch\n"
        run_python("-c", code + "dnl_ext.mean_subtract(torch.zeros(2, 3))", DNL_EXT_KERNELS="off")

    def test_other_values_are_refused(self):
        with pytest.raises(AssertionError, match="DNL_EXT_KERNELS: expected on or off, got 'of'"):
            run_python("-c", "import dnl_ext", DNL_EXT_KERNELS="of")


OTHER_DEVICE = """
import warnings
import accuracy, cases, routes, torch
torch.set_num_threads(1)
routes.load_other_device()
import dnl_ext
from dnl_ext import reference, show_config

q, k, v = (torch.randn(2, n, c).to("elsewhere") for n, c in ((5, 3), (7, 3), (7, 4)))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        assert dnl_ext.pairwise_attention(q, k, v).device.type == "elsewhere"
        dnl_ext.whiten(q, "ln")
(warning,) = caught
assert "plain PyTorch" in str(warning.message) and "elsewhere" in str(warning.message)

call = show_config(q, k, v)["call"]
assert call["path"].startswith("plain PyTorch") and call["why"] == "there are no kernels for elsewhere tensors"

try:
    dnl_ext.pairwise_attention(q, k.cpu(), v)
except ValueError as error:
    assert str(error) == "key: expected the device of query (elsewhere:0), got cpu"
else:
    raise AssertionError("mixed devices pass")

leaves = [x.clone().requires_grad_() for x in (q, k, v)]
on_cpu = [x.cpu().requires_grad_() for x in (q, k, v)]
for inputs, function in ((leaves, dnl_ext.pairwise_attention), (on_cpu, reference.pairwise_attention)):
    first = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), inputs)
    results = [x.detach().cpu() for x in (*first, *second)]
    if inputs is leaves:
        ours = results
torch.testing.assert_close(ours, results, rtol=1e-4, atol=1e-4)
torch.testing.assert_close(
    torch.func.vmap(dnl_ext.pairwise_attention)(q, k, v).cpu(), reference.pairwise_attention(*on_cpu)
)

with routes.route("elsewhere"):
    for seed in range(60):
        accuracy.check(cases.random_case(seed, large=0))
print("done")
"""


@toolchain.needs_kernels
@toolchain.needs_compiler
def test_a_device_that_has_no_kernels():
    """Every layout and type on a device of torch's that is not the CPU; one warning a process; named by show_config."""
    assert run_python("-c", OTHER_DEVICE).endswith("done\n")


@toolchain.needs_kernels
@toolchain.needs_compiler
def test_there_is_a_route_through_that_device():
    """A case on it fails where the operator is wrong there: the route above does lead through plain.py."""
    code = (
        "import routes, torch; routes.load_other_device(); import dnl_ext\n"
        "seen = []; mean = dnl_ext.ops.plain.mean\n"
        "dnl_ext.ops.plain.mean = lambda x, dims: seen.append(x.device.type) or mean(x, dims)\n"
        "with routes.route('elsewhere'):\n    y = dnl_ext.mean_subtract(torch.ones(2, 3))\n"
        "assert seen == ['elsewhere'] and y.device.type == 'cpu' and not y.any()\n"
    )
    run_python("-c", code)


class TestMean:
    """Where sums are of the type of their terms, as without float64, means are as good."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("offset", [0.0, 30.0, 1e4])
    def test_is_corrected(self, dtype, offset, monkeypatch):
        monkeypatch.setattr(_common, "WITHOUT_FLOAT64", ("cpu",) if dtype == torch.float32 else ())
        x = (torch.randn(100_003, dtype=torch.float64) + offset).to(dtype)
        exact = math.fsum(x.tolist()) / len(x)
        assert abs(plain.mean(x, 0).item() - exact) <= torch.finfo(dtype).eps * max(abs(exact), 1)

    def test_of_infinities_is_one(self, monkeypatch):
        monkeypatch.setattr(_common, "WITHOUT_FLOAT64", ("cpu",))
        x = torch.tensor([[1.0, torch.inf, -torch.inf, torch.nan], [2.0, 3.0, 4.0, 5.0]])
        assert plain.mean(x, 0).tolist()[0][:3] == [1.5, torch.inf, -torch.inf]
        assert plain.mean(x, 0)[0, 3].isnan()


@pytest.mark.skipif(not LEFT_OUT, reason="about what runs without kernels: test_operator_tests_pass")
@pytest.mark.parametrize("seed", range(20))
def test_a_device_without_float64_is_within_the_bar(seed, monkeypatch):
    monkeypatch.setattr(_common, "WITHOUT_FLOAT64", ("cpu",))
    accuracy.check(cases.random_case(seed, dtype=cases.DTYPES[1 + seed % 3], large=0))

"""ONNX by the shipped decompositions, run by onnxruntime on the CPU: any batch and any N, errors as in accuracy.py."""

import copy

import pytest
import torch
from accuracy import BAR, distance
from blocks import BLOCKS, dimensions, make_input, scramble
from cases import ARGUMENTS
from inputs import function, make
from test_export import SPATIAL, VARIANTS, export_block, export_function
from toolchain import needs_onnx

import dnl_ext

every_op = pytest.mark.parametrize("op", ARGUMENTS)

pytestmark = [needs_onnx, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]


def session_of(program):
    """An onnxruntime session for an exported program."""
    import onnxruntime

    plain = program.run_decompositions(dnl_ext.export.decompositions())
    model = torch.onnx.export(plain, (), dynamo=True, verbose=False).model_proto
    domains = {node.domain for node in model.graph.node}
    assert domains <= {"", "ai.onnx"}, f"operators of other domains: {domains}"
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def run_session(session, *inputs):
    names = [x.name for x in session.get_inputs()]
    (output,) = session.run(None, {name: x.detach().numpy() for name, x in zip(names, inputs, strict=True)})
    return torch.from_numpy(output)


def assert_within_the_bar(actual, plain, truth):
    """At most BAR times the error of plain PyTorch in the same dtype."""
    assert actual.shape == truth.shape and actual.dtype == plain.dtype
    error, reference = distance(actual, truth), distance(plain, truth)
    assert error <= BAR["output"] * reference, f"error {error}, plain PyTorch {reference}"


class TestFunctions:
    @every_op
    def test_three_sizes(self, op):
        session = session_of(export_function(op, torch.float32))
        for batch, queries, keys in ((2, 6, 7), (5, 41, 33), (1, 90, 70)):
            inputs = make(op, lead=(batch,), nq=queries, nk=keys, dtype=torch.float32)
            plain = function(op, dnl_ext.reference)(*inputs)
            truth = function(op, dnl_ext.reference)(*(x.double() for x in inputs))
            assert_within_the_bar(run_session(session, *inputs), plain, truth)


class TestBlocks:
    def compare(self, block, dims):
        """The bar is on all three sizes together: of the smallest, 32 numbers, plain PyTorch may be right by luck."""
        block = scramble(block).eval()
        plain, wide = (copy.deepcopy(block) for _ in range(2))
        plain.backend = wide.backend = "reference"
        wide.double()
        results = []
        with torch.no_grad():
            session = session_of(export_block(block, dims, torch.float32))
            for batch, spatial in zip((2, 3, 1), SPATIAL[dims], strict=True):
                x = make_input(dims, batch=batch, spatial=spatial, dtype=torch.float32).detach()
                results.append((run_session(session, x), plain(x), wide(x.double())))
                torch.testing.assert_close(*results[-1][:2], rtol=1e-5, atol=1e-5)
        assert_within_the_bar(*(torch.cat([x.flatten() for x in column]) for column in zip(*results, strict=True)))

    def test_three_sizes(self):
        self.compare(BLOCKS[2].mmseg(8, reduction=2), 2)

    @pytest.mark.slow
    @dimensions
    def test_three_sizes_of_every_dimension(self, dims):
        self.compare(BLOCKS[dims](8), dims)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", [name for name in VARIANTS if name != "concatenation"])
    def test_three_sizes_of_variants(self, name):
        self.compare(VARIANTS[name](), 2)

    def test_concatenation_has_no_translation(self):
        """torch translates no searchsorted: what docs/pytorch.md says does not work."""
        with pytest.raises(torch.onnx.OnnxExporterError, match="searchsorted"):
            self.compare(VARIANTS["concatenation"](), 2)

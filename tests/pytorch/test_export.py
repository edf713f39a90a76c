"""torch.export with dynamic sizes, programs saved and loaded, AOTInductor packages in Python and in a C++ program."""

import copy
import io
import pathlib
import runpy
import subprocess
import sys

import pytest
import torch
from blocks import BLOCKS, dimensions, make_input, run, scramble
from cases import ARGUMENTS, ATTENTION
from inputs import function, make
from toolchain import CMAKE, TORCH, needs_aot, needs_binutils, needs_cmake, needs_compiler
from torch.export import Dim

import dnl_ext
from dnl_ext.modules import GlobalContext2d, NonLocal2d, SimplifiedNonLocal2d

every_op = pytest.mark.parametrize("op", ARGUMENTS)

ROOT = pathlib.Path(__file__).parents[2]
SPATIAL = {1: ((11,), (17,), (3,)), 2: ((5, 6), (9, 4), (2, 2)), 3: ((4, 5, 3), (2, 2, 5), (3, 4, 2))}
AXES = ("batch", None, "depth", "height", "width")
VARIANTS = {
    **{name: (lambda name=name: BLOCKS[2](8, variant=name)) for name in ("nl", "pairwise", "unary", "dnl_shared_key")},
    **{name: (lambda name=name: BLOCKS[2](8, whiten=name)) for name in ("spatial", "ln", "fln", "in", "bn")},
    "official": lambda: BLOCKS[2].official(8),
    "gaussian": lambda: NonLocal2d(8, mode="gaussian"),
    "dot product": lambda: NonLocal2d(8, mode="dot_product"),
    "concatenation": lambda: NonLocal2d(8, mode="concatenation"),
    "context": lambda: GlobalContext2d(8, ratio=0.5),
    "simplified": lambda: SimplifiedNonLocal2d(8),
}


class Call(torch.nn.Module):
    """A function as a module, which torch.export wants."""

    def __init__(self, f, **options):
        super().__init__()
        self.f, self.options = f, options

    def forward(self, *x):
        return self.f(*x, **self.options)


def export_block(block, dims, dtype=torch.float64):
    """A block for any batch and any spatial size."""
    x = make_input(dims, batch=2, spatial=SPATIAL[dims][0], dtype=dtype).detach()
    # Torch 2.10 wants to know that the length times the channels of a Conv1d is below 2^31.
    bound = {"max": 2**28 - 1} if dims == 1 and TORCH == (2, 10) else {}
    sizes = {0: Dim(AXES[0])} | {axis: Dim(AXES[axis], **bound) for axis in range(2, dims + 2)}
    return torch.export.export(block, (x,), dynamic_shapes=(sizes,))


def export_function(op, dtype=torch.float64, **options):
    """A function for any batch, Nq and Nk."""
    inputs = make(op, nq=6, nk=7, dtype=dtype)
    batch, queries, keys = Dim("batch"), Dim("queries"), Dim("keys")
    sizes = tuple({0: batch, 1: queries if name in ("query", "x") else keys} for name in ARGUMENTS[op])
    return torch.export.export(Call(function(op), **options), tuple(inputs), dynamic_shapes=(sizes,))


class TestFunctions:
    @every_op
    def test_dynamic_sizes(self, op):
        for options in ({}, {"scale": 0.3, "whiten": "ln"}) if op in ATTENTION else ({},):
            exported = export_function(op, **options).module()
            for batch, queries, keys in ((2, 6, 7), (5, 11, 3), (1, 1, 1)):
                inputs = make(op, lead=(batch,), nq=queries, nk=keys)
                assert torch.equal(exported(*inputs), function(op)(*inputs, **options))


class TestBlocks:
    def compare(self, block, dims):
        """The exported program in inference and in training: output and gradients of input and parameters."""
        block = scramble(block.double()).eval()
        exported = export_block(copy.deepcopy(block), dims).module()
        for batch, spatial in zip((2, 3, 1), SPATIAL[dims], strict=True):
            x = make_input(dims, batch=batch, spatial=spatial)
            (y, dx, grads), (y_expected, dx_expected, grads_expected) = run(exported, x), run(block, x)
            torch.testing.assert_close(y, y_expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(dx, dx_expected, rtol=1e-11, atol=1e-11)
            for name, grad in grads_expected.items():
                torch.testing.assert_close(grads[name], grad, rtol=1e-11, atol=1e-11)

    @dimensions
    def test_dynamic_sizes(self, dims):
        self.compare(BLOCKS[dims](8), dims)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", VARIANTS)
    def test_dynamic_sizes_of_variants(self, name):
        self.compare(VARIANTS[name](), 2)

    def test_saved_and_loaded_by_a_process_that_imports_and_does_nothing_else(self, tmp_path):
        block = scramble(BLOCKS[2](8)).eval()
        torch.export.save(export_block(block, 2, torch.float32), tmp_path / "block.pt2")
        x = make_input(2, spatial=(7, 3), dtype=torch.float32)
        y, dx, _ = run(block, x)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).float()
        torch.save([x.detach(), y, grad, dx], tmp_path / "case.pt")
        code = """
import sys, torch, dnl_ext
module = torch.export.load(sys.argv[1] + "/block.pt2").module()
x, expected, grad, dx = torch.load(sys.argv[1] + "/case.pt")
y = module(x.requires_grad_())
y.backward(grad)
torch.testing.assert_close(y.detach(), expected)
torch.testing.assert_close(x.grad, dx)
"""
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT)

    def test_in_inference_a_program_keeps_no_residual(self):
        """Exported under no_grad, a 16-bit program does not compute what only a backward reads."""
        for mode, expected in ((torch.enable_grad(), True), (torch.no_grad(), False)):
            with mode:
                program = export_block(scramble(BLOCKS[2](8)).to(torch.bfloat16), 2, torch.bfloat16)
            (node,) = (n for n in program.graph.nodes if n.target is torch.ops.dnl_ext.pairwise_forward.default)
            assert node.args[-1] is expected


@needs_compiler
@needs_aot
class TestAOTInductor:
    @pytest.mark.parametrize("name", ["mmseg", *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS)])
    def test_package(self, name, tmp_path):
        block = scramble(BLOCKS[2].mmseg(8, reduction=2) if name == "mmseg" else VARIANTS[name]()).eval()
        with torch.no_grad():
            program = export_block(copy.deepcopy(block), 2, torch.float32)
            path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "block.pt2"))
            package = torch._inductor.aoti_load_package(path)
            for batch, spatial in zip((2, 3, 1), SPATIAL[2], strict=True):
                x = make_input(2, batch=batch, spatial=spatial, dtype=torch.float32)
                torch.testing.assert_close(package(x), block(x), rtol=1e-5, atol=1e-5)


class TestLibrary:
    @needs_binutils
    def test_loads_without_python(self):
        """It leaves no symbol of Python's C interface open, and nothing is loaded that would bring one."""
        path = dnl_ext.export.library()
        assert path.is_file() and path.name == "libdnl_ext.so"
        undefined = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True)
        assert not [line for line in undefined.stdout.split() if line.startswith(("Py", "_Py"))]
        needed = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
        assert "libtorch_cpu" in needed and "python" not in needed

    @needs_compiler
    @needs_aot
    @needs_cmake
    @pytest.mark.slow
    def test_cpp_program(self, tmp_path):
        """examples/cpp: exported, compiled, built with CMake, run on sizes other than the exported one."""
        runpy.run_path(str(ROOT / "examples/cpp/export.py"))["write"](tmp_path)
        prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
        subprocess.run([CMAKE, "-S", ROOT / "examples/cpp", "-B", tmp_path, prefix], check=True)
        subprocess.run([CMAKE, "--build", tmp_path], check=True)
        program = [tmp_path / "run_block", dnl_ext.export.library(), tmp_path / "block.pt2"]
        subprocess.run([*program, tmp_path / "cases.pt"], check=True)
        cases = torch.load(tmp_path / "cases.pt")
        cases[1][1][0, 0, 0, 0] += 0.01 * cases[1][1].abs().max()
        torch.save(cases, tmp_path / "wrong.pt")
        assert subprocess.run([*program, tmp_path / "wrong.pt"]).returncode == 1


class TestDecompositions:
    CALLS = (
        ("mean_subtract", lambda q, k, v, m: (q, -2)),
        ("softmax", lambda q, k, v, m: (k,)),
        ("unary_forward", lambda q, k, v, m: (m, v)),
        *(
            ("whiten_forward", lambda q, k, v, m, name=name: (q, name, 1, 1e-5))
            for name in dnl_ext.reference.WHITEN_NAMES[:-1]
        ),
        *(
            ("pairwise_forward", lambda q, k, v, m, o=o: (q, k, v, m if o[0] else None, 0.4, o[1], o[2]))
            for o in ((True, "channel", False), (False, None, False), (True, None, True))
        ),
    )

    @pytest.mark.parametrize(("name", "arguments"), CALLS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("layout", ["contiguous", "channel_first"])
    def test_have_the_results_of_the_operator(self, name, arguments, dtype, layout):
        """Every result: values, shapes, strides, types. In bfloat16 the values are the exact ones, rounded once."""
        operator = getattr(torch.ops.dnl_ext, name).default
        call = arguments(*make("disentangled_attention", lead=(2, 3), dtype=dtype, layout=layout))
        wide = [x.double() if isinstance(x, torch.Tensor) else x for x in call]
        results = (dnl_ext.export.decompositions()[operator](*call), operator(*call), operator(*wide))
        results = ((x,) if isinstance(x, torch.Tensor) else x for x in results)
        close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2**-8, "atol": 1e-6}
        for i, (actual, expected, truth) in enumerate(zip(*results, strict=True)):
            for attribute in ("shape", "dtype"):
                assert getattr(actual, attribute) == getattr(expected, attribute)
            assert actual.stride() == expected.stride()
            if name == "pairwise_forward" and i in (1, 2):  # softmax_stats and residual: of one route's own
                assert actual.isnan().all()
            else:
                torch.testing.assert_close(actual.double(), truth, **close)

    @pytest.mark.parametrize(
        "name",
        [
            "pairwise",
            "ln",
            *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if name not in ("pairwise", "ln")),
        ],
    )
    def test_leave_no_operator(self, name):
        program = export_block(VARIANTS[name]().double().eval(), 2)
        program = program.run_decompositions(dnl_ext.export.decompositions())
        targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert targets and not [target for target in targets if "dnl_ext" in target]

    def test_survive_saving(self):
        """The decomposed program needs this library no more."""
        block = scramble(BLOCKS[2](8).double()).eval()
        program = export_block(block, 2).run_decompositions(dnl_ext.export.decompositions())
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        x = make_input(2, spatial=(3, 7))
        torch.testing.assert_close(torch.export.load(file).module()(x), block(x), rtol=1e-10, atol=1e-10)

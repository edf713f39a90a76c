"""What the sources of the CUDA route promise: one place that launches, kernels that compile without torch, assembly in
one kind of file, and nothing whose order of sums could differ between runs."""

import pathlib
import re

import pytest

CSRC = pathlib.Path(__file__).parents[2] / "csrc"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".cu", ".cuh", ".h", ".cpp"))
KERNELS = [path for path in SOURCES if path.suffix == ".cuh"]
LAUNCHER = "launch.h"
HEADERS_WITH_TORCH = re.compile(r'#include\s*[<"](torch|ATen|c10)/|#include "core/operator.h"')


def code(path):
    """The text of a file without comments."""
    text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
    return re.sub(r"//[^\n]*", "", text)


def name(path):
    return str(path.relative_to(CSRC))


def global_functions(text):
    """(name, attributes) of each __global__ function."""
    found = []
    for match in re.finditer(r"__global__\s+void\s*", text):
        head = text[match.end() : match.end() + 300]
        bounds = re.match(r"__launch_bounds__\(([^()]|\([^()]*\))*\)\s*", head)
        found.append((re.match(r"\w+", head[bounds.end() if bounds else 0 :])[0], bounds is not None))
    return found


def launches(text):
    return re.findall(r"<<<|cudaLaunchKernel|cuLaunchKernel|cudaLaunchCooperativeKernel", text)


def float_atomics(text):
    """Atomic additions: integers would be harmless, but no kernel needs those either."""
    return re.findall(r"\batomic(?:Add|CAS|Exch|Max|Min|Sub)\w*\b|\bred\.\w|\batom\.\w", text)


def assembly(text):
    return re.findall(r"\basm\b", text)


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_only_one_file_launches(path):
    assert bool(launches(code(path))) == (path.name == LAUNCHER)


def test_the_launcher_guards_checks_and_uses_the_current_stream():
    text = code(CSRC / "core/cuda" / LAUNCHER)
    steps = ["guard_(index_)", "stream_(current_stream(index_))", "shape.blocks == 0", "<<<", "stream_>>>"]
    steps += ["cudaGetLastError", "get_current_cuda_stream(index, ", "DeviceGuard guard_;"]
    places = [text.find(step) for step in steps]
    assert min(places) >= 0 and places == sorted(places), dict(zip(steps, places, strict=True))
    assert len(launches(text)) == 1


@pytest.mark.parametrize("path", KERNELS, ids=name)
def test_kernel_files_know_no_torch(path):
    assert not HEADERS_WITH_TORCH.search(code(path))


@pytest.mark.parametrize("path", [path for path in SOURCES if "__global__" in code(path)], ids=name)
def test_every_kernel_has_launch_bounds(path):
    functions = global_functions(code(path))
    assert len(functions) == code(path).count("__global__")
    assert not [kernel for kernel, bounded in functions if not bounded]


# Of the GPU; of the one CPU unit without functions that take a parameter; of products whose sums compilers move.
ASSEMBLY = re.compile(r"ptx.*|amx\.h|neon\.h")


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_assembly_is_in_few_files(path):
    assert ASSEMBLY.fullmatch(path.name) or not assembly(code(path))


@pytest.mark.parametrize("path", [path for path in KERNELS if not path.name.startswith("ptx")], ids=name)
def test_no_atomics_where_bits_repeat(path):
    """Every operator promises equal bits for equal inputs, and atomic additions come in any order."""
    assert not float_atomics(code(path))


class TestTheLintItself:
    """Each rule finds what it forbids."""

    def test_launch(self):
        assert launches("kernel<<<1, 2>>>(x);") and launches("cudaLaunchKernel(f)") and not launches("a << b")

    def test_bounds(self):
        assert global_functions("__global__ void f(int x)") == [("f", False)]
        assert global_functions("__global__ void __launch_bounds__(kThreads, 1)\n f(int x)") == [("f", True)]
        assert global_functions("__global__ void __launch_bounds__(min(a, b)) g()") == [("g", True)]

    def test_torch(self):
        assert HEADERS_WITH_TORCH.search("#include <torch/csrc/stable/ops.h>")
        assert not HEADERS_WITH_TORCH.search('#include "core/types.h"')

    def test_assembly_and_atomics(self):
        assert assembly('asm volatile("bar.sync");') and not assembly("assembly")
        assert float_atomics("atomicAdd(&x, 1.0f)") and float_atomics('"red.global.add"') and not float_atomics("red")

"""How far the model is off on published kernels with published speeds (calibration.json).

Needs a folder with checkouts of github.com/Dao-AILab/flash-attention and github.com/NVIDIA/cutlass, nvcc, and some
minutes: the kernels are compiled from there, nothing of them is kept. Forward without mask, bfloat16, sequences of
16,384, hidden size 2,048 (heads = 2,048 / width), as the papers measured.
"""

import json
import pathlib
import subprocess
from dataclasses import dataclass

import compilers

from . import bounds, flow, interpret, kernels, launches, machine, sass, simulate, units

RESULTS = pathlib.Path(__file__).parent / "calibration.json"
POSITIONS, HIDDEN = 16384, 2048
SHORT, LONG = 4, 8
FA2 = "Dao, FlashAttention-2, arXiv:2307.08691"
FA3 = "Shah et al., FlashAttention-3, arXiv:2407.08608"


@dataclass(frozen=True)
class Published:
    name: str
    gpu: str
    arch: str
    width: int
    rows: int  # queries of a tile
    keys: int
    warps: int
    speed: float  # TFLOP/s
    source: str


KERNELS = (
    Published("FlashAttention-2", "A100", "8.0", 128, 128, 64, 4, 225, FA2),
    Published("FlashAttention-2", "H100", "9.0", 256, 64, 64, 4, 326, FA3),
    Published("FlashAttention-3", "H100", "9.0a", 256, 128, 80, 8, 756, FA3),
)

# What FlashAttention-2 includes of torch for dropout, which is off.
PHILOX = {
    "ATen/cuda/PhiloxCudaState.h": "#pragma once\n#include <cstdint>\n"
    "namespace at { struct PhiloxCudaState { uint64_t seed; }; }\n",
    "ATen/cuda/detail/UnpackRaw.cuh": "#pragma once\n#include <ATen/cuda/PhiloxCudaState.h>\n#include <tuple>\n"
    "namespace at::cuda::philox { __host__ __device__ inline std::tuple<uint64_t, uint64_t> unpack(PhiloxCudaState s)"
    " { return {s.seed, 0}; } }\n",
}
FA2_KERNEL = """#include <cuda_bf16.h>
#include "namespace_config.h"
#include "static_switch.h"
#include "flash.h"
#include "flash_fwd_kernel.h"
using Traits = Flash_fwd_kernel_traits<{width}, {rows}, {keys}, {warps}, false, false, cutlass::bfloat16_t>;
__global__ void published(__grid_constant__ const flash::Flash_fwd_params params) {{
  flash::compute_attn<Traits, false, false, false, false, {even}, true, false, false>(params);
}}
"""
FA2_PARAMETERS = """#include <cuda_runtime_api.h>
#include <cstdio>
#include <cstdlib>
#include "namespace_config.h"
#include "flash.h"
int main(int, char** argv) {{
  flash::Flash_fwd_params p{{}};
  const long width = {width}, queries = POSITIONS, keys = atol(argv[1]), heads = HIDDEN / width;
  p.q_ptr = p.k_ptr = p.v_ptr = p.o_ptr = p.softmax_lse_ptr = reinterpret_cast<void*>(1l << 40);
  p.q_row_stride = p.k_row_stride = p.v_row_stride = p.o_row_stride = heads * width;
  p.q_head_stride = p.k_head_stride = p.v_head_stride = p.o_head_stride = width;
  p.h = p.h_k = heads, p.h_h_k_ratio = 1, p.b = 1, p.d = p.d_rounded = width;
  p.seqlen_q = p.seqlen_q_rounded = queries, p.seqlen_k = p.seqlen_k_rounded = keys;
  p.scale_softmax = p.scale_softmax_log2 = 0.1f, p.rp_dropout = 1, p.window_size_left = p.window_size_right = -1;
  p.is_bf16 = true;
  for (size_t i = 0; i < sizeof p; ++i) std::printf("%02x", reinterpret_cast<unsigned char*>(&p)[i]);
}}
"""
FA3_KERNEL = """#include "flash_fwd_launch_template.h"
using Element = cutlass::bfloat16_t;
template void run_flash_fwd<90, {width}, {width}, 2, Element, Element, false, false, false, false, false, false, false,
                            false, false, false>(Flash_fwd_params&, cudaStream_t);
"""
FLAGS = ["-std=c++17", "-O3", "-cubin", "--expt-relaxed-constexpr", "--expt-extended-lambda", "--use_fast_math", "-w"]
FLAGS += ["-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__"]


def commits(folder):
    """{checkout: its commit}."""
    found = {}
    for name in ("flash-attention", "cutlass"):
        command = ["git", "-C", folder / name, "rev-parse", "HEAD"]
        found[name] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()[:12]
    return found


def compile_published(kernel, folder, nvcc, out):
    """The cubin of a published kernel, compiled from `folder`."""
    flash, cutlass = folder / "flash-attention", folder / "cutlass/include"
    out.mkdir(parents=True, exist_ok=True)
    for name, text in PHILOX.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    second = kernel.name.endswith("2")
    source = flash / ("csrc/flash_attn/src" if second else "hopper")
    sizes = {"width": kernel.width, "rows": kernel.rows, "keys": kernel.keys, "warps": kernel.warps}
    stem = "-".join([kernel.name[-1], kernel.arch, str(kernel.width), *commits(folder).values()])
    if (out / f"{stem}.cubin").exists():
        return out / f"{stem}.cubin"
    text = (FA2_KERNEL if second else FA3_KERNEL).format(**sizes, even=str(kernel.width <= 128).lower())
    (out / f"{stem}.cu").write_text(text)
    number = kernel.arch.replace(".", "")
    flags = [*FLAGS, f"-gencode=arch=compute_{number},code=sm_{number}", f"-I{source}", f"-I{cutlass}", f"-I{out}"]
    if not second:
        flags += ["-DNDEBUG", "-DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED", "-DCUTLASS_ENABLE_GDC_FOR_SM90"]
    subprocess.run([nvcc, *flags, out / f"{stem}.cu", "-o", out / f"{stem}.cubin"], check=True)
    return out / f"{stem}.cubin"


def second_parameters(kernel, folder, nvcc, out, tiles):
    """Launch parameters of FlashAttention-2 over so many tiles of keys."""
    source = FA2_PARAMETERS.replace("POSITIONS", str(POSITIONS)).replace("HIDDEN", str(HIDDEN))
    (out / "parameters.cpp").write_text(source.format(width=kernel.width))
    includes = [f"-I{folder}/flash-attention/csrc/flash_attn/src", f"-I{pathlib.Path(nvcc).parents[1]}/include"]
    command = [
        *compilers.find("plain"),
        "-std=c++17",
        "-w",
        *includes,
        out / "parameters.cpp",
        "-o",
        out / "parameters",
    ]
    subprocess.run(command, check=True)
    done = subprocess.run([out / "parameters", str(tiles * kernel.keys)], capture_output=True, text=True, check=True)
    return bytes.fromhex(done.stdout)


def model_second(kernel, cubin, device, parameters):
    """(Tile, blocks of a multiprocessor): its trace is run with real parameters."""
    code = kernels.Code([cubin], kernel.arch)
    (name,) = code.functions
    shared = (kernel.rows + 2 * kernel.keys) * kernel.width * 2
    blocks = POSITIONS // kernel.rows
    runs = []
    for tiles in (SHORT, LONG):
        launch = interpret.Launch(blocks, 32 * kernel.warps, shared, parameters(tiles))
        resident = code.resident(name, launch)
        runs.append(launches.simulate_blocks(code.program(name), device, launch, resident))
    return launches.tile_of(*runs, (SHORT, LONG), resident * kernel.warps), resident


def model_third(kernel, cubin, device):
    """(Tile, 1): the loop of the product warps is walked, and its data are always there."""
    (code,) = sass.disassemble(cubin).values()
    inner = [x for x in flow.loops_of(code) if any(units.class_of(i) == "wgmma" for i in code[x.first : x.last + 1])]
    loop = max(inner, key=lambda x: (x.depth, x.last - x.first))
    path = flow.walk(code, loop, {})
    steps = [(units.timing_of(code[i], i, device), None) for i in path]
    runs = [simulate.Multiprocessor(device).run([[steps * n] * kernel.warps]) for n in (SHORT, LONG)]
    return launches.tile_of(*runs, (SHORT, LONG), kernel.warps), 1


def modelled_speed(kernel, device, tile, resident):
    """TFLOP/s of a whole call of the papers' sizes."""
    heads = HIDDEN // kernel.width
    full, last = launches.waves(POSITIONS // kernel.rows * heads, device, resident)
    rounds = full + last / resident
    cycles = rounds * (max(0.0, tile.fixed) + tile.cycles * POSITIONS / kernel.keys)
    flops = 4 * POSITIONS**2 * kernel.width * heads
    return min(device.sustained, flops / (cycles / (device.clock * 1e9)) / 1e12)


def calibrate(folder, nvcc):
    """Compiles and models KERNELS; a list of dictionaries, as calibration.json holds it."""
    folder, out, rows = pathlib.Path(folder), kernels.BUILD / "published", []
    for kernel in KERNELS:
        cubin = compile_published(kernel, folder, nvcc, out)
        device = machine.MACHINES[kernel.arch]
        if kernel.name.endswith("2"):
            tile, resident = model_second(
                kernel, cubin, device, lambda tiles, k=kernel: second_parameters(k, folder, nvcc, out, tiles)
            )
        else:
            tile, resident = model_third(kernel, cubin, device)
        speed = modelled_speed(kernel, device, tile, resident)
        rows.append(
            {
                "kernel": kernel.name,
                "gpu": kernel.gpu,
                "arch": kernel.arch,
                "width": kernel.width,
                "tile": [kernel.rows, kernel.keys],
                "source": kernel.source,
                "commits": commits(folder),
                "published": kernel.speed,
                "modelled": round(speed),
                "off": round(speed / kernel.speed - 1, 3),
                "instructions": round(tile.instructions),
                "cycles": round(tile.cycles),
                "bound": bounds.bound(tile.result),
            }
        )
    return rows


def write(rows):
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


def read():
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []

"""What a multiprocessor is made of, per architecture: units, rates, latencies, bandwidths, with their sources.

- [P] CUDA C++ Programming Guide, table "Throughput of Native Arithmetic Instructions": results per clock and
  multiprocessor; a warp instruction takes 32 / (rate / 4) cycles of its scheduler's unit.
- [A] NVIDIA A100 Tensor Core GPU Architecture, 2020. [H] NVIDIA H100 Tensor Core GPU Architecture, 2022: dense products
  per clock, multiprocessors, clocks, bandwidth of memory, L2 and shared memory.
- [S] Sun et al., "Dissecting Tensor Cores via Microbenchmarks", TPDS 2023: mma.sync and ldmatrix on A100.
- [L] Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via Microbenchmarking",
  arXiv:2402.13499: mma.sync and wgmma on H100, latencies of memory.

Latencies are near what [S] and [L] report. What a kernel reaches of a bandwidth or of the data sheet's rate
(memory_share, l2, library, sustained) is chosen, and so are the queue of simulate.py and the gap between launches.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Machine:
    name: str
    multiprocessors: int
    clock: float  # GHz at which the data sheet counts products
    tensor_fma: int  # bf16 products per clock and scheduler that the data sheet counts
    mma_fma: float  # and those that mma.sync reaches
    fma_pipes: int  # of 16 lanes per scheduler: IMAD takes the first alone
    memory: float  # GB/s
    memory_share: float  # of it that a streaming kernel reaches
    l2: float  # bytes per clock and multiprocessor, all of them reading
    l2_bytes: int
    library: float  # TFLOP/s of large bf16 products in cuBLAS
    sustained: float  # TFLOP/s at which power holds the clock down
    shared_kib: int
    latency: dict = field(default_factory=dict)

    @property
    def peak(self):
        """TFLOP/s of bf16 products."""
        return self.multiprocessors * self.clock * 4 * self.tensor_fma * 2 / 1e3


# Cycles from issue to the release of the scoreboard, without queueing. shared: LDS; matrix: LDSM; global: a hit in L2;
# special: MUFU and conversions; move: S2R and the like; constant: LDC; barrier: from the last arrival to the release.
_LATENCY = {
    "shared": 23,
    "matrix": 29,
    "store": 12,
    "shuffle": 23,
    "global": 260,
    "memory": 500,
    "special": 22,
    "move": 20,
    "constant": 30,
    "barrier": 22,
    "read": 8,
    "wgmma": 40,
    "copy": 450,
    "phase": 20,
}

MACHINES = {
    "8.0": Machine("A100-SXM", 108, 1.41, 256, 256, 1, 2039, 0.85, 40, 40 << 20, 250, 290, 164, _LATENCY),
    "9.0": Machine(
        "H100-SXM",
        132,
        1.83,
        512,
        0.63 * 512,
        2,
        3352,
        0.85,
        36,
        50 << 20,
        700,
        800,
        228,
        {**_LATENCY, "shared": 29, "matrix": 33},
    ),
}
MACHINES["9.0a"] = MACHINES["9.0"]


def machine_of(arch):
    """Of "sm_80", "80" or "8.0"."""
    plain = arch.removeprefix("sm_")
    if "." not in plain:
        suffix = plain[-1] if plain[-1].isalpha() else ""
        digits = plain.removesuffix(suffix)
        plain = f"{digits[:-1]}.{digits[-1]}{suffix}"
    if plain not in MACHINES:
        raise ValueError(f"no machine is described for {arch}: {', '.join(MACHINES)}")
    return MACHINES[plain]

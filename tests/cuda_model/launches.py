"""Times of launches: kernels of products by the simulated multiprocessor, all else by bytes and instructions, library
products by a rate."""

from dataclasses import dataclass

from . import interpret, simulate, units

LAUNCH = 2.5e-6  # seconds from one kernel's end to the next one's start, on a stream that is kept full
# Rows and columns of the result that a multiprocessor makes at a time, and the share of the library's rate that it then
# reaches; the fastest is taken.
LIBRARY_TILES = ((128, 256, 1.0), (128, 128, 0.92), (64, 128, 0.8))


@dataclass
class Cost:
    """Seconds of a launch, and what bounds it."""

    name: str
    seconds: float
    bound: str
    detail: object = None


def steps_of(program, machine, trace):
    """A warp's trace as the simulator takes it."""
    timings = getattr(program, "timings", None)
    if timings is None or timings[0] is not machine:
        timings = program.timings = (
            machine,
            [units.timing_of(x, i, machine) for i, x in enumerate(program.code)],
        )
    table = timings[1]
    return [(table[i], extra) for i, extra in trace]


def simulate_blocks(program, machine, launch, blocks):
    """Result of the first `blocks` blocks of a launch, side by side on one multiprocessor."""
    traces = []
    for block in range(blocks):
        warps = interpret.trace(program, launch, block)
        traces.append([steps_of(program, machine, w) for w in warps])
    return simulate.Multiprocessor(machine).run(traces)


def bandwidth(machine, size):
    """Bytes a second of a launch that moves `size` bytes: memory's, or L2's where all of it stays there."""
    if size > machine.l2_bytes:
        return machine.memory * 1e9 * machine.memory_share
    return machine.l2 * machine.multiprocessors * machine.clock * 1e9


def traffic(program, machine, launch, resident):
    """(bytes from and to memory, bytes from and to L2, warp instructions) of a launch, from two of its blocks.

    What another block touches at the same place comes from L2. So does what a block touches again, if all that is
    resident fits into half of L2."""
    blocks = [interpret.trace(program, launch, 0)]
    if launch.blocks > 1:
        blocks.append(interpret.trace(program, launch, launch.blocks // 2))
    seen = [{(e["at"], e["bytes"]) for warp in block for _, e in warp if e and "at" in e} for block in blocks]
    own = seen[0] - seen[1] if len(seen) > 1 else seen[0]
    accesses = [(e["at"], e["bytes"]) for warp in blocks[0] for _, e in warp if e and "at" in e]
    once = sum(size for _, size in own)
    kept = once * resident * machine.multiprocessors <= machine.l2_bytes / 2
    of_block = once if kept else sum(x[1] for x in accesses if x in own)
    shared = sum(size for _, size in seen[0] - own)
    all_bytes = sum(size for _, size in accesses)
    return launch.blocks * of_block + shared, launch.blocks * all_bytes, launch.blocks * sum(map(len, blocks[0]))


def by_bytes(program, machine, launch, resident, name):
    """Cost of a kernel without products."""
    memory, l2, issued = traffic(program, machine, launch, resident)
    chip = machine.multiprocessors * machine.clock * 1e9
    times = {
        "memory": memory / bandwidth(machine, memory),
        "l2": l2 / (machine.l2 * chip),
        "issue": issued / (simulate.SCHEDULERS * chip),
    }
    bound = max(times, key=times.get)
    return Cost(name, LAUNCH + times[bound], bound, {"bytes": memory, "instructions": issued})


def product(machine, batches, m, n, k, element, result):
    """Cost of a library product: whole waves of tiles at the rate that such products reach, or the bytes."""
    rounds = []
    for rows, columns, share in LIBRARY_TILES:
        tiles = batches * -(-m // rows) * -(-n // columns)
        # With too few tiles the library parts the sum among multiprocessors.
        whole = (
            -(-tiles // machine.multiprocessors)
            if tiles >= machine.multiprocessors
            else tiles / machine.multiprocessors
        )
        rounds.append(whole * rows * columns / share)
    flops = 2 * k * min(rounds) * machine.multiprocessors
    size = batches * ((m * k + k * n) * element + m * n * result)
    times = {"products": flops / (machine.library * 1e12), "bytes": size / bandwidth(machine, size)}
    bound = max(times, key=times.get)
    return Cost(f"product {m} x {n} x {k}", LAUNCH + times[bound], bound, {"bytes": size})


@dataclass(frozen=True)
class Tile:
    """What one block of a kernel with products costs: `cycles` = fixed + tiles * each."""

    instructions: float  # of a warp and tile
    cycles: float  # of a tile
    fixed: float  # of a block, beside its tiles
    share: float  # of the tensor cores' rate for these instructions
    result: simulate.Result  # of the tiles alone
    classes: dict  # instructions of a warp and tile by class

    def rate(self, machine):
        """TFLOP/s of the tensor cores, as the data sheet counts them, on the whole chip."""
        unit = machine.mma_fma if self.result.busy["tensor"] else machine.tensor_fma
        return self.share * machine.peak * unit / machine.tensor_fma


def difference(few, many):
    """What the tiles between two runs cost."""
    return simulate.Result(
        many.cycles - few.cycles,
        many.issued - few.issued,
        {name: count - few.by_class.get(name, 0) for name, count in many.by_class.items()},
        {name: many.busy[name] - few.busy[name] for name in many.busy},
        {name: max(0.0, many.waits[name] - few.waits.get(name, 0.0)) for name in many.waits},
    )


def tile_of(few, many, counts, warps):
    """Tile of two runs of `counts` tiles each; `few` is None where one run of counts[1] tiles is all of a block."""
    run, tiles = (difference(few, many), counts[1] - counts[0]) if few else (many, counts[1])
    cycles = run.cycles / tiles
    tensor = max(run.busy["tensor"], run.busy["wgmma"]) / simulate.SCHEDULERS / run.cycles
    classes = {name: count / tiles / warps for name, count in run.by_class.items()}
    fixed = few.cycles - cycles * counts[0] if few else 0.0
    return Tile(run.issued / tiles / warps, cycles, fixed, tensor, run, classes)


def waves(blocks, machine, resident):
    """(rounds with every multiprocessor full, blocks of the fullest multiprocessor in the last round or 0)."""
    full, rest = divmod(blocks, machine.multiprocessors * resident)
    return full, -(-rest // machine.multiprocessors)

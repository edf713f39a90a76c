"""Modelled time of whole calls, launch by launch, and of eager PyTorch beside them."""

from dataclasses import dataclass

from . import bounds, interpret, kernels, launches

SHORT, LONG = 2, 5  # tiles of keys of the two runs whose difference is what a tile costs
REFERENCE = 16384  # positions of the calls whose blocks are simulated: what a tile costs does not depend on them
# Positions of the two runs of kernels whose blocks walk over tiles of the map: such that the first block, which is
# simulated, has as many tiles as any.
FEW, MANY = 2048, 3072


@dataclass
class CallCost:
    call: kernels.Call
    positions: int
    costs: list
    tiles: dict  # kernel: launches.Tile

    @property
    def seconds(self):
        return sum(c.seconds for c in self.costs)

    def largest(self):
        """The launches that take most of the time, by name: text."""
        by_name = {}
        for cost in self.costs:
            by_name[cost.name.split("<")[0]] = by_name.get(cost.name.split("<")[0], 0.0) + cost.seconds
        order = sorted(by_name.items(), key=lambda x: -x[1])
        return ", ".join(f"{name} {seconds * 1e3:.2f}" for name, seconds in order[:3])


class Model:
    """Costs on one architecture. Simulated blocks are kept, so a kernel is simulated once per shape."""

    def __init__(self, code, machine):
        self.code, self.machine = code, machine
        self.capability = int(code.arch.removesuffix("a").replace(".", ""))
        self.kept = {}

    def record(self, call, positions, key_tiles=None):
        return kernels.record(call, positions, self.capability, self.machine.multiprocessors, key_tiles)

    def run(self, name, launch, blocks):
        key = (name, launch, blocks)
        if key not in self.kept:
            self.kept[key] = launches.simulate_blocks(self.code.program(name), self.machine, launch, blocks)
        return self.kept[key]

    def call(self, call, positions):
        """CallCost of a call at so many positions."""
        lines = self.record(call, positions)
        tiles = next((line["tiles"] for line in lines if set(line) == {"tiles"}), None)
        costs, by_kernel, seen = [], {}, {}
        for line in lines:
            if "product" in line:
                costs.append(launches.product(self.machine, *line["product"], *line["bytes"]))
            elif "kernel" in line:
                name = kernels.plain_name(line["kernel"])
                number = seen[name] = seen.get(name, 0) + 1
                if not any(x.opcode in ("HMMA", "HGMMA") for x in self.code.functions[name]):
                    launch = interpret.Launch.of(line)
                    key = (call, positions, name, launch.blocks)
                    if key not in self.kept:
                        resident = self.code.resident(name, launch)
                        self.kept[key] = launches.by_bytes(
                            self.code.program(name), self.machine, launch, resident, name
                        )
                    costs.append(self.kept[key])
                    continue
                tile, seconds = self.products(call, name, number, line, tiles)
                by_kernel.setdefault(name, tile)
                costs.append(launches.Cost(name, launches.LAUNCH + seconds, bounds.bound(tile.result), tile))
        return CallCost(call, positions, costs, by_kernel)

    def samples(self, call, name, number, line, tiles):
        """(launches to simulate, their tiles per block, tiles per block of the whole launch)."""
        if "tiles" in line:
            whole, recorded = line["tiles"], [self.record(call, n) for n in (FEW, MANY)]
        elif tiles is not None:
            whole, recorded = tiles, [self.record(call, REFERENCE, n) for n in (SHORT, LONG)]
        else:  # a block is a tile, whatever the number of positions
            first = next(x for x in self.record(call, REFERENCE) if x.get("kernel") == line["kernel"])
            return [interpret.Launch.of(first)], [1], 1
        found = []
        for lines in recorded:
            same = [x for x in lines if "kernel" in x and kernels.plain_name(x["kernel"]) == name]
            found.append(same[min(number, len(same)) - 1])
        counts = [x["tiles"] for x in found] if "tiles" in line else [SHORT, LONG]
        return [interpret.Launch.of(x) for x in found], counts, whole

    def products(self, call, name, number, line, tiles):
        """(Tile, seconds) of a kernel with products; `number` of the launches of its name in the call."""
        launch = interpret.Launch.of(line)
        sampled, counts, whole = self.samples(call, name, number, line, tiles)
        resident = self.code.resident(name, launch)
        full, last = launches.waves(launch.blocks, self.machine, resident)

        def block(count):
            runs = [self.run(name, x, count) for x in sampled]
            few, many = runs if len(runs) == 2 else (None, runs[0])
            return launches.tile_of(few, many, (counts[0], counts[-1]), count * launch.threads // 32)

        tile = block(resident if full else last)
        cycles = full * (tile.fixed + tile.cycles * whole)
        if last:
            rest = tile if last == resident or not full else block(last)
            cycles += rest.fixed + rest.cycles * whole
        # Where tensor cores are busy all the time, power holds the clock down.
        slower = max(1.0, tile.rate(self.machine) / self.machine.sustained)
        return tile, slower * cycles / (self.machine.clock * 1e9)


def eager(machine, direction, positions, width, channels):
    """Seconds of plain PyTorch in bfloat16 with its map in memory: products by the library, softmax by its bytes.

    Forward: S written, read and written by softmax, read. Backward: dP written; P read for dV; P and dP read and dS
    written; dS read twice."""
    n, machine_product = positions, lambda *sizes: launches.product(machine, 1, *sizes, 2, 2).seconds
    map_bytes = 2 * n * n
    passes = lambda count: launches.LAUNCH + count * map_bytes / launches.bandwidth(machine, count * map_bytes)  # noqa: E731
    if direction == "forward":
        return machine_product(n, n, width) + passes(2) + machine_product(n, channels, n)
    products = ((n, n, channels), (n, channels, n), (n, width, n), (n, width, n))
    return sum(machine_product(*sizes) for sizes in products) + passes(3)

"""Modelled time of whole calls, launch by launch, and of eager PyTorch beside them."""

from dataclasses import dataclass

from . import bounds, interpret, kernels, launches

SHORT, LONG = 2, 5  # tiles of keys of the two runs whose difference is what a tile costs


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

    def run(self, key, name, launch, blocks):
        key = (*key, name, blocks)
        if key not in self.kept:
            self.kept[key] = launches.simulate_blocks(self.code.program(name), self.machine, launch, blocks)
        return self.kept[key]

    def call(self, call, positions):
        """CallCost of a call at so many positions."""
        lines = self.record(call, positions)
        tiles = next((line["tiles"] for line in lines if "tiles" in line), None)
        costs, by_kernel, seen = [], {}, {}
        for line in lines:
            if "product" in line:
                costs.append(launches.product(self.machine, *line["product"], *line["bytes"]))
            elif "kernel" in line:
                name = kernels.plain_name(line["kernel"])
                number = seen[name] = seen.get(name, 0) + 1
                launch = interpret.Launch.of(line)
                if not any(x.opcode in ("HMMA", "HGMMA") for x in self.code.functions[name]):
                    key = (name, launch.blocks)
                    if key not in self.kept:
                        resident = self.code.resident(name, launch)
                        self.kept[key] = launches.by_bytes(
                            self.code.program(name), self.machine, launch, resident, name
                        )
                    costs.append(self.kept[key])
                    continue
                tile, seconds = self.products(call, positions, name, number, launch, tiles)
                by_kernel.setdefault(name, tile)
                costs.append(launches.Cost(name, launches.LAUNCH + seconds, bounds.bound(tile.result), tile))
        return CallCost(call, positions, costs, by_kernel)

    def products(self, call, positions, name, number, launch, tiles):
        """(Tile, seconds) of a kernel with products; `number` of the launches of its name in the call."""
        resident = self.code.resident(name, launch)
        full, last = launches.waves(launch.blocks, self.machine, resident)

        def block(count):
            if tiles is None:  # a block is a tile, whatever the number of positions
                run = self.run((call,), name, launch, count)
                return launches.tile_of(None, run, (0, 1), count * launch.threads // 32)
            runs = []
            for short in (SHORT, LONG):
                lines = [x for x in self.record(call, positions, short) if "kernel" in x]
                same = [x for x in lines if kernels.plain_name(x["kernel"]) == name]
                at = min(number, len(same)) - 1
                runs.append(self.run((call, short, at), name, interpret.Launch.of(same[at]), count))
            return launches.tile_of(*runs, (SHORT, LONG), count * launch.threads // 32)

        count = resident if full else last
        tile = block(count)
        cycles = [(full, tile)] if full else []
        if last:
            cycles.append((1, tile if last == count else block(last)))
        total = sum(n * (t.fixed + t.cycles * (tiles or 1)) for n, t in cycles)
        return tile, total / (self.machine.clock * 1e9)


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

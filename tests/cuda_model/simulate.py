"""One multiprocessor running the traces of the warps that are resident on it, cycle by cycle.

Four schedulers issue at most one instruction a cycle each, from the warp that they issued from last while it can go on
and its control code does not ask to change, else from the one that waits longest. A warp issues in order: when the
stall count of its last instruction has passed, the scoreboards that the instruction names are clear, its unit is free,
and the queue to shared and global memory has room. Units take an instruction for as long as units.py says; what comes
after that at a fixed latency is in the stall counts, which the compiler chose.

Shared memory serves one wavefront of 128 bytes a cycle for the whole multiprocessor, L2 a fixed share of its bandwidth;
both are queues, so an instruction's completion is known at issue, and scoreboards are lists of times. Only barriers
make warps wait for one another.
"""

import heapq
from dataclasses import dataclass

from . import units

SCHEDULERS = 4
QUEUE_DEPTH = 16  # wavefronts that may wait for shared memory before warps stall
NEVER = float("inf")


@dataclass
class Result:
    cycles: float  # from the first issue to the end of the last warp
    issued: int
    by_class: dict  # class: instructions issued
    busy: dict  # unit: cycles of use summed over schedulers, "shared" and "l2" of the multiprocessor
    waits: dict  # reason: cycles in which a scheduler with warps left issued nothing, by what its warps waited for

    @property
    def idle(self):
        return sum(self.waits.values())


def turn(time, scheduler):
    """Schedulers that issue at one time do so in an order that goes round, so that none always comes first."""
    return (scheduler - int(time)) % SCHEDULERS


class Warp:
    __slots__ = ("at", "block", "blocked", "boards", "copies", "id", "ready", "reason", "steps", "wgmma")

    def __init__(self, id_, block, steps):
        self.id, self.block, self.steps = id_, block, steps
        self.at, self.ready, self.reason, self.blocked = 0, 0.0, "stall", False
        self.boards = [[], [], [], [], [], []]
        self.copies = 0.0  # when the last cp.async so far has arrived
        self.wgmma = []  # when its groups of products end


class Barrier:
    """A named barrier of a block: `wanted` warps have to come."""

    __slots__ = ("came", "waiting")

    def __init__(self):
        self.came, self.waiting = 0, []


class PhaseBarrier:
    """An mbarrier in shared memory. Its word after init holds 2^20 less the arrivals of a phase, shifted by one.

    Bytes that a phase expects are taken for on their way from the moment at which they are announced."""

    __slots__ = ("completed", "count", "missing", "time", "waiting")

    def __init__(self, word):
        self.count = self.missing = (1 << 20) - (word >> 1)
        self.completed, self.waiting, self.time = [], [], 0.0

    def arrive(self, arrivals, time):
        """Whether that completes a phase."""
        self.missing -= arrivals
        self.time = max(self.time, time)
        if self.missing > 0:
            return False
        self.completed.append(max(self.time, self.completed[-1] if self.completed else 0.0))
        self.missing, self.time = self.count, 0.0
        return True

    def passes_at(self, parity, now):
        """When a wait for the phase of that parity passes; None where nobody knows yet."""
        done = sum(time <= now for time in self.completed)
        if done % 2 != parity:
            return now
        return self.completed[done] if len(self.completed) > done else None


class Multiprocessor:
    """Runs blocks of warps. `traces[block][warp]` are sequences of (timing, extra): extra is None or a dictionary with
    `wavefronts`, `bytes`, `active` (False: the guard was false for the whole warp), `barrier` (id, warps),
    `mbarrier` (init, expect, arrive or wait; address; operand; lanes)."""

    def __init__(self, machine):
        self.machine = machine

    def run(self, traces, start=None):
        """Result of running all blocks at once. `start[block]` delays a block."""
        self.pipes = [[0.0] * len(units.PIPES) for _ in range(SCHEDULERS)]
        self.shared_free = self.l2_free = 0.0
        self.tensor_free = [0.0] * SCHEDULERS  # of products that run beside the warps
        self.busy = dict.fromkeys((*units.PIPES, "wgmma", "shared", "l2"), 0.0)
        self.by_class = [0] * len(units.CLASSES)
        self.barriers, self.phases, self.block_warps = {}, {}, {}
        schedulers, warps = [[] for _ in range(SCHEDULERS)], []
        for b, block in enumerate(traces):
            self.block_warps[b] = len(block)
            for steps in block:
                warp = Warp(len(warps), b, steps)
                warp.ready = float(start[b]) if start else 0.0
                warps.append(warp)
                if steps:
                    schedulers[warp.id % SCHEDULERS].append(warp)
        self.due = [NEVER] * SCHEDULERS  # when a scheduler looks next
        self.events = []
        last = [None] * SCHEDULERS  # the warp that a scheduler issued from
        idle = [None] * SCHEDULERS  # since when it has nothing to issue, and what for
        waits, end, issued = {}, 0.0, 0
        for s, mine in enumerate(schedulers):
            if mine:
                self.look(s, 0.0)
        while self.events:
            now, _, s = heapq.heappop(self.events)
            if now != self.due[s]:
                continue  # it has been woken before
            mine = schedulers[s]
            if idle[s]:
                since, reason = idle[s]
                waits[reason] = waits.get(reason, 0.0) + now - since
                idle[s] = None
            chosen, soonest, reason = self.choose(mine, last[s], now, s)
            if chosen is None:
                idle[s] = now, reason
                self.look(s, soonest)
                continue
            self.issue(chosen, now, s)
            issued += 1
            last[s] = chosen
            if chosen.at >= len(chosen.steps):
                end = max(end, now + 1, chosen.ready)
                mine.remove(chosen)
            self.look(s, now + 1 if mine else NEVER)
            if self.released:
                for other in range(SCHEDULERS):
                    if schedulers[other] and self.due[other] > now + 1:
                        self.look(other, now + 1)
        if any(schedulers) or any(x.waiting for x in (*self.barriers.values(), *self.phases.values())):
            raise RuntimeError("warps wait at a barrier to which nobody comes")
        names = {name: n for name, n in zip(units.CLASSES, self.by_class, strict=True) if n}
        return Result(end, issued, names, self.busy, waits)

    def look(self, s, time):
        """Scheduler `s` looks for something to issue at that time, and not before; never, if nothing wakes it."""
        self.due[s] = time
        if time < NEVER:
            heapq.heappush(self.events, (time, turn(time, s), s))

    def choose(self, mine, previous, now, s):
        """(warp to issue from or None, when one could be issued from, what holds it)."""
        if previous and previous.at < len(previous.steps) and not previous.blocked:
            step = previous.steps[previous.at][0]
            if previous.steps[previous.at - 1][0].stay and self.when(previous, step, s) <= now:
                return previous, now, ""
        chosen, oldest, soonest, reason = None, NEVER, NEVER, "barrier"
        for warp in mine:
            if warp.blocked:
                continue
            at = self.when(warp, warp.steps[warp.at][0], s)
            if at <= now:
                if at < oldest:
                    chosen, oldest = warp, at
            elif at < soonest:
                soonest, reason = at, warp.reason
        return chosen, soonest, reason

    def when(self, warp, t, s):
        """The earliest time at which the warp's next instruction may issue, and in warp.reason what holds it."""
        at, reason = warp.ready, "stall"
        for board in t.wait:
            pending = warp.boards[board]
            if pending and pending[-1][0] > at:
                at, reason = pending[-1]
        kind = t.kind
        if kind == "fixed":
            if t.pipe >= 0:
                free = self.pipes[s][t.pipe]
                if t.pipe == 2 and self.pipes[s][1] < free:
                    free = self.pipes[s][1]
                if free > at:
                    at, reason = free, units.PIPES[t.pipe]
        elif kind in ("shared", "copy", "global"):
            if self.shared_free - QUEUE_DEPTH > at:
                at, reason = self.shared_free - QUEUE_DEPTH, "shared"
        elif kind == "depbar":
            board, left = t.argument
            pending = sorted(x[0] for x in warp.boards[board])
            if len(pending) > left and pending[-1 - left] > at:
                at, reason = pending[-1 - left], "copy"
        elif kind == "wgmma_wait":
            left = t.argument[0]
            if len(warp.wgmma) > left and warp.wgmma[-1 - left] > at:
                at, reason = warp.wgmma[-1 - left], "wgmma"
        warp.reason = reason
        return at

    def issue(self, warp, now, s):
        t, extra = warp.steps[warp.at]
        warp.at += 1
        self.by_class[t.klass] += 1
        self.released = False
        warp.ready = now + max(1, t.stall)
        active = extra is None or extra.get("active", True)
        done = read = now + 1
        kind = t.kind
        if kind == "fixed":
            if t.pipe >= 0 and active:
                pipe = t.pipe
                if pipe == 2 and self.pipes[s][1] < self.pipes[s][2]:
                    pipe = 1
                self.pipes[s][pipe] = max(self.pipes[s][pipe], now) + t.busy
                self.busy[units.PIPES[pipe]] += t.busy
            done, read = now + t.latency, now + self.machine.latency["read"]
            reason = units.CLASSES[t.klass]
        elif kind in ("shared", "copy", "global"):
            reason = kind
            if active:
                wavefronts = extra.get("wavefronts", t.wavefronts) if extra else t.wavefronts
                size = extra.get("bytes", t.bytes) if extra else t.bytes
                begin = max(now, self.shared_free)
                self.shared_free = begin + wavefronts
                self.busy["shared"] += wavefronts
                read = self.shared_free + self.machine.latency["read"]
                done = self.shared_free + t.latency
                if size:
                    self.l2_free = max(self.l2_free, now) + size / self.machine.l2
                    self.busy["l2"] += size / self.machine.l2
                    done = max(done, self.l2_free + t.latency)
                if kind == "copy":
                    warp.copies = max(warp.copies, done)
        elif kind == "group":
            done, reason = max(done, warp.copies), "copy"
        elif kind == "wgmma":
            reason = "wgmma"
            ends, _ = t.argument
            self.tensor_free[s] = max(self.tensor_free[s], now) + t.busy
            self.busy["wgmma"] += t.busy
            done = read = self.tensor_free[s] + t.latency
            if ends:
                warp.wgmma.append(done)
        elif kind == "barrier":
            reason = "barrier"
            key, wanted = self.barrier_of(warp, t, extra)
            barrier = self.barriers.setdefault(key, Barrier())
            barrier.came += 1
            if t.argument[1]:
                barrier.waiting.append(warp)
                warp.blocked = True
            if barrier.came >= wanted:
                for other in barrier.waiting:
                    other.blocked = False
                    other.ready = max(other.ready, now + self.machine.latency["barrier"])
                self.barriers[key] = Barrier()
                self.released = True
        elif kind == "phase" and extra and "mbarrier" in extra:
            reason = "phase"
            done = self.phase(warp, now, t, *extra["mbarrier"])
        else:
            reason, done = kind, now + t.latency
        for board, time in ((t.write, done), (t.read, read)):
            if board >= 0:
                pending = warp.boards[board]
                if pending and pending[0][0] <= now:
                    pending[:] = [x for x in pending if x[0] > now]
                pending.append((max(time, pending[-1][0]) if pending else time, reason))

    def barrier_of(self, warp, t, extra):
        if extra and "barrier" in extra:
            number, wanted = extra["barrier"]
            return (warp.block, number), wanted
        return (warp.block, t.argument[0]), self.block_warps[warp.block]

    def phase(self, warp, now, t, what, address, value, lanes):
        """An operation on an mbarrier; when its scoreboard is released."""
        key = (warp.block, address)
        if what == "init":
            self.phases[key] = PhaseBarrier(value)
            return now + t.latency
        barrier = self.phases[key]
        if what == "wait":
            passes = barrier.passes_at(value >> 31, now)
            if passes is None:
                barrier.waiting.append(warp)
                warp.blocked = True
            else:
                warp.ready = max(warp.ready, passes)
            return max(now, passes or now) + t.latency
        time = now
        if what == "expect":
            self.l2_free = max(self.l2_free, now) + value / self.machine.l2
            self.busy["l2"] += value / self.machine.l2
            time = self.l2_free + self.machine.latency["copy"]
        if barrier.arrive(lanes, time):
            for other in barrier.waiting:
                other.blocked = False
                other.ready = max(other.ready, barrier.completed[-1] + t.latency)
            barrier.waiting = []
            self.released = True
        return now + t.latency

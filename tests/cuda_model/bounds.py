"""What bounds a run: the busiest unit, or what the schedulers waited for."""

from . import simulate, units


def shares(result):
    """{unit: share of the run in which it was at work}; of units that every scheduler has, the mean."""
    per_scheduler = (*units.PIPES, "wgmma")
    found = {name: result.busy[name] / simulate.SCHEDULERS / result.cycles for name in per_scheduler}
    found |= {name: result.busy[name] / result.cycles for name in ("shared", "l2")}
    found["issue"] = result.issued / simulate.SCHEDULERS / result.cycles
    return found


def bound(result):
    """A line: the busiest unit, and where no unit is at work for 85 % of the time, the largest wait."""
    by_share = shares(result)
    name, share = max(by_share.items(), key=lambda x: x[1])
    text = f"{name} {share:.0%}"
    if share < 0.85 and result.waits:
        reason, cycles = max(result.waits.items(), key=lambda x: x[1])
        text += f", waits on {reason} {cycles / simulate.SCHEDULERS / result.cycles:.0%}"
    return text


def mix(by_class, turns=1, warps=1):
    """Instructions of a warp and turn by class, the most frequent first."""
    order = sorted(by_class.items(), key=lambda x: -x[1])
    return " ".join(f"{name} {count / turns / warps:.0f}" for name, count in order)

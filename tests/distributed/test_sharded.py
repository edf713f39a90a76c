"""Positions sharded over processes: equal to one process in any split, by either exchange; errors, not hangs."""

import functools
import itertools
import os
import re
import signal
import time
from datetime import timedelta

import processes
import pytest
import torch
import torch.distributed as dist

import dnl_ext
from dnl_ext import distributed
from dnl_ext.distributed import _exchange

run = functools.partial(processes.run, timeout=400)
TOLERANCE = 1e-12  # of the norm of a result in float64
D, C = 5, 6

#: (queries of every rank, keys of every rank); the two together stand for N positions unless a case says otherwise.
SPLITS = {
    2: [((13, 20), (13, 20)), ((7, 4), (1, 22)), ((0, 9), (8, 3))],
    3: [((11, 12, 10), (11, 12, 10)), ((5, 0, 9), (0, 17, 2)), ((4, 4, 4), (0, 0, 5))],
    4: [((8, 9, 8, 7), (8, 9, 8, 7)), ((3, 0, 12, 1), (6, 5, 0, 30)), ((0, 0, 0, 6), (2, 0, 1, 0))],
}
OPTIONS = [
    dict(zip(("whiten", "exchange", "block"), values, strict=True))
    for values in itertools.product(("channel", None), ("ring", "gather"), (None, 3))
]


def make(queries, keys, mask, lead=(2,), dtype=torch.float64, seed=0):
    """query, key, value, mask_logits or None, and the gradient of the output: channel-first in memory."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n, d: torch.randn(*lead, d, n, generator=generator, dtype=torch.float64).to(dtype).transpose(-1, -2)  # noqa: E731
    inputs = [draw(queries, D), draw(keys, D) + 2, draw(keys, C) + 3]
    return *inputs, draw(keys, 1).squeeze(-1) if mask else None, draw(queries, C)


def shard(x, sizes, rank, dim):
    return None if x is None else x.split(sizes, dim)[rank].clone(memory_format=torch.preserve_format)


def shard_all(rank, queries, keys, q, k, v, m, dy):
    """A rank's shards of the inputs, as leaves, and of the gradient."""
    shards = [shard(q, queries, rank, -2), shard(k, keys, rank, -2), shard(v, keys, rank, -2), shard(m, keys, rank, -1)]
    return [None if x is None else x.requires_grad_() for x in shards], shard(dy, queries, rank, -2)


def results(function, inputs, dy, **options):
    """Output and gradients; None for an absent mask."""
    y = function(*inputs, **options)
    y.backward(dy)
    return [y.detach(), *(None if x is None else x.grad for x in inputs)]


def sharded_results(rank, world_size, cases):
    out = []
    for queries, keys, mask, options in cases:
        inputs, dy = shard_all(rank, queries, keys, *make(sum(queries), sum(keys), mask))
        out.append(results(distributed.disentangled_attention, inputs, dy, **options))
    return out


def whole_results(queries, keys, mask, whiten, **_):
    *inputs, dy = make(sum(queries), sum(keys), mask)
    inputs = [None if x is None else x.requires_grad_() for x in inputs]
    return results(dnl_ext.disentangled_attention, inputs, dy, whiten=whiten)


def assert_equal(parts, whole, what):
    """Shards of every result, joined, against the whole, relative to its norm."""
    for i, (name, expected) in enumerate(zip(("output", "query", "key", "value", "mask"), whole, strict=True)):
        if expected is None:
            assert all(part[i] is None for part in parts)
            continue
        joined = torch.cat([part[i] for part in parts], dim=-1 if name == "mask" else -2)
        error = float((joined - expected).norm() / expected.norm())
        assert error < TOLERANCE, f"{what}: {name} is off by {error:.2g}"


class TestEqualToOneProcess:
    @pytest.mark.parametrize("world_size", [2, 3, 4])
    def test_output_and_all_gradients(self, world_size):
        cases = [
            (*split, mask, options)
            for split in SPLITS[world_size]
            for mask in (True, False)
            for options in (OPTIONS if split is SPLITS[world_size][0] else OPTIONS[::3])
        ]
        parts = run(sharded_results, world_size, cases)
        for i, (queries, keys, mask, options) in enumerate(cases):
            whole = whole_results(queries, keys, mask, **options)
            assert_equal([part[i] for part in parts], whole, (queries, keys, mask, options))

    def test_one_process(self):
        (part,) = run(sharded_results, 1, [((9,), (7,), True, options) for options in OPTIONS])
        for options, result in zip(OPTIONS, part, strict=True):
            assert_equal([result], whole_results((9,), (7,), True, **options), options)

    def test_repeats_bit_for_bit(self):
        case = (*SPLITS[3][0], True, {"exchange": "ring", "block": 4})
        for part in run(sharded_results, 3, [case, case]):
            assert all(torch.equal(x, y) for x, y in zip(*part, strict=True))

    def test_messages_are_as_many_and_as_large_as_documented(self):
        """docs/scaling.md, with 24 positions on 3 ranks in 3 blocks each; 2 batch elements."""
        ranks, blocks, channels = 3, 3, 2 * (D + C) * 8
        sent = 24 * channels * (ranks - 1) // ranks
        forward = (blocks * (ranks - 1), sent)
        backward = (blocks * (ranks - 1) + blocks * ranks, sent + 24 * channels)
        assert run(messages_sent, ranks) == [(forward, backward)] * ranks

    def test_functions_of_their_own(self):
        queries, keys = SPLITS[3][1]
        q, k, v, m, _ = make(sum(queries), sum(keys), True)
        q, k, v, m = (x.requires_grad_() for x in (q, k, v, m))
        pooled, logits = dnl_ext.unary_attention(m, v), dnl_ext.shared_key_logits(q, k)
        spatial = dnl_ext.disentangled_attention(q, k, v, m, whiten="spatial")
        (pooled.sin().sum() * 3 + logits.sin().sum() + spatial.sin().sum()).backward()
        parts = run(other_functions, 3, queries, keys)
        for part in parts:
            torch.testing.assert_close(part[0], pooled.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.cat([part[1] for part in parts], -1), logits.detach(), rtol=1e-12, atol=1e-12)
        for i, x in enumerate((q, k, v, m)):
            joined = torch.cat([part[2][i] for part in parts], -1 if x is m else -2)
            torch.testing.assert_close(joined, x.grad, rtol=1e-11, atol=1e-12)


def messages_sent(rank, world_size):
    """(number, bytes) of a ring's messages in the forward and in the backward."""
    sent, pass_on = [], _exchange._pass_on

    def counted(shards, tag, outgoing, incoming):
        sent.append(outgoing.numel() * outgoing.element_size())
        return pass_on(shards, tag, outgoing, incoming)

    _exchange._pass_on = counted
    try:
        inputs, dy = shard_all(rank, (8, 8, 8), (8, 8, 8), *make(24, 24, True))
        y = distributed.disentangled_attention(*inputs, exchange="ring", block=3)
        forward, sent[:] = (len(sent), sum(sent)), []
        y.backward(dy)
        return forward, (len(sent), sum(sent))
    finally:
        _exchange._pass_on = pass_on


def other_functions(rank, world_size, queries, keys):
    (q, k, v, m), _ = shard_all(rank, queries, keys, *make(sum(queries), sum(keys), True))
    with torch.autocast("cpu", torch.bfloat16):
        assert distributed.shared_key_logits(q.float(), k.float()).dtype == torch.float32
    pooled, logits = distributed.unary_attention(m, v), distributed.shared_key_logits(q, k)
    spatial = distributed.disentangled_attention(q, k, v, m, whiten="spatial")
    # Every rank has the pooled vector: their losses add up to three times that of one.
    (pooled.sin().sum() + logits.sin().sum() + spatial.sin().sum()).backward()
    return pooled.detach(), logits.detach(), [x.grad for x in (q, k, v, m)]


# ----------------------------------------------------------------------------------------------------------------------
# Wrong calls, and ranks that die
# ----------------------------------------------------------------------------------------------------------------------


def wrong_calls(rank, world_size):
    """What each rank raises for calls in which one rank is wrong: type and message."""
    (q, k, v, m), _ = shard_all(rank, (3, 3), (4, 4), *make(6, 8, True))
    odd = rank == 1
    calls = [
        ((q, k, v.float() if odd else v, m), {}),
        ((q, [1] if odd else k, v, m), {}),
        ((q, k, v, None if odd else m), {}),
        ((q.detach() if odd else q, k, v, m), {}),
        ((q, k, v, m), {"scale": 0.1 + 1e-9 * odd}),
        ((q, k, v, m), {"scale": 10**400 if odd else 0.1}),
        ((q, k, v, m), {"whiten": "ln"}),
        ((q, k, v, m), {"exchange": "tree"}),
        ((q, k, v, m), {"block": 2 + rank}),
        ((q, k[:, :0], v[:, :0], m[:, :0]), {}),
        ((q, k, v, m), {"group": 3}),
    ]
    raised = []
    for inputs, options in calls:
        try:
            distributed.disentangled_attention(*inputs, **options)
            raised.append(("", ""))
        except Exception as error:
            raised.append((type(error).__name__, str(error)))
    distributed.disentangled_attention(q, k, v, m)  # nobody has been left in a collective
    return raised


class TestErrors:
    def test_one_wrong_rank_makes_all_raise(self):
        expected = [
            (
                ("RuntimeError", "rank 1 .* value: expected the dtype of query"),
                ("ValueError", "value: expected the dtype"),
            ),
            (("RuntimeError", "rank 1 .* key: expected a torch.Tensor"), ("TypeError", "key: expected a torch.Tensor")),
            (("ValueError", "mask_logits: expected the same on all ranks, got True on 0, False on 1"),) * 2,
            (("ValueError", "gradients wanted: expected the same"),) * 2,
            (("ValueError", "scale: expected the same"),) * 2,
            (("RuntimeError", "rank 1 .* scale: expected a finite"), ("ValueError", "scale: expected a finite number")),
            (("ValueError", "whiten: expected 'channel', 'spatial' or None"),) * 2,
            (("ValueError", "exchange: expected 'ring', 'gather' or None, got 'tree'"),) * 2,
            (("ValueError", "block: expected the same on all ranks, got 2 on 0, 3 on 1"),) * 2,
            (("ValueError", "key: expected at least one key on some rank"),) * 2,
            (("TypeError", "group: expected a ProcessGroup"),) * 2,
        ]
        ranks = run(wrong_calls, 2)
        for rank, raised in enumerate(ranks):
            for (kind, message), want in zip(raised, expected, strict=True):
                assert kind == want[rank][0] and re.search(want[rank][1], message), (rank, kind, message)

    def test_no_group(self):
        q = torch.zeros(1, 2, 3)
        with pytest.raises(RuntimeError, match="group: expected an initialised process group"):
            distributed.disentangled_attention(q, q, q)


SECONDS = 3  # time-out of the group
PATIENCE = 60  # for the work before, on a busy machine: a group without a time-out of its own waits for 30 minutes


def lose_rank_one(rank, world_size, folder, backward, how):
    """Rank 1 dies or stops in the middle of the ring; the others write down how their call ended."""
    group = dist.new_group(timeout=timedelta(seconds=SECONDS))
    queries = keys = (8,) * world_size
    inputs, dy = shard_all(rank, queries, keys, *make(sum(queries), sum(keys), True))
    (folder / f"pid{rank}").write_text(str(os.getpid()))
    dist.barrier()
    options = {"group": group, "exchange": "ring", "block": 2}
    y = distributed.disentangled_attention(*inputs, **options) if backward else None
    if rank == 1:
        pass_on, count = _exchange._pass_on, itertools.count()

        def lost(*arguments):
            if next(count) == 2:
                os.kill(os.getpid(), signal.SIGKILL if how == "die" else signal.SIGSTOP)
            return pass_on(*arguments)

        _exchange._pass_on = lost
    start = time.monotonic()
    try:
        y.backward(dy) if backward else distributed.disentangled_attention(*inputs, **options)
        ended = "returned"
    except RuntimeError as error:
        ended = f"raised {error}"
    (folder / f"rank{rank}").write_text(f"{time.monotonic() - start} {ended}")
    if how == "stop":
        while rank != 1 and len(list(folder.glob("rank*"))) < world_size - 1:
            time.sleep(0.1)  # until everyone has run out of time
        os.kill(int((folder / "pid1").read_text()), signal.SIGCONT)


class TestLostRank:
    @pytest.mark.parametrize("backward", [pytest.param(False, marks=pytest.mark.slow), True])
    def test_a_rank_that_dies(self, tmp_path, monkeypatch, backward):
        monkeypatch.setattr(processes, "SETTLE", PATIENCE)  # the others get the time to fail by themselves
        with pytest.raises(processes.RankError, match=r"rank 1 of 4 died with exit code -9"):
            run(lose_rank_one, 4, tmp_path, backward, "die")
        self.assert_all_raised(tmp_path)

    def test_a_rank_that_stops(self, tmp_path):
        """Its connections stay open; only the time-out of the group tells."""
        run(lose_rank_one, 3, tmp_path, True, "stop")
        self.assert_all_raised(tmp_path, ranks=(0, 2))

    def assert_all_raised(self, folder, ranks=(0, 2, 3)):
        for rank in ranks:
            seconds, ended, *_ = (folder / f"rank{rank}").read_text().split()
            assert ended == "raised" and float(seconds) < SECONDS + PATIENCE


def on_nccl(rank, world_size, cases):
    out = []
    for queries, keys, mask, options in cases:
        inputs, dy = shard_all(rank, queries, keys, *make(sum(queries), sum(keys), mask))
        inputs = [None if x is None else x.detach().cuda().requires_grad_() for x in inputs]
        result = results(distributed.disentangled_attention, inputs, dy.cuda(), **options)
        out.append([None if x is None else x.cpu() for x in result])
    return out


@pytest.mark.skipif(
    not (torch.cuda.device_count() > 1 and dist.is_nccl_available() and dnl_ext._C.build_info()["cuda"]),
    reason="needs two GPUs, NCCL and dnl_ext built with CUDA",
)
def test_nccl():
    cases = [(*split, True, options) for split in SPLITS[2] for options in OPTIONS]
    parts = run(on_nccl, 2, cases, backend="nccl")
    for i, (queries, keys, mask, options) in enumerate(cases):
        assert_equal(
            [part[i] for part in parts], whole_results(queries, keys, mask, **options), (queries, keys, options)
        )

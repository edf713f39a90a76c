"""DTensors: sharded over batch, heads or positions, alone and together, equal to one process."""

import functools
import subprocess
import sys

import processes
import pytest
import torch

import dnl_ext

run = functools.partial(processes.run, timeout=400)
NAMES = ("query", "key", "value", "mask_logits")


def make(nq=7, nk=9, lead=(3, 4)):
    generator = torch.Generator().manual_seed(0)
    shapes = (*lead, nq, 5), (*lead, nk, 5), (*lead, nk, 6), (*lead, nk), (*lead, nq, 6)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def run_case(mesh, placements, function, whiten, mask):
    """Output and gradients, whole, and the placements of the output; `placements` of query, key and value."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    *inputs, dy = make()

    def of_mask(places):
        return [Shard(p.dim) if p.is_shard() and p.dim < 3 else Replicate() for p in places]

    places = [placements, placements, placements, of_mask(placements)]
    leaves = [distribute_tensor(x, mesh, p).requires_grad_() for x, p in zip(inputs, places, strict=True)]
    leaves = leaves[: 4 if mask else 3]
    y = getattr(dnl_ext, function)(*leaves, **({} if whiten == "default" else {"whiten": whiten}))
    y.backward(distribute_tensor(dy, mesh, y.placements))
    whole = [y.full_tensor().detach(), *(x.grad.full_tensor() for x in leaves)]
    return whole, str(y.placements), [str(x.grad.placements) for x in leaves]


def expected(function, whiten, mask):
    *inputs, dy = make()
    leaves = [x.requires_grad_() for x in inputs][: 4 if mask else 3]
    y = getattr(dnl_ext, function)(*leaves, **({} if whiten == "default" else {"whiten": whiten}))
    y.backward(dy)
    return [y.detach(), *(x.grad for x in leaves)]


CASES = [
    (whiten, mask) for whiten in ("channel", None) for mask in (True, False)
] + [("ln", True)]  # fmt: skip


def on_a_line(rank, world_size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    mesh = init_device_mesh("cpu", (world_size,))
    return [
        run_case(mesh, [place], "disentangled_attention", whiten, mask)
        for place in (Shard(0), Shard(1), Shard(2), Replicate())
        for whiten, mask in CASES
        if place != Shard(2) or whiten != "ln"
    ]


def on_a_grid(rank, world_size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "positions"))
    return [
        run_case(mesh, places, "disentangled_attention", whiten, mask)
        for places in ([Shard(0), Shard(1)], [Shard(0), Shard(2)], [Shard(2), Shard(1)])
        for whiten, mask in CASES[:4]
    ]


def assert_equal(results, cases):
    for rank in results:
        for (whole, place, grad_places), (want_place, whiten, mask) in zip(rank, cases, strict=True):
            assert place == want_place and set(grad_places[:3]) == {want_place}
            for x, y in zip(whole, expected("disentangled_attention", whiten, mask), strict=True):
                assert float((x - y).norm()) <= 1e-12 * float(y.norm()), (want_place, whiten, mask)


class TestAttention:
    @pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.slow)])
    def test_one_mesh_dimension(self, world_size, request):
        """Three batch elements over two ranks, four heads over three, seven queries over both: uneven."""
        places = ("(Shard(dim=0),)", "(Shard(dim=1),)", "(Shard(dim=2),)", "(Replicate(),)")
        cases = [(p, *c) for p in places for c in CASES if p != places[2] or c[0] != "ln"]
        results = request.getfixturevalue("two_ranks")[0] if world_size == 2 else run(on_a_line, world_size)
        assert_equal(results, cases)

    def test_two_mesh_dimensions(self):
        places = [f"(Shard(dim={a}), Shard(dim={b}))" for a, b in ((0, 1), (0, 2), (2, 1))]
        assert_equal(run(on_a_grid, 4), [(p, *c) for p in places for c in CASES[:4]])


def other_functions(rank, world_size):
    """Names of functions whose result or gradients differ from those of whole tensors, or that sent messages."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (world_size,))
    q, k, v, m, _ = make(lead=(4, 3))  # torch's own products want shards of one size
    calls = {
        "mean_subtract": (q,), "whiten": (q, "ln"), "unary_softmax": (m,), "unary_attention": (m, v),
        "pairwise_softmax": (q, k), "pairwise_attention": (q, k, v),
    }  # fmt: skip
    wrong = []
    for name, arguments in calls.items():
        whole = [x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments]
        parts = [
            distribute_tensor(x, mesh, [Shard(0)]).requires_grad_() if isinstance(x, torch.Tensor) else x
            for x in arguments
        ]
        function = getattr(dnl_ext, name)
        y = function(*whole)
        y.sin().sum().backward()
        with CommDebugMode() as messages:
            z = function(*parts)
            z.sin().sum().backward()
        if messages.get_total_counts():
            wrong.append(f"{name}: {messages.get_comm_counts()}")
        pairs = [(y, z)] + [(x.grad, p.grad) for x, p in zip(whole, parts, strict=True) if isinstance(x, torch.Tensor)]
        if not all(torch.allclose(x, p.full_tensor(), rtol=1e-12, atol=1e-14) for x, p in pairs):
            wrong.append(name)
    return wrong


def flags_differ(rank, world_size):
    """The same operator with the same placements and other flags: what is remembered of the first must not be used."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    import dnl_ext.distributed.dtensor  # noqa: F401

    mesh = init_device_mesh("cpu", (world_size,))
    q, k, v, *_ = (distribute_tensor(x, mesh, [Shard(0)]) for x in make())
    shapes = []
    for save in (False, True):
        low = [x.bfloat16() for x in (q, k, v)]
        shapes.append(tuple(torch.ops.dnl_ext.pairwise_forward(*low, None, 0.5, None, save)[2].shape))
    return shapes


def second_derivatives(rank, world_size):
    """Of a gradient penalty, errors against those of whole tensors, by input."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    def penalty(inputs):
        y = dnl_ext.disentangled_attention(*inputs)
        grads = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in grads), inputs)

    mesh = init_device_mesh("cpu", (world_size,))
    inputs = [x.requires_grad_() for x in make(lead=(4, 3))[:4]]
    parts = [distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_() for x in inputs]
    pairs = zip(penalty(inputs), penalty(parts), strict=True)
    return [float((x - part.full_tensor()).norm() / x.norm()) for x, part in pairs]


def everything(rank, world_size):
    """One group for all: importing torch.distributed.tensor takes longer than the tests."""
    functions = on_a_line, other_functions, flags_differ, second_derivatives
    return [function(rank, world_size) for function in functions]


@pytest.fixture(scope="module")
def two_ranks():
    """What each function of `everything` returned, by function and rank."""
    return list(zip(*run(everything, 2), strict=True))


def test_every_function_over_the_batch_without_messages(two_ranks):
    assert list(two_ranks[1]) == [[], []]


def test_flags_are_part_of_what_is_remembered(two_ranks):
    for shapes in two_ranks[2]:
        assert shapes == [(3, 4, 0), (3, 4, 7, 6)]


def test_second_derivatives_over_the_batch(two_ranks):
    for errors in two_ranks[3]:
        assert max(errors) < 1e-12


def test_import_stays_light():
    """Of torch.distributed.tensor, which takes longer than all the rest, nothing; nor of what needs it."""
    heavy = ("torch.distributed.tensor", "dnl_ext.distributed.dtensor")
    code = f"import dnl_ext, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

"""What torch's tools see of the operators: saved tensors, checkpointing, FLOPs, the profiler, serialization."""

import collections
import copy
import functools
import io
import pickle

import pytest
import torch
from cases import ARGUMENTS
from inputs import function, make
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import dnl_ext
from dnl_ext import reference
from dnl_ext.ops.double_backward import pairwise_double_backward

raw = torch.ops.dnl_ext
every_op = pytest.mark.parametrize("op", ARGUMENTS)


class Calls(TorchDispatchMode):
    """Counts the calls of this library's operators, by name."""

    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dnl_ext":
            self.count[func._opname] += 1
        return func(*args, **(kwargs or {}))


class TestSavedTensors:
    def saved(self, f, inputs):
        """Shape and dtype of what autograd keeps of a call, without the inputs, which it shares, and empty tensors."""
        kept = []

        def pack(x):
            kept.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            f(*inputs)
        storages = {x.data_ptr() for x in inputs}
        shared = [x for x in kept if x.data_ptr() in storages]
        assert len(shared) <= len(inputs)
        return [(tuple(x.shape), x.dtype) for x in kept if x.numel() and x.data_ptr() not in storages], len(shared)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("mask", [True, False])
    def test_of_attention(self, dtype, mask):
        """Inputs, output, two numbers a row, and of O(Dv) the pooled values; in 16 bits what rounding took as well."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        op = "disentangled_attention" if mask else "pairwise_attention"
        inputs = [x.requires_grad_() for x in make(op, lead=(2,), nq=4, nk=5, dqk=3, dv=7, dtype=dtype)]
        saved, shared = self.saved(function(op), inputs)
        expected = [((2, 4, 7), dtype), ((2, 4, 2), wide)]
        if dtype.itemsize == 2:
            expected.append(((2, 4, 7), dtype))
        if mask:
            expected += [((2, 7), wide), ((2,), wide)]
        assert saved == expected and shared == len(inputs)

    @pytest.mark.parametrize(
        ("op", "saved", "shared"),
        [
            ("unary_attention", [((2, 2), torch.float32), ((2,), torch.float32)], 2),
            ("unary_softmax", [((2, 5), torch.float32)], 0),
            ("mean_subtract", [], 0),
            ("whiten", [((2, 4, 3), torch.float32)], 0),
        ],
    )
    def test_of_others(self, op, saved, shared):
        inputs = [x.requires_grad_() for x in make(op, dtype=torch.float32)]
        assert self.saved(function(op), inputs) == (saved, shared)

    @every_op
    def test_nothing_without_gradients(self, op):
        assert self.saved(function(op), make(op)) == ([], 0)

    @every_op
    def test_hooks_may_move_them(self, op):
        """As torch.autograd.graph.save_on_cpu does: what comes back is another tensor."""
        gradients = []
        for unpack in (lambda x: x, torch.clone):
            leaves = [x.requires_grad_() for x in make(op)]
            with torch.autograd.graph.saved_tensors_hooks(torch.clone, unpack):
                y = function(op)(*leaves)
            g = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
            gradients.append(torch.autograd.grad(sum(x.pow(2).sum() for x in g), leaves))
        plain = [x.requires_grad_() for x in make(op)]
        g = torch.autograd.grad(function(op)(*plain).pow(3).sum(), plain, create_graph=True)
        gradients.append(torch.autograd.grad(sum(x.pow(2).sum() for x in g), plain))
        for others in gradients[1:]:
            assert all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True))


class TestCheckpoint:
    @every_op
    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_same_gradients(self, op, reentrant, dtype):
        """In 16 bits the forward without gradients keeps no residual: the recomputed one must."""
        plain, saved = ([x.requires_grad_() for x in make(op, dtype=dtype)] for _ in range(2))
        function(op)(*plain).pow(2).sum().backward()
        checkpoint(lambda *x: function(op)(*x), *saved, use_reentrant=reentrant).pow(2).sum().backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain, saved, strict=True))

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_a_block(self, reentrant):
        block = dnl_ext.DisentangledNonLocal2d.mmseg(4, reduction=1).double()
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter)
        other = copy.deepcopy(block)
        x, y = (torch.randn(2, 4, 5, 3, dtype=torch.float64, generator=torch.manual_seed(0)) for _ in range(2))
        y.copy_(x)
        block(x.requires_grad_()).pow(2).sum().backward()
        checkpoint(other, y.requires_grad_(), use_reentrant=reentrant).pow(2).sum().backward()
        assert torch.equal(x.grad, y.grad)
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(block.parameters(), other.parameters(), strict=True))

    def test_second_derivatives_through_one(self):
        inputs = make("disentangled_attention")
        results = []
        for wrap in (lambda f: f, lambda f: functools.partial(checkpoint, f, use_reentrant=False)):
            leaves = [x.clone().requires_grad_() for x in inputs]
            y = wrap(dnl_ext.disentangled_attention)(*leaves)
            g = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
            results.append(torch.autograd.grad(sum(x.pow(2).sum() for x in g), leaves))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    @pytest.mark.parametrize("must_save", [True, False])
    def test_selective(self, must_save):
        """The operator's results are kept and it runs once, or they are not and it runs twice."""

        def policy(_context, op, *args, **kwargs):
            if must_save and op is raw.pairwise_forward.default:
                return CheckpointPolicy.MUST_SAVE
            return CheckpointPolicy.PREFER_RECOMPUTE

        block = dnl_ext.DisentangledNonLocal2d(4, norm=None).double()
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter)
        expected = torch.autograd.grad(block(torch.ones(1, 4, 3, 5).double()).pow(2).sum(), list(block.parameters()))
        with Calls() as calls:
            context = functools.partial(create_selective_checkpoint_contexts, policy)
            y = checkpoint(block, torch.ones(1, 4, 3, 5).double(), use_reentrant=False, context_fn=context)
            actual = torch.autograd.grad(y.pow(2).sum(), list(block.parameters()))
        assert calls.count == {"pairwise_forward": 1 if must_save else 2, "pairwise_backward": 1}
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


SIZES = {"lead": (2, 3), "nq": 4, "nk": 5, "dqk": 3, "dv": 7, "dtype": torch.float32}


class TestFlops:
    def counts(self, f, inputs):
        """Of a forward, and of its backward."""
        leaves = [x.clone().requires_grad_() for x in inputs]
        with FlopCounterMode(display=False) as forward:
            y = f(*leaves)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        return forward.get_total_flops(), backward.get_total_flops()

    @every_op
    def test_a_forward_counts_as_in_plain_pytorch(self, op):
        inputs = make(op, **SIZES)
        ours, theirs = (self.counts(function(op, ops), inputs) for ops in (dnl_ext, reference))
        assert ours[0] == theirs[0]
        recomputed = 2 * 6 * 4 * 5 * 3 if op in ("disentangled_attention", "pairwise_attention") else 0  # S
        assert ours[1] == theirs[1] + recomputed

    @pytest.mark.parametrize("needs", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 1, 0, 1)])
    def test_a_backward_counts_what_is_wanted(self, needs):
        """dq: S, dP, dS k. dk: S, dP, dS^T q. dv: S, P^T dy, u G. dm: <G, v_j>."""
        inputs = make("disentangled_attention", **SIZES)
        for x, need in zip(inputs, needs, strict=True):
            x.requires_grad_(bool(need))
        y = dnl_ext.disentangled_attention(*inputs)
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        query, value, pooling = 2 * 6 * 4 * 5 * 3, 2 * 6 * 4 * 5 * 7, 2 * 6 * 5 * 7
        expected = {
            (1, 0, 0, 0): 2 * query + value, (0, 1, 0, 0): 2 * query + value,
            (0, 0, 1, 0): query + value + pooling, (0, 0, 0, 1): pooling,
            (1, 1, 0, 1): 3 * query + value + pooling,
        }  # fmt: skip
        assert counter.get_total_flops() == expected[needs]

    @pytest.mark.parametrize("absent", [(), (5,), (6,), (7,), (8,), (5, 6), (5, 6, 8), (7, 8), (5, 6, 7)], ids=str)
    @pytest.mark.parametrize(
        "needs", [(1, 1, 1, 1, 1), (1, 0, 0, 0, 0), (0, 1, 0, 0, 0), (0, 0, 1, 0, 1), (0, 0, 0, 1, 0), (0, 0, 0, 0, 1)]
    )
    def test_a_double_backward_counts_what_it_does(self, absent, needs):
        """Its formula, and the products that torch sees when it runs without being one operator."""
        q, k, v, m = make("disentangled_attention", **SIZES)
        dy = torch.randn(2, 3, 4, 7) if any(needs[1:]) else None
        arguments = [dy, q, k, v, m, q, k, v, m, 0.5, "channel", *map(bool, needs)]
        for i in absent:
            arguments[i] = None
        counts = []
        for f in (raw.pairwise_double_backward, pairwise_double_backward):
            # torch counts baddbmm, but not in place
            mapping = {torch.ops.aten.baddbmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * a[2] * b[2]}
            with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
                f(*arguments)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1]

    def test_every_operator_has_a_formula(self):
        names = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("dnl_ext::")}
        counted = {str(op) for op in flop_registry if str(op).startswith("dnl_ext.")}
        assert counted == {name.replace("::", ".") for name in names}


class TestProfiler:
    def test_names(self):
        leaves = [x.requires_grad_() for x in make("disentangled_attention")]
        with profile() as result:
            g = torch.autograd.grad(dnl_ext.disentangled_attention(*leaves).pow(3).sum(), leaves, create_graph=True)
            torch.autograd.grad(sum(x.pow(2).sum() for x in g), leaves)
        names = {event.key for event in result.key_averages()}
        assert {
            "dnl_ext::pairwise_forward", "dnl_ext::pairwise_backward", "dnl_ext::pairwise_double_backward",
            "dnl_ext_pairwise_forwardBackward", "AttentionGradientBackward",
        } <= names  # fmt: skip

    @pytest.mark.parametrize(
        ("op", "operator"),
        [
            ("disentangled_attention", "pairwise_forward"),
            ("whiten", "whiten_forward"),
            ("mean_subtract", "mean_subtract"),
            ("unary_softmax", "softmax"),
        ],
    )
    def test_graph_nodes(self, op, operator):
        y = function(op)(*(x.requires_grad_() for x in make(op)))
        assert f"dnl_ext_{operator}" in y.grad_fn.name()


MODULES = {
    "DisentangledNonLocal1d": lambda m: (m(4), torch.randn(2, 4, 6)),
    "DisentangledNonLocal2d": lambda m: (m(4), torch.randn(2, 4, 3, 4)),
    "DisentangledNonLocal3d": lambda m: (m(4), torch.randn(2, 4, 2, 3, 2)),
    "NonLocal1d": lambda m: (m(4), torch.randn(2, 4, 6)),
    "NonLocal2d": lambda m: (m(4), torch.randn(2, 4, 3, 4)),
    "NonLocal3d": lambda m: (m(4), torch.randn(2, 4, 2, 3, 2)),
    "GlobalContext1d": lambda m: (m(4, 0.5), torch.randn(2, 4, 6)),
    "GlobalContext2d": lambda m: (m(4, 0.5), torch.randn(2, 4, 3, 4)),
    "GlobalContext3d": lambda m: (m(4, 0.5), torch.randn(2, 4, 2, 3, 2)),
    "SimplifiedNonLocal1d": lambda m: (m(4), torch.randn(2, 4, 6)),
    "SimplifiedNonLocal2d": lambda m: (m(4), torch.randn(2, 4, 3, 4)),
    "SimplifiedNonLocal3d": lambda m: (m(4), torch.randn(2, 4, 2, 3, 2)),
    "DisentangledMultiheadAttention": lambda m: (m(8, 2), *(torch.randn(4, 2, 8) for _ in range(3))),
    "RelationModule": lambda m: (m(16, 2, 4, 8), torch.randn(2, 5, 16), torch.rand(2, 5, 4).cumsum(-1)),
}
every_module = pytest.mark.parametrize("name", MODULES)


class TestSerialization:
    def make(self, name):
        module, *inputs = MODULES[name](getattr(dnl_ext, name))
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
        return module.eval(), inputs

    def output(self, module, inputs):
        y = module(*inputs)
        return y[0] if isinstance(y, tuple) else y

    def test_every_module_is_here(self):
        public = {name for name in dnl_ext.__all__ if isinstance(getattr(dnl_ext, name), type)}
        assert public == set(MODULES)

    @every_module
    def test_deepcopy_pickle_and_save(self, name):
        module, inputs = self.make(name)
        expected = self.output(module, inputs)
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
            assert torch.equal(self.output(other, inputs), expected)
            assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in module.parameters()}

    @every_module
    def test_a_state_dict_loads_as_weights_only(self, name):
        module, inputs = self.make(name)
        file = io.BytesIO()
        torch.save(module.state_dict(), file)
        file.seek(0)
        fresh, *_ = MODULES[name](getattr(dnl_ext, name))
        fresh.eval().load_state_dict(torch.load(file, weights_only=True))
        assert torch.equal(self.output(fresh, inputs), self.output(module, inputs))

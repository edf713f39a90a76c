"""Autocast and gradient scaling: the dtype that comes is kept, and statistics and logits stay float32."""

import accuracy
import pytest
import torch
from cases import ARGUMENTS
from inputs import function, make
from toolchain import needs_gpu

import dnl_ext
from dnl_ext import reference

every_op = pytest.mark.parametrize("op", ARGUMENTS)
narrow = pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])


class TestOperators:
    @every_op
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @narrow
    def test_changes_nothing(self, op, dtype, to):
        """Operators accumulate in float32 by themselves; autocast has nothing to widen and must not narrow."""
        plain, cast = ([x.requires_grad_() for x in make(op, nq=21, nk=33, dqk=40, dtype=dtype)] for _ in range(2))
        expected = function(op)(*plain)
        with torch.autocast("cpu", to):
            actual = function(op)(*cast)
        assert actual.dtype == dtype and torch.equal(actual, expected)
        grads = torch.autograd.grad(actual.square().sum(), cast)
        for a, b in zip(grads, torch.autograd.grad(expected.square().sum(), plain), strict=True):
            assert torch.equal(a, b)

    def test_with_a_backward_inside(self):
        inputs = [x.requires_grad_() for x in make("disentangled_attention", dtype=torch.float32)]
        expected = torch.autograd.grad(dnl_ext.disentangled_attention(*inputs).sum(), inputs)
        with torch.autocast("cpu", torch.bfloat16):
            actual = torch.autograd.grad(dnl_ext.disentangled_attention(*inputs).sum(), inputs)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))

    @every_op
    @narrow
    def test_changes_no_second_derivative_and_no_tangent(self, op, to):
        inputs, tangents = (make(op, nq=9, nk=12, dqk=20, dtype=torch.float32, seed=seed) for seed in (0, 1))

        def derivatives():
            leaves = [x.clone().requires_grad_() for x in inputs]
            gradients = torch.autograd.grad(function(op)(*leaves).pow(3).sum(), leaves, create_graph=True)
            along = torch.func.jvp(function(op), tuple(inputs), tuple(tangents))[1]
            return (*torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves), along)

        expected = derivatives()
        with torch.autocast("cpu", to):
            actual = derivatives()
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == torch.float32 and torch.equal(a, e)

    @pytest.mark.parametrize("op", ["dot_product_attention", "shared_key_logits", "concatenation_attention"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_without_a_softmax(self, op, dtype):
        """Nor do the products of these, or of their gradients, see it."""
        q, k, v = make("pairwise_attention", nq=9, nk=12, dqk=20, dtype=dtype)
        inputs = {"shared_key_logits": (q, k), "concatenation_attention": (q[..., 0], k[..., 0], v)}.get(op, (q, k, v))

        def results():
            leaves = [x.clone().requires_grad_() for x in inputs]
            y = function(op)(*leaves)
            return y, *torch.autograd.grad(y.float().square().sum(), leaves)

        expected = results()
        with torch.autocast("cpu", torch.bfloat16):
            actual = results()
        assert all(a.dtype == dtype and torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


class TestModules:
    BLOCKS = (
        ("mmseg", lambda **o: dnl_ext.DisentangledNonLocal2d.mmseg(8, reduction=1, **o)),
        ("gaussian", lambda **o: dnl_ext.NonLocal2d(8, mode="gaussian", **o)),
        ("dot_product", lambda **o: dnl_ext.NonLocal2d(8, mode="dot_product", **o)),
        ("concatenation", lambda **o: dnl_ext.NonLocal2d(8, mode="concatenation", **o)),
        ("shared key", lambda **o: dnl_ext.DisentangledNonLocal2d(8, variant="dnl_shared_key", **o)),
        ("ln", lambda **o: dnl_ext.DisentangledNonLocal2d(8, whiten="ln", **o)),
        ("bn", lambda **o: dnl_ext.DisentangledNonLocal2d(8, whiten="bn", **o)),
        ("gamma", lambda **o: dnl_ext.DisentangledNonLocal2d(8, norm=None, learn_gamma=True, **o)),
        ("context", lambda **o: dnl_ext.GlobalContext2d(8, **o)),
    )

    @narrow
    @pytest.mark.parametrize(("name", "make_block"), BLOCKS, ids=[name for name, _ in BLOCKS])
    def test_blocks(self, name, make_block, to):
        """Float32 weights and gradients, a narrow attention, and the error of the reference under the same autocast."""
        blocks = [make_block(backend=backend) for backend in ("fused", "reference", "reference")]
        for parameter in blocks[0].parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        for block in blocks[1:]:
            block.load_state_dict(blocks[0].state_dict())
        x, dy = torch.randn(2, 8, 6, 7), torch.randn(2, 8, 6, 7)
        seen = []
        if hasattr(blocks[0], "_attend"):
            original = blocks[0]._attend
            blocks[0]._attend = lambda *inputs: (seen.append(inputs), original(*inputs))[1]

        def results(block, wide=False):
            leaf = (x.double() if wide else x.clone()).requires_grad_()
            with torch.autocast("cpu", to, enabled=not wide):
                y = block.double()(leaf) if wide else block(leaf)
            y.backward(dy.to(y.dtype))
            return [y, leaf.grad, *(p.grad for p in block.parameters())]

        ours, theirs, truth = results(blocks[0]), results(blocks[1]), results(blocks[2], wide=True)
        assert all(t.dtype == to for t in (seen[0] if seen else ()) if t is not None)
        assert ours[0].dtype == theirs[0].dtype and all(g.dtype == torch.float32 for g in ours[1:])
        error, allowed = (
            sum(accuracy.distance(a.detach(), t.detach()) ** 2 / (1e-30 + accuracy.norm(t.detach().numpy()) ** 2)
                for a, t in zip(results, truth, strict=True)) ** 0.5
            for results in (ours, theirs)
        )  # fmt: skip
        assert error <= accuracy.BAR["gradient"] * allowed

    @narrow
    def test_hot_logits(self, to):
        """At the paper's temperature logits reach hundreds: rounded to 16 bits they would be off by whole units.

        A map made with logits in the narrow type is held against the same truth, so that the test can fail.
        """
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(1, n, c, generator=generator).to(to) for n, c in ((64, 64), (96, 64), (96, 16)))
        scale = 1 / (8 * 0.05)
        truth = reference.pairwise_attention(*(x.double() for x in (q, k, v)), scale=scale)
        with torch.autocast("cpu", to):
            ours = dnl_ext.pairwise_attention(q, k, v, scale=scale)
            map_of_ours = dnl_ext.pairwise_softmax(q, k, scale=scale)
            logits = (reference.mean_subtract(q) * scale) @ reference.mean_subtract(k).mT
            rounded = torch.softmax(logits, -1).to(to) @ v
        assert logits.dtype == to and logits.abs().max() > 50
        assert ours.dtype == map_of_ours.dtype == to
        eps = torch.finfo(to).eps
        assert accuracy.distance(ours, truth) < 2 * eps * accuracy.norm(truth.numpy())
        assert accuracy.distance(rounded, truth) > 4 * accuracy.distance(ours, truth)


class TestGradScaler:
    """Loss scaling; the scale here makes float16 gradients overflow when it should."""

    def setup(self, scale, device="cpu"):
        block = dnl_ext.DisentangledNonLocal2d(8, norm=None).to(device)
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        optimizer = torch.optim.SGD(block.parameters(), 1e-3)
        return block, optimizer, torch.amp.GradScaler(device, init_scale=scale, growth_interval=2)

    def step(self, block, optimizer, scaler, x):
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.float16):
            loss = block(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.item()

    @pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=needs_gpu)])
    def test_trains_and_grows_the_scale(self, where):
        block, optimizer, scaler = self.setup(2.0**8, where)
        x = torch.randn(2, 8, 6, 5, device=where)
        losses = [self.step(block, optimizer, scaler, x) for _ in range(12)]
        assert losses[-1] < losses[0] and scaler.get_scale() > 2.0**8

    def test_an_overflow_is_found_and_the_step_left_out(self):
        block, optimizer, scaler = self.setup(2.0**30)
        before = [p.detach().clone() for p in block.parameters()]
        x = torch.randn(2, 8, 6, 5)
        self.step(block, optimizer, scaler, x)
        assert scaler.get_scale() == 2.0**29
        assert all(torch.equal(p, b) for p, b in zip(block.parameters(), before, strict=True))
        for _ in range(40):
            self.step(block, optimizer, scaler, x)
        assert all(p.isfinite().all() for p in block.parameters())
        assert not all(torch.equal(p, b) for p, b in zip(block.parameters(), before, strict=True))

    def test_unscaled_gradients_are_those_without_scaling(self):
        """A power of two changes no bit of what neither overflows nor underflows."""
        x = torch.randn(2, 8, 6, 5)
        gradients = []
        for scale in (1.0, 2.0**6):
            torch.manual_seed(1)
            block, optimizer, scaler = self.setup(scale)
            with torch.autocast("cpu", torch.bfloat16):
                loss = block(x).float().square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            gradients.append([p.grad for p in block.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))

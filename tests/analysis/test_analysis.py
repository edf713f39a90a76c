"""The analysis against the dense computation: every statistic from full maps in float64, for every joint."""

import itertools
import math

import pytest
import torch

import dnl_ext
from dnl_ext import analysis
from dnl_ext.analysis import terms as terms_module
from dnl_ext.analysis.coupling import FLOOR

HEIGHT, WIDTH = 5, 7
N = HEIGHT * WIDTH
EXACT = {"rel": 1e-10, "abs": 1e-10}

#: joint -> whiten, unary term, pairwise term, gain.
JOINTS = {
    "product": (None, False, True, 1.0),
    "sum": ("channel", True, True, 1.0),
    "sum, gain": ("channel", True, True, 0.4),
    "sum, not whitened": (None, True, True, 1.0),
    "pairwise": ("channel", False, True, 1.0),
    "unary": ("channel", True, False, 1.0),
}


class Case:
    """One image's attention: the streamed terms, and the dense maps computed here."""

    def __init__(self, joint, keys=N, scale=0.8):
        generator = torch.Generator().manual_seed(3)
        whiten, unary, pairwise, gain = JOINTS[joint]
        self.joint = joint.split(",")[0]

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        query, key, value, mask = draw(N, 6) + 0.5, draw(keys, 6) + 0.3, draw(keys, 4), 2 * draw(keys)
        self.arguments = (query if pairwise else None, key if pairwise else None, value, mask if unary else None)
        self.options = {"scale": scale, "whiten": whiten, "gain": gain}
        self.value, self.grad_output = value, draw(N, 4)
        self.terms = analysis.attention_terms(*self.arguments, **self.options)
        self.logits = self.pairwise = self.unary = None
        if pairwise:
            if whiten:
                query, key = query - query.mean(0), key - key.mean(0)
            self.logits = scale * query @ key.T
            self.pairwise = self.logits.softmax(1)
        if unary:
            self.unary = mask.softmax(0)
            self.total = self.unary.expand(N, -1)
            if pairwise:
                self.total = (gain * self.pairwise + self.unary) / (gain + 1)
        else:
            self.total = self.pairwise
        if self.joint == "product":
            self.pairwise = (scale * (query - query.mean(0)) @ key.T).softmax(1)
            self.unary = (scale * query.mean(0) @ key.T).softmax(0)
        self.labels = torch.randint(0, 3, (HEIGHT, WIDTH), generator=generator)
        self.labels[1, 2] = 255


@pytest.fixture(params=JOINTS)
def case(request):
    return Case(request.param)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 6 rows, so that every test crosses chunk borders."""
    monkeypatch.setattr(terms_module, "CHUNK_VALUES", 6 * N)


def entropy(p):
    return -(p * p.log()).sum(-1)


def jsd(a, b):
    return entropy((a + b) / 2) - (entropy(a) + entropy(b)) / 2


def cosine_distance(a, b):
    return (1 - torch.cosine_similarity(a, b, dim=-1)) / 2


def pairs(count):
    return torch.tensor(list(itertools.combinations(range(count), 2))).T


def pearson(a, b):
    return float(torch.corrcoef(torch.stack([a, b.double()]))[0, 1])


class TestRows:
    def test_are_rows_of_the_dense_maps(self, case):
        rows = case.terms.rows(torch.arange(N))
        assert case.terms.joint == case.joint
        for name in ("pairwise", "unary", "total"):
            expected = getattr(case, name)
            if expected is None:
                assert getattr(rows, name) is None
            else:
                torch.testing.assert_close(getattr(rows, name), expected, rtol=1e-12, atol=1e-14)

    def test_total_is_what_the_block_applies(self, case):
        query, key, value, mask = case.arguments
        if query is None:
            expected = dnl_ext.reference.unary_attention(mask, value).expand(N, -1)
        else:
            pairwise = dnl_ext.reference.pairwise_attention(
                query, key, value, scale=case.options["scale"], whiten=case.options["whiten"]
            )
            unary = 0 if mask is None else dnl_ext.reference.unary_attention(mask, value)
            expected = case.options["gain"] * pairwise + unary
        weight = case.options["gain"] + 1 if case.joint == "sum" else 1.0
        torch.testing.assert_close(weight * case.terms.rows(torch.arange(N)).total @ value, expected)

    def test_negative_gain_has_no_total(self):
        terms = analysis.attention_terms(*Case("sum").arguments, gain=-0.5)
        assert terms.rows(torch.arange(3)).total is None
        assert analysis.measure_terms(terms, 8).total is None


class TestDegeneration:
    @pytest.mark.parametrize("name", ["pairwise", "total"])
    def test_against_dense(self, case, name):
        dense = getattr(case, name)
        queries = torch.randperm(N, generator=torch.Generator().manual_seed(5))[:20]
        result = getattr(analysis.measure_terms(case.terms, queries), name)
        if dense is None:
            assert result is None
            return
        rows = dense[queries]
        i, j = pairs(20)
        assert result.cosine_distance.value == pytest.approx(cosine_distance(rows[i], rows[j]).mean().item(), **EXACT)
        assert result.cosine_distance.count == 190
        sample = jsd(rows[0::2], rows[1::2])
        assert result.jsd.value == pytest.approx(sample.mean().item(), **EXACT)
        assert result.jsd.stderr == pytest.approx(sample.std().item() / math.sqrt(10), rel=1e-6, abs=1e-10)
        assert result.jsd.count == 10
        assert result.entropy.value == pytest.approx(entropy(rows).mean().item(), **EXACT)
        assert result.entropy_share == pytest.approx(entropy(rows).mean().item() / math.log(N), **EXACT)

    def test_all_queries_give_the_mean_over_all_pairs(self, case):
        i, j = pairs(N)
        result = analysis.measure_terms(case.terms, None).total
        expected = cosine_distance(case.total[i], case.total[j]).mean().item()
        assert result.cosine_distance.value == pytest.approx(expected, **EXACT)
        # Disjoint pairs estimate the divergence over all pairs; four standard errors are far out.
        every = jsd(case.total[i], case.total[j]).mean().item()
        assert abs(result.jsd.value - every) <= 4 * result.jsd.stderr + 1e-12

    def test_the_standard_error_is_that_of_the_estimate(self):
        """Over many draws, the estimates scatter by what they state."""
        terms = Case("sum").terms
        draws = [
            analysis.measure_terms(terms, 10, generator=torch.Generator().manual_seed(seed)).total.jsd
            for seed in range(200)
        ]
        scatter = torch.tensor([draw.value for draw in draws]).std().item()
        stated = math.sqrt(sum(draw.stderr**2 for draw in draws) / len(draws))
        # Drawing without replacement scatters a little less than independent draws.
        assert 0.7 * stated < scatter < 1.15 * stated

    def test_alike_rows_and_opposite_rows(self):
        assert analysis.mean_cosine_distance(torch.ones(9, 4)) == pytest.approx(0, abs=1e-15)
        assert analysis.mean_cosine_distance(torch.eye(9)) == pytest.approx(0.5)
        assert analysis.mean_cosine_distance(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])) == pytest.approx(1)

    def test_vectors_against_dense(self):
        x = torch.randn(5000, 3, dtype=torch.float64) + 0.4  # more rows than are taken at once
        i, j = pairs(100)
        assert analysis.mean_cosine_distance(x[:100]) == pytest.approx(
            cosine_distance(x[i], x[j]).mean().item(), **EXACT
        )
        unit = x / x.norm(dim=1, keepdim=True)
        cosines = (unit @ unit.T).sum() - 5000
        assert analysis.mean_cosine_distance(x) == pytest.approx(0.5 - 0.5 * cosines.item() / (5000 * 4999), **EXACT)

    def test_a_zero_vector_has_cosine_zero_with_all(self):
        x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
        assert analysis.mean_cosine_distance(x) == pytest.approx((0.5 + 0.5 + 0) / 3)


class TestDecomposition:
    def test_against_dense(self, case):
        result = analysis.decompose(case.terms)
        if case.logits is None:
            assert result is None
            return
        logits = case.logits
        rows, columns = logits.mean(1, keepdim=True), logits.mean(0, keepdim=True)
        centred = logits - rows - columns + logits.mean()
        variance = logits.var(correction=0).item()
        assert result.variance == pytest.approx(variance, **EXACT)
        assert result.pairwise == pytest.approx(centred.square().mean().item() / variance, **EXACT)
        assert result.unary == pytest.approx(columns.var(correction=0).item() / variance, **EXACT)
        assert result.row == pytest.approx(rows.var(correction=0).item() / variance, **EXACT)
        assert result.pairwise + result.unary + result.row == pytest.approx(1, **EXACT)
        assert result.unary_of_map == pytest.approx(result.unary / (result.unary + result.pairwise), **EXACT)
        if case.joint == "sum":
            assert result.mask_variance == pytest.approx(case.arguments[3].var(correction=0).item(), **EXACT)

    def test_whitening_takes_unary_and_row_away(self):
        result = analysis.decompose(Case("pairwise").terms)
        assert result.pairwise == pytest.approx(1, abs=1e-12) and result.unary < 1e-12 and result.row < 1e-12

    def test_one_map_for_all_queries(self):
        query, key, value, _ = Case("product").arguments
        terms = analysis.attention_terms(query * 1e-6 + 1, key, value, whiten=None)
        assert analysis.decompose(terms).unary_of_map == pytest.approx(1, abs=1e-9)


class TestCoupling:
    @pytest.mark.parametrize("joint", ["product", "sum", "sum, gain"])
    def test_gradients_are_those_of_autograd(self, joint):
        """Elasticities from dense gradients of the maps, taken by autograd."""
        case = Case(joint)
        pairwise, unary = case.pairwise.clone().requires_grad_(), case.unary.expand(N, -1).clone().requires_grad_()
        weights = pairwise * unary / (pairwise * unary).sum(1, keepdim=True) if joint == "product" else pairwise + unary
        by_pairwise, by_unary = torch.autograd.grad(weights @ case.value, (pairwise, unary), case.grad_output)
        result = analysis.measure_terms(case.terms, None, grad_output=case.grad_output).coupling
        for found, gradient, other in (
            (result.pairwise_by_unary, by_pairwise, unary), (result.unary_by_pairwise, by_unary, pairwise),
        ):  # fmt: skip
            x, y = (a.detach().abs().log() for a in (other, gradient))
            x, y = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
            assert found.slope == pytest.approx(((x * y).sum() / (x * x).sum()).item(), rel=1e-7)
            structural = 1 if joint == "product" else 0
            assert found.slope - found.values == pytest.approx(structural, abs=1e-12)
            assert found.correlation == pytest.approx(((x * y).sum() / (x.norm() * y.norm())).item(), rel=1e-7)
        assert FLOOR <= 1e-12  # which moves no gradient here by more than the tolerance

    def test_the_product_couples_and_the_sum_does_not(self):
        generator = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(400, 8, generator=generator) for _ in range(3))
        mask = 2 * torch.randn(400, generator=generator)
        product = analysis.attention_terms(query + 1, key, value, scale=0.5, whiten=None)
        added = analysis.attention_terms(query, key, value, mask, scale=0.5)
        product, added = (analysis.measure_terms(terms, None).coupling for terms in (product, added))
        for name in ("pairwise_by_unary", "unary_by_pairwise"):
            assert getattr(product, name).slope == pytest.approx(1, abs=0.15)
            assert getattr(product, name).correlation > 0.5
            assert getattr(added, name).slope == pytest.approx(0, abs=0.1)
            assert abs(getattr(added, name).correlation) < 0.1

    @pytest.mark.parametrize("joint", ["pairwise", "unary"])
    def test_one_term_has_none(self, joint):
        assert analysis.measure_terms(Case(joint).terms, 8).coupling is None


class TestConsistency:
    def test_own_class_against_dense(self, case):
        flat, valid = case.labels.flatten(), case.labels.flatten() != 255
        result = analysis.measure_terms(case.terms, None, labels=(case.labels, case.labels))
        for name in ("pairwise", "total"):
            dense = getattr(case, name)
            if dense is None:
                continue
            masses, shares, correlations = [], [], []
            for query in range(N):
                if valid[query]:
                    weights, same = dense[query, valid], flat[valid] == flat[query]
                    masses.append((weights[same].sum() / weights.sum()).item())
                    shares.append(same.double().mean().item())
                    correlations.append(pearson(weights, same))
            own = getattr(result, name).own_class
            assert own.queries == len(masses) == N - 1
            assert own.mass == pytest.approx(sum(masses) / len(masses), **EXACT)
            assert own.uniform == pytest.approx(sum(shares) / len(shares), **EXACT)
            assert own.correlation == pytest.approx(sum(correlations) / len(correlations), **EXACT)

    def test_boundaries_against_dense(self, case):
        result = analysis.measure_terms(case.terms, 8, labels=(case.labels, case.labels))
        if case.unary is None:
            assert result.unary is None
            return
        padded = torch.nn.functional.pad(case.labels, (1, 1, 1, 1), value=255)
        edge = torch.zeros_like(case.labels, dtype=torch.bool)
        for row, column in itertools.product(range(HEIGHT), range(WIDTH)):
            own = case.labels[row, column]
            around = [padded[row + 1 + a, column + 1 + b] for a, b in ((0, 1), (0, -1), (1, 0), (-1, 0))]
            edge[row, column] = own != 255 and any(other not in (own, 255) for other in around)
        valid = case.labels.flatten() != 255
        weights, edge = case.unary[valid], edge.flatten()[valid]
        found = result.unary.boundaries
        assert found.mass == pytest.approx((weights[edge].sum() / weights.sum()).item(), **EXACT)
        assert found.uniform == pytest.approx(edge.double().mean().item(), **EXACT)
        assert found.correlation == pytest.approx(pearson(weights, edge), **EXACT)

    def test_perfect_and_uniform_attention(self):
        labels = torch.tensor([[0, 0, 1, 1]])
        one_hot = torch.nn.functional.one_hot(labels.flatten()).double()
        arguments = (one_hot, one_hot, torch.randn(4, 2, dtype=torch.float64))
        sharp = analysis.measure_terms(analysis.attention_terms(*arguments, scale=100.0), labels=(labels, labels))
        assert sharp.pairwise.own_class.mass == pytest.approx(1) and sharp.pairwise.own_class.uniform == 0.5
        assert sharp.pairwise.own_class.correlation == pytest.approx(1)
        flat = analysis.measure_terms(analysis.attention_terms(*arguments, scale=0.0), labels=(labels, labels))
        assert flat.pairwise.own_class.mass == pytest.approx(0.5)
        assert flat.pairwise.entropy_share == pytest.approx(1) and flat.pairwise.jsd.value == pytest.approx(
            0, abs=1e-12
        )

    def test_no_labels_at_all(self):
        labels = torch.full((HEIGHT, WIDTH), 255)
        result = analysis.measure_terms(Case("sum").terms, 8, labels=(labels, labels))
        assert result.pairwise.own_class.queries == 0 and result.to_dict()["pairwise"]["own_class"]["mass"] is None

    def test_boundaries_in_one_and_three_dimensions(self):
        assert analysis.boundaries(torch.tensor([0, 0, 1, 255, 2])).tolist() == [False, True, True, False, False]
        volume = torch.zeros(2, 3, 3, dtype=torch.int64)
        volume[1] = 1
        assert analysis.boundaries(volume).all()

    def test_labels_on_a_coarser_grid(self):
        label = torch.arange(6 * 8).view(6, 8)
        assert torch.equal(analysis.labels_on_grid(label, (6, 8)), label)
        assert analysis.labels_on_grid(label, (3, 2)).tolist() == [[10, 14], [26, 30], [42, 46]]


class TestMeasure:
    def test_unary_entropy(self):
        case = Case("sum")
        result = analysis.measure_terms(case.terms, 8).unary
        assert result.entropy.value == pytest.approx(entropy(case.unary).item(), **EXACT)
        assert result.cosine_distance is None and result.jsd is None

    def test_fewer_keys_than_queries(self):
        case = Case("sum", keys=12)
        result = analysis.measure_terms(case.terms, None)
        assert (result.queries, result.keys, result.sampled) == (N, 12, N)
        assert result.total.entropy.value == pytest.approx(entropy(case.total).mean().item(), **EXACT)

    def test_random_queries_are_reproducible(self):
        first, second = (analysis.measure_terms(Case("sum").terms, 8) for _ in range(2))
        assert first == second
        other = analysis.measure_terms(Case("sum").terms, 8, generator=torch.Generator().manual_seed(1))
        assert other.total.jsd != first.total.jsd

    def test_queries_with_a_class_are_preferred(self):
        labels = torch.full((HEIGHT, WIDTH), 255)
        labels[2, :4] = 1
        result = analysis.measure_terms(Case("sum").terms, 4, labels=(labels, labels))
        assert result.pairwise.own_class.queries == 4

    def test_progress(self):
        calls = []
        analysis.measure_terms(Case("sum").terms, 20, progress=lambda *call: calls.append(call))
        assert calls == [(6, 20), (12, 20), (18, 20), (20, 20)]

    def test_float32_is_near_float64(self):
        case = Case("product")
        arguments = [None if x is None else x.float() for x in case.arguments]
        queries = torch.arange(N)
        wide = analysis.measure_terms(case.terms, queries).to_dict()
        narrow = analysis.measure_terms(analysis.attention_terms(*arguments, **case.options), queries).to_dict()
        assert narrow["total"]["jsd"]["value"] == pytest.approx(wide["total"]["jsd"]["value"], rel=1e-5)
        assert narrow["decomposition"]["unary"] == pytest.approx(wide["decomposition"]["unary"], rel=1e-5)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"queries": 1}, "queries: expected None, a number of at least 2"),
            ({"queries": torch.tensor([0, N])}, f"numbers from 0 to {N - 1}"),
            ({"queries": torch.tensor([0.0, 1.0])}, "expected an int64 tensor"),
            ({"labels": (torch.zeros(3), torch.zeros(N))}, f"labels: expected {N} query labels, got 3"),
            ({"grad_output": torch.zeros(N, 3)}, "grad_output: expected shape"),
        ],
    )
    def test_wrong_calls(self, options, message):
        with pytest.raises(ValueError, match=message):
            analysis.measure_terms(Case("sum").terms, **options)

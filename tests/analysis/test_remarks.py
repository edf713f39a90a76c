"""What stands out in a block's figures: saturated, flat, degenerate."""

from typing import ClassVar

import torch

from dnl_ext.analysis import Estimate, attention_terms, measure_terms, remarks_on
from dnl_ext.analysis.results import over_images


class TestRemarks:
    FIGURES: ClassVar = {
        "pairwise.entropy_share": 0.7, "decomposition.variance": 3.0, "pairwise.jsd": 0.4, "total.jsd": 0.3,
        "total.entropy_share": 0.8,
    }  # fmt: skip

    def words(self, **changes):
        figures = {**self.FIGURES, **{name.replace("__", "."): value for name, value in changes.items()}}
        kept = {name: Estimate(value, 0.0, 4) for name, value in figures.items() if value is not None}
        return [remark.split(":")[0] for remark in remarks_on(kept)]

    def test_what_stands_out(self):
        assert self.words() == []
        assert self.words(pairwise__entropy_share=0.05, decomposition__variance=76_000.0) == ["saturated"]
        assert self.words(pairwise__entropy_share=None, decomposition__variance=76_000.0) == ["saturated"]
        assert self.words(pairwise__entropy_share=0.999, total__entropy_share=0.999, total__jsd=1e-4) == ["flat"]
        assert self.words(total__jsd=1e-3) == ["degenerate"]

    def test_the_unary_term_alone_has_one_map_by_design(self):
        assert self.words(pairwise__entropy_share=None, pairwise__jsd=None, total__jsd=0.0) == []

    def test_of_a_saturated_and_a_flat_block(self):
        """Measured: the same random query and key, with logits a thousand times apart."""
        torch.manual_seed(0)
        query, key, value = torch.randn(64, 16), torch.randn(64, 16), torch.randn(64, 8)
        for scale, word in ((50.0, "saturated"), (0.02, "flat")):
            figures = measure_terms(attention_terms(query, key, value, scale=scale))
            (remark,) = remarks_on(over_images([figures]))
            assert remark.startswith(word)

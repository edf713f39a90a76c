"""Look at, measure and compare the attention of non-local blocks, in memory linear in the number of positions.

The disentangled block began as an analysis: in vision the standard non-local block tends to one map for all queries,
because it multiplies a pairwise term with a unary one (Yin et al., ECCV 2020; Cao et al., GCNet, 2019). Here are the
means to see that in a network of your own, one idea per file::

    terms           the pairwise, unary and total maps of a block, by rows
    maps            rows of chosen queries as pictures
    degeneration    distances between the rows of different queries
    decomposition   shares of the logits' variance: pairwise, unary, constant per row
    coupling        how one term's gradient depends on the other's value
    consistency     maps against class regions and boundaries
    measure         all of these for one image, in one pass over sampled rows
    remarks         what stands out in the figures, and what can be done
    probe           all of these for every block of a network, over a data set
    blocks          which modules are blocks: ``attention_inputs(x)``, or plain-PyTorch blocks by their layers' names
    heads           all of these for every attention head of any network
    calls           every call of ``F.scaled_dot_product_attention``, by the module that made it
    masks           what masks take from the keys or add to the logits
    tables, head_tables, pages   the figures as text

No N x N map is held. docs/analysis.md has the formulae and a worked example.
"""

from .blocks import NotAttention, block_inputs
from .calls import AttentionCall, AttentionCalls, NotMeasured
from .consistency import Consistency, boundaries, labels_on_grid
from .coupling import Coupling, Slope
from .decomposition import Decomposition, decompose
from .degeneration import mean_cosine_distance
from .heads import LayerReport, ModelReport, measure_model
from .maps import AttentionMaps, attention_rows
from .measure import AttentionStatistics, TermStatistics, attention_terms, measure_terms
from .probe import AttentionProbe, BlockReport
from .remarks import remarks_on
from .results import Estimate
from .terms import Terms

__all__ = [
    "AttentionCall",
    "AttentionCalls",
    "AttentionMaps",
    "AttentionProbe",
    "AttentionStatistics",
    "BlockReport",
    "Consistency",
    "Coupling",
    "Decomposition",
    "Estimate",
    "LayerReport",
    "ModelReport",
    "NotAttention",
    "NotMeasured",
    "Slope",
    "TermStatistics",
    "Terms",
    "attention_rows",
    "attention_terms",
    "block_inputs",
    "boundaries",
    "decompose",
    "labels_on_grid",
    "mean_cosine_distance",
    "measure_model",
    "measure_terms",
    "remarks_on",
]

"""Attention without a softmax, in work and memory linear in the number of positions: plain torch, any derivative.

The non-local block's dot-product and concatenation modes multiply the values with a map that need not be built:
(q k^T) v = q (k^T v), and a sum of relu(a_i + b_j) v_j over j is two running sums over the b_j in order of size. And
the unary logits that share their keys with the pairwise term, which are one product with a mean.
"""

import torch

from ._checks import check_alike, check_pairwise, check_query_key, check_tensor
from ._common import accumulate_type, at_once, product, sum_type, without_autocast

#: Elements of a map of rectified sums up to which it is built: sorting takes longer.
SMALL_MAP = 262_144


def shared_key_logits(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Unary logits of a block whose unary and pairwise terms share their keys: m_j = <mean over i of q_i, k_j>.

    A standard non-local block holds this unary term without naming it: it is the part of the logits <q_i, k_j> that is
    the same for every query. Give the result to :func:`disentangled_attention` as ``mask_logits``.

    Args:
        query: tensor (..., Nq, Dqk), float64, float32, bfloat16 or float16.
        key: tensor (..., Nk, Dqk) of the same dtype, device and leading dimensions.

    Returns:
        Tensor (..., Nk) of the dtype of ``query``.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype or device that does not fit.

    Example:
        >>> import torch
        >>> from dnl_ext import shared_key_logits
        >>> query = torch.tensor([[1.0, 0.0], [3.0, 2.0]])  # two queries of two channels; their mean is (2, 1)
        >>> key = torch.tensor([[1.0, 1.0], [0.0, 2.0], [2.0, 0.0]])
        >>> shared_key_logits(query, key)
        tensor([3., 2., 4.])

    Source: Yin et al., ECCV 2020, equation 5 (the unary term of the split non-local block), unscaled, as in the paper's
    code (``with_unary``).
    """
    check_query_key(query, key, 1.0, None)
    mean = query.mean(-2, dtype=accumulate_type(query.dtype)).to(query.dtype)
    return product(key, mean.unsqueeze(-1)).squeeze(-1)


def dot_product_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention without a softmax: y_i = sum_j <q_i, k_j> v_j / Nk.

    It is computed as q (k^T v) / Nk, in O((Nq + Nk) Dqk Dv) operations and without an Nq x Nk map.

    Args:
        query: tensor (..., Nq, Dqk), float64, float32, bfloat16 or float16. The 16-bit types are widened to float32, so
            that sums over positions neither round nor overflow.
        key: tensor (..., Nk, Dqk).
        value: tensor (..., Nk, Dv). All three share dtype, device and leading dimensions.

    Returns:
        Tensor (..., Nq, Dv) of the dtype of ``query``.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype or device that does not fit.

    Example:
        >>> import torch
        >>> from dnl_ext import dot_product_attention
        >>> query, key, value = torch.randn(2, 100, 16), torch.randn(2, 80, 16), torch.randn(2, 80, 32)
        >>> output = dot_product_attention(query, key, value)
        >>> output.shape
        torch.Size([2, 100, 32])
        >>> torch.allclose(output, query @ key.mT @ value / 80, atol=1e-4)
        True

    Source: Wang et al., "Non-local Neural Networks", CVPR 2018, equation 4.
    """
    check_pairwise(query, key, value, None, 1.0, None)
    wide = accumulate_type(query.dtype)
    context = product(key.to(wide).mT, value.to(wide)) / key.shape[-2]  # (..., Dqk, Dv)
    return product(query.to(wide), context).to(query.dtype)


def concatenation_attention(query_logits: torch.Tensor, key_logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention with rectified sums for weights: y_i = sum_j relu(a_i + b_j) v_j / Nk.

    A non-local block in the mode "concatenation" weighs a pair of positions by relu(w . [q_i, k_j]). That product is a
    sum a_i + b_j of one number for each query and one for each key, which are the arguments here.

    It takes O(N log N + N Dv) operations and O(N Dv) memory: with the keys in descending order of b, those with
    a_i + b_j > 0 come first, r_i of them, and y_i = (a_i V_r + W_r) / Nk with the running sums V_r of the first r v_j
    and W_r of the first r b_j v_j. A map of at most 262,144 weights is built instead, which takes less time.
    The derivatives are those of the sums; the order is piecewise constant.

    Args:
        query_logits: a, tensor (..., Nq), float64, float32, bfloat16 or float16.
        key_logits: b, tensor (..., Nk) with Nk >= 1.
        value: tensor (..., Nk, Dv). All three share dtype, device and leading dimensions.

    Returns:
        Tensor (..., Nq, Dv) of the dtype of ``value``. The running sums are float64 whatever the inputs: a_i V + W
        cancels where logits are large and their sums small.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: a shape, dtype or device that does not fit.

    Example:
        >>> import torch
        >>> from dnl_ext import concatenation_attention
        >>> query_logits, key_logits = torch.tensor([0.0, 2.0]), torch.tensor([1.0, -1.0])
        >>> value = torch.tensor([[1.0], [10.0]])
        >>> concatenation_attention(query_logits, key_logits, value)  # weights (1, 0) / 2 and (3, 1) / 2
        tensor([[0.5000],
                [6.5000]])

    Source: Wang et al., "Non-local Neural Networks", CVPR 2018, equation 5; as in mmcv, divided by Nk.
    """
    check_tensor("value", value, "(..., Nk, Dv)")
    check_alike("key_logits", key_logits, "value", value, value.shape[:-1])
    check_tensor("query_logits", query_logits, "(..., Nq)")
    check_alike("query_logits", query_logits, "value", value, (*value.shape[:-2], query_logits.shape[-1]))
    keys = value.shape[-2]
    if not torch.jit.is_tracing() and keys == 0:
        raise ValueError(f"value: expected at least one key, got shape {tuple(value.shape)}")
    if at_once(query_logits, key_logits, value) and query_logits.numel() * keys <= SMALL_MAP:
        wide = accumulate_type(value.dtype)
        weights = torch.relu(query_logits.to(wide).unsqueeze(-1) + key_logits.to(wide).unsqueeze(-2))
        return product(weights / keys, value.to(wide)).to(value.dtype)
    with without_autocast(value):
        wide = sum_type(value)
        a, v = query_logits.to(wide), value.to(wide)
        b, order = key_logits.to(wide).sort(dim=-1, descending=True)
        v = v.gather(-2, order.unsqueeze(-1).expand(v.shape))
        first = v.new_zeros((*v.shape[:-2], 1, v.shape[-1]))
        values = torch.cat([first, v.cumsum(-2)], -2)  # (..., Nk + 1, Dv): V_0 .. V_Nk
        weighted = torch.cat([first, (b.unsqueeze(-1) * v).cumsum(-2)], -2)
        count = torch.searchsorted((-b).detach().contiguous(), a.detach().contiguous())  # -b_j < a_i
        count = count.unsqueeze(-1).expand(*count.shape, v.shape[-1])
        y = a.unsqueeze(-1) * values.gather(-2, count) + weighted.gather(-2, count)
        return (y / keys).to(value.dtype)

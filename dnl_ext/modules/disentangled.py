"""Disentangled non-local blocks of 1, 2 and 3 spatial dimensions. See :class:`DisentangledNonLocal2d`."""

from collections.abc import Sequence

from typing_extensions import Self

from ..types import Backend, BlockWhitening, Mesh, Mode, Norm, Style, SubSample, Variant
from ._block import WHITEN_NAMES, AttentionBlock
from ._common import check_choice, check_flags, check_width


class _DisentangledNonLocal(AttentionBlock):
    """See :class:`DisentangledNonLocal2d`."""

    def __init__(
        self,
        in_channels: int,
        inter_channels: int | None = None,
        value_channels: int | None = None,
        *,
        variant: Variant = "dnl",
        mode: Mode = "embedded_gaussian",
        use_out: bool = True,
        norm: Norm = "batch",
        learn_gamma: bool = False,
        qk_bias: bool = True,
        value_bias: bool = True,
        mask_bias: bool = True,
        out_bias: bool | None = None,
        use_scale: bool = True,
        temperature: float | None = None,
        sub_sample: SubSample | None = None,
        unary: bool | None = None,
        whiten: BlockWhitening | None = "channel",
        style: Style = "plain",
        backend: Backend = "fused",
        mesh: Mesh | None = None,
    ) -> None:
        super().__init__(
            in_channels, inter_channels, value_channels, variant=variant, mode=mode, use_out=use_out, norm=norm,
            learn_gamma=learn_gamma, qk_bias=qk_bias, value_bias=value_bias, mask_bias=mask_bias, out_bias=out_bias,
            use_scale=use_scale, temperature=temperature, sub_sample=sub_sample, unary=unary, whiten=whiten,
            style=style, backend=backend, mesh=mesh,
        )  # fmt: skip

    @classmethod
    def mmseg(
        cls,
        in_channels: int,
        reduction: int = 2,
        use_scale: bool = True,
        temperature: float = 0.05,
        sub_sample: bool = False,
        norm: Norm = "batch",
        *,
        mode: Mode = "embedded_gaussian",
        variant: Variant = "dnl",
        whiten: BlockWhitening | None = "channel",
        backend: Backend = "fused",
        mesh: Mesh | None = None,
    ) -> Self:
        """The ``dnl_block`` of mmsegmentation's DNLHead, with its key names.

        State dict: ``{g,theta,phi}.conv.{weight,bias}``, ``conv_out.conv.weight``, ``conv_out.bn.*`` (without a norm
        ``conv_out.conv.bias``), ``conv_mask.{weight,bias}``; with ``sub_sample`` ``g.0.conv.*`` and ``phi.0.conv.*``;
        with ``mode="concatenation"`` ``concat_project.conv.weight``; with ``"gaussian"`` neither theta nor phi.

        Args:
            in_channels: channels of the input and output; the query, key and value have ``in_channels // reduction``.
            reduction: divides the channels for query, key and value, of which at least one is left.
            use_scale: whether the logits are divided by the square root of the width of the query; for
                ``"embedded_gaussian"`` alone.
            temperature: divides the logits, above 0; for ``"embedded_gaussian"`` alone.
            sub_sample: max-pool by 2 after the convolutions of key, value and mask. mmsegmentation's raises in the
                forward: its mask keeps one logit per position while keys and values are pooled.
            norm: after ``conv_out``: ``"batch"``, a callable ``channels -> nn.Module``, or None.
            mode: as in the class. In mmsegmentation ``"gaussian"`` overwrites its input, and the backward of
                ``"concatenation"`` raises.
            variant: as in the class; the default is what mmsegmentation has.
            whiten: likewise.
            backend: as in the class.
            mesh: as in the class.

        Raises:
            ValueError: an option or width that does not fit.

        Example:
            >>> from dnl_ext import DisentangledNonLocal2d
            >>> block = DisentangledNonLocal2d.mmseg(64)
            >>> [name for name in block.state_dict() if name.startswith("theta")]
            ['theta.conv.weight', 'theta.conv.bias']

        Source: mmsegmentation 1.2.2, mmseg/models/decode_heads/dnl_head.py.
        """
        check_width("in_channels", in_channels)
        return cls(
            in_channels,
            max(in_channels // check_width("reduction", reduction), 1),
            variant=variant,
            mode=mode,
            norm=norm,
            use_scale=use_scale,
            temperature=temperature,
            sub_sample="after" if check_choice("sub_sample", sub_sample, (False, True)) else None,
            whiten=whiten,
            style="mmseg",
            backend=backend,
            mesh=mesh,
        )

    @classmethod
    def official(
        cls,
        in_channels: int,
        inter_channels: int | None = None,
        temperature: float = 0.05,
        downsample: bool = False,
        use_out: bool = False,
        out_bn: bool = False,
        whiten_type: BlockWhitening | Sequence[BlockWhitening] | None = "channel",
        with_gc: bool = True,
        *,
        with_unary: bool = False,
        with_nl: bool = True,
        use_scale: bool = True,
        backend: Backend = "fused",
        mesh: Mesh | None = None,
    ) -> Self:
        """The block of the paper's segmentation (NonLocal2d_bn, NonLocal2d_nowd) and detection (NonLocal2dGc) code.

        State dict: ``gamma``, ``conv_query.*``, ``conv_key.*``, ``conv_value.weight``, ``conv_mask.*``; with
        ``use_out`` ``conv_value.bias`` and ``conv_out.weight``; with ``out_bn`` ``out_bn.*``; with
        ``whiten_type="bn"`` ``{key,query}_bn.*``, with ``"bn_affine"`` ``{key,query}_bn_affine.*``.

        Args:
            in_channels: channels of the input and output, ``inplanes`` in the original.
            inter_channels: width of query and key, ``planes`` in the original, or in detection ``int(inplanes *
                ratio)``; default ``in_channels // 2``.
            temperature: divides the logits, above 0.
            use_out: whether there is an out-projection ``conv_out``.
            out_bn: whether a batch norm follows.
            downsample: whether keys, values and the mask see the input max-pooled by 2.
            whiten_type: a name that :func:`dnl_ext.whiten` knows, ``"bn"`` or ``"bn_affine"``, alone or in a list, or
                None or an empty list for none. Any other raises; in the original, unknown names whiten nothing.
            with_gc: whether there is a unary term with a convolution of its own, ``conv_mask``.
            with_unary: whether there is a unary term that shares its keys with the pairwise one, in place of
                ``with_gc``.
            with_nl: whether there is a pairwise term. Without it there are no ``gamma``, ``conv_query`` and
                ``conv_key`` either.
            use_scale: as in the class.
            backend: as in the class.
            mesh: as in the class.

        In 1-d and 3-d the original works without the unary term only; here it means the same as in 2-d. With
        ``with_unary`` its logits are those of ``"channel"`` whitening, whatever ``whiten_type`` is.

        Raises:
            ValueError: an option or width that does not fit.

        Example:
            >>> from dnl_ext import DisentangledNonLocal2d
            >>> block = DisentangledNonLocal2d.official(64, whiten_type=["channel"])
            >>> list(block.state_dict())[:3]
            ['gamma', 'conv_query.weight', 'conv_query.bias']

        Source: the code that Yin et al. published with "Disentangled Non-Local Neural Networks", ECCV 2020.
        """
        if isinstance(whiten_type, (list, tuple)) and len(whiten_type) < 2:
            whiten_type = whiten_type[0] if whiten_type else None
        whiten = check_choice("whiten_type", whiten_type, WHITEN_NAMES)
        check_flags(with_gc=with_gc, with_unary=with_unary, with_nl=with_nl, out_bn=out_bn, downsample=downsample)
        if with_gc and with_unary:
            raise ValueError("with_unary: expected False with with_gc=True, one unary term, got True")
        if not with_nl and not with_gc:
            raise ValueError("with_nl: expected True without with_gc, a block of no terms, got False")
        variant: Variant = "dnl_shared_key" if with_unary else "dnl" if with_gc else "pairwise"
        return cls(
            in_channels,
            inter_channels,
            variant=variant if with_nl else "unary",
            use_out=use_out,
            norm="batch" if out_bn else None,
            learn_gamma=with_nl,
            value_bias=use_out,
            out_bias=False,
            use_scale=use_scale,
            temperature=temperature,
            sub_sample="before" if downsample else None,
            whiten=whiten if with_nl else None,
            style="official",
            backend=backend,
            mesh=mesh,
        )


class DisentangledNonLocal1d(_DisentangledNonLocal):
    """Disentangled non-local block on (B, C, L); arguments as :class:`DisentangledNonLocal2d`, sub-sampling by 2.

    Example:
        >>> import torch
        >>> from dnl_ext import DisentangledNonLocal1d
        >>> DisentangledNonLocal1d(16)(torch.randn(2, 16, 50)).shape
        torch.Size([2, 16, 50])
    """

    dims = 1


class DisentangledNonLocal2d(_DisentangledNonLocal):
    """Disentangled non-local block on (B, C, H, W), in memory linear in the number of positions N = H W.

    It adds to each position a weighted sum of all positions. A weight is a pairwise attention weight P_ij, from query
    and key that have lost their means over positions (whitening), plus a unary one u_j that is the same for every
    query. With q, k, v, m 1x1 convolutions of the input x::

        out_i = x_i + norm(conv_out(gamma * sum_j P_ij v_j + sum_j u_j v_j))
        P_ij = softmax_j(<q_i - mean(q), k_j - mean(k)> / (sqrt(inter_channels) * temperature))
        u_j = softmax_j(m_j)

    :meth:`mmseg` and :meth:`official` make the blocks of mmsegmentation and of the paper's code, with their state
    dicts.

    Args:
        in_channels: channels C of the input and the output.
        inter_channels: width of query and key; default ``in_channels // 2``.
        value_channels: width of the value; default ``inter_channels``. Without an out-projection only ``in_channels``
            fits, and is the default.
        variant: which terms the block has. ``"dnl"``: both, with a convolution of its own for the unary logits
            (``conv_mask``). ``"dnl_shared_key"``: both, with the unary logits m_j = <mean(q), k_j>. ``"pairwise"``,
            ``"unary"``: one alone. ``"nl"``: the standard non-local block, the pairwise term alone and not whitened.
        mode: what the pairwise weights are. ``"embedded_gaussian"``: P above. ``"gaussian"``: softmax_j <x_i, x_j>,
            whitened, without convolutions of query and key, scale and temperature. ``"dot_product"``: <q'_i, k'_j> / N
            with q' and k' whitened. ``"concatenation"``: relu(w_q . q'_i + w_k . k'_j) / N with the weight (w_q, w_k)
            of ``concat_project``.
        use_out: whether there is an out-projection ``conv_out``.
        norm: the layer behind it: ``"batch"``, a callable ``channels -> nn.Module`` such as
            ``functools.partial(nn.GroupNorm, 32)``, or None.
        learn_gamma: whether the pairwise term (not the unary one) is multiplied by a learned scalar ``gamma`` that
            starts at 0. Without it gamma is the constant 1, and both terms are one call of the fused operator.
        qk_bias: whether the convolutions of query and key have biases. Where these are whitened, they change nothing
            and their gradients are zero. Checkpoints have them.
        value_bias: whether the convolution of the value has a bias.
        mask_bias: whether that of the mask has one, which changes nothing: its gradient is zero. Checkpoints have it.
        out_bias: bias of ``conv_out``; None means: where no norm follows.
        use_scale: whether the logits are divided by ``sqrt(inter_channels)``.
        temperature: divides the logits, above 0; None is the paper's 0.05, and 1 for ``"nl"``.
        sub_sample: max-pool by 2 in H and W ``"before"`` the convolutions of key, value and mask (the official code),
            ``"after"`` them (mmcv), or None. All three are pooled, since every key needs its own value and mask logit;
            queries are not, and the output keeps its size.
        unary: None, or whether there is a unary term, which must agree with ``variant``. False with ``"dnl"`` is
            another name of ``"pairwise"``.
        whiten: ``"channel"`` (the paper's), any other name of :func:`dnl_ext.whiten`, None, or ``"bn"`` and
            ``"bn_affine"``: batch norms of query and key, without and with weights, with running statistics.
        style: names of the layers in the state dict, and their initialisation: ``"plain"`` (``conv_query``,
            ``conv_key``, ``conv_value``, ``conv_mask``, ``conv_out``, ``norm``, ``gamma``), ``"mmseg"`` or
            ``"official"``.
        backend: ``"fused"``, or ``"reference"``: plain PyTorch with the N x N map.
        mesh: DeviceMesh of one dimension, or ProcessGroup, over whose ranks the feature map is sharded by rows: the
            block takes and gives slabs of rows, see :func:`dnl_ext.distributed.shard_positions`. None: whole maps.

    Initialisation: convolutions normal with deviation 0.01 and zero bias; the norm's weight (that of ``conv_out`` where
    there is no norm) zero, so that the block starts as the identity, except where a learned gamma without a unary term
    does that alone. ``"mmseg"``: ``conv_out`` Kaiming normal and ``conv_mask`` PyTorch's default. ``"official"``:
    nothing is zero but gamma, so its unary term acts from the start.

    Raises:
        ValueError: an option or width that does not fit.
        NotImplementedError: with a mesh, an option that mixes positions in a way that does not shard.

    Example:
        >>> import torch
        >>> from dnl_ext import DisentangledNonLocal2d
        >>> block = DisentangledNonLocal2d(in_channels=64)
        >>> features = torch.randn(2, 64, 12, 16, requires_grad=True)
        >>> output = block(features)
        >>> output.shape
        torch.Size([2, 64, 12, 16])
        >>> output.sum().backward()

    Source: Yin et al., "Disentangled Non-Local Neural Networks", ECCV 2020, equation 10.
    """

    dims = 2


class DisentangledNonLocal3d(_DisentangledNonLocal):
    """Disentangled non-local block on (B, C, T, H, W); arguments as :class:`DisentangledNonLocal2d`.

    Attention is over all T H W positions. Sub-sampling pools H and W by 2 and leaves T alone.

    Example:
        >>> import torch
        >>> from dnl_ext import DisentangledNonLocal3d
        >>> DisentangledNonLocal3d(16)(torch.randn(2, 16, 3, 8, 8)).shape
        torch.Size([2, 16, 3, 8, 8])
    """

    dims = 3

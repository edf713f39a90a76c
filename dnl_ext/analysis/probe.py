"""Statistics of every non-local block of a network, gathered by forward hooks while images run through it."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any

import torch
from torch import nn
from typing_extensions import Self

from ..modules import AttentionInputs
from ..types import Joint
from .blocks import NotAttention, adapter, block_inputs
from .consistency import labels_on_grid
from .measure import QUERIES, AttentionStatistics, measure_terms
from .results import Estimate, over_images, to_dict
from .tables import markdown
from .terms import split_images


@dataclasses.dataclass
class BlockReport:
    """Statistics of one block of a network, over all images that it has seen.

    Attributes:
        name: the block's name in the network.
        images: one :class:`AttentionStatistics` for each image (and head).

    Example:
        >>> from dnl_ext.analysis import BlockReport
        >>> report = BlockReport("layer4.block")
        >>> report.joint, report.summary()  # nothing seen yet
        (None, {})
    """

    name: str
    images: list[AttentionStatistics] = dataclasses.field(default_factory=list)

    @property
    def joint(self) -> Joint | None:
        """How the block joins its terms, "product", "sum", "pairwise" or "unary"; None before the first image."""

        return self.images[0].joint if self.images else None

    def summary(self) -> dict[str, Estimate]:
        """Mean over images of every figure: {"pairwise.jsd": Estimate}, whose error is that over images."""
        return over_images(self.images)

    def to_dict(self) -> dict[str, Any]:
        """{"name", "joint", "images": number, "summary", "per_image"} of plain numbers."""
        return {
            "name": self.name, "joint": self.joint, "images": len(self.images),
            "summary": to_dict(self.summary()), "per_image": [image.to_dict() for image in self.images],
        }  # fmt: skip


class AttentionProbe:
    """Context in which the non-local blocks of a network are measured at every forward.

    Each forward costs a block a second pass over its input projections and a fraction of its attention; nothing of Nq x
    Nk is kept. The results of the network are not changed: for its second pass a block is in evaluation mode, in which
    batch norms count nothing and dropout draws nothing. Hooks on its projections run twice.

    Args:
        model: any nn.Module. Its blocks are the modules with a method ``attention_inputs``, and plain-PyTorch blocks of
            other code that :func:`block_inputs` knows.
        queries: random queries per image, None for all; see :func:`measure_terms`.
        seed: of everything random.

    Attributes:
        blocks: dict of a :class:`BlockReport` for each block, by its name in the network.
        labels: class numbers of the next forward's pixels, int64 tensor ``(B, *image_shape)``, or None; 255 is no
            class.
        skipped: dict of the reasons why blocks are left out, such as no softmax over positions, or no input of two
            positions and more, by name.

    Raises:
        ValueError: the network has no block.

    Example:
        >>> import torch
        >>> from dnl_ext import NonLocal2d
        >>> from dnl_ext.analysis import AttentionProbe
        >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), NonLocal2d(8))
        >>> with AttentionProbe(network) as probe:
        ...     _ = probe.run([torch.randn(2, 3, 12, 12)], progress=False)  # a loader of images, or of (images, labels)
        >>> len(probe.blocks["1"].images), probe.blocks["1"].joint
        (2, 'product')

    With a forward of your own: ``probe.labels = labels; network(images)``. :meth:`table` gives the figures as text.
    """

    def __init__(self, model: nn.Module, queries: int | None = QUERIES, seed: int = 0) -> None:
        self.model: nn.Module = model
        self.queries: int | None = queries
        self.labels: torch.Tensor | None = None
        self.generator: torch.Generator = torch.Generator().manual_seed(seed)
        self._found: dict[str, nn.Module] = {
            name: module for name, module in model.named_modules() if adapter(module) is not None
        }
        if not self._found:
            raise ValueError(f"model: {type(model).__name__} has no non-local block that the analysis knows")
        self.blocks: dict[str, BlockReport] = {name: BlockReport(name) for name in self._found}
        self.skipped: dict[str, str] = {}
        self._too_few: set[str] = set()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, module in self._found.items():
            self._handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._name_what_is_empty()

    def _name_what_is_empty(self) -> None:
        for name in self._too_few - self.skipped.keys():
            if not self.blocks[name].images:
                self.skipped[name] = "fewer than two queries or keys"
                del self.blocks[name]

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module, args, kwargs, output):
            if name not in self.skipped:
                x = args[0] if args else next(iter(kwargs.values()))
                with torch.no_grad(), evaluation(module):
                    self._measure(name, module, x, output)

        return hook

    def _measure(self, name: str, module: nn.Module, x: torch.Tensor, output: torch.Tensor) -> None:
        try:
            inputs = block_inputs(module, x)
        except (NotAttention, NotImplementedError) as error:
            self.skipped[name] = str(error)
            self.blocks.pop(name, None)
            return
        with torch.autocast(x.device.type, enabled=False):  # the inputs are what it made them; sums over them are not
            self._measure_images(name, inputs, x, output)

    def _measure_images(self, name: str, inputs: AttentionInputs, x: torch.Tensor, output: torch.Tensor) -> None:
        if min(math.prod(inputs.query_shape), math.prod(inputs.key_shape)) < 2:
            self._too_few.add(name)  # nothing can be said of them
            return
        images = x.shape[0]
        terms = list(split_images(inputs))
        heads = len(terms) // max(images, 1)
        for number, entry in enumerate(terms):
            image = number // heads
            labels = None
            if self.labels is not None:
                label = self.labels[image]
                labels = (labels_on_grid(label, inputs.query_shape), labels_on_grid(label, inputs.key_shape))
            statistics = measure_terms(
                entry, self.queries, labels=labels, generator=self.generator,
                inputs=x[image].flatten(1).T, outputs=output[image].flatten(1).T,
            )  # fmt: skip
            self.blocks[name].images.append(statistics)

    def _forward(self, images: torch.Tensor) -> Any:
        device = next((p.device for p in self.model.parameters()), images.device)
        return self.model(images.to(device))

    @torch.no_grad()
    def run(
        self,
        loader: Iterable[Any],
        *,
        forward: Callable[[torch.Tensor], object] | None = None,
        progress: bool | Callable[[int, int | None], object] = True,
    ) -> Self:
        """Pass every batch of a loader through the network, in evaluation mode.

        Args:
            loader: iterable of images ``(B, C, *shape)``, or of sequences that begin with them; what comes second is
                taken as labels ``(B, *shape)`` int64 where it has a dimension less than the images. All else is left
                alone.
            forward: called with the images; None is the network, on the device of its first parameter.
            progress: a rich bar where rich is installed, or a callable ``progress(done, total or None)`` in batches.

        Returns:
            self.
        """
        forward = self._forward if forward is None else forward
        total = len(loader) if isinstance(loader, Sized) else None
        try:
            with evaluation(self.model), progress_bar(progress, total) as advance:
                for done, batch in enumerate(loader, 1):
                    images, self.labels = images_and_labels(batch)
                    forward(images)
                    advance(done, total)
        finally:
            self.labels = None
        self._name_what_is_empty()
        return self

    def summary(self) -> dict[str, dict[str, Estimate]]:
        """{block name: {figure: Estimate over images}}."""
        return {name: report.summary() for name, report in self.blocks.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers of all blocks and images, for JSON."""
        return {"blocks": [report.to_dict() for report in self.blocks.values()], "skipped": self.skipped}

    def table(self) -> str:
        """The summary as a Markdown table, a column per block."""
        return markdown(self.blocks.values())


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards each of its modules in the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def images_and_labels(batch: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Images (B, C, *shape) and labels (B, *shape) of a batch; None where what comes second is something else."""
    if isinstance(batch, torch.Tensor):
        return batch, None
    images, labels = batch[0], batch[1] if len(batch) > 1 else None
    if not isinstance(labels, torch.Tensor) or labels.dim() != images.dim() - 1:
        return images, None
    if labels.shape[0] != images.shape[0]:
        raise ValueError(f"labels: expected those of {images.shape[0]} images, got shape {tuple(labels.shape)}")
    return images, labels


@contextlib.contextmanager
def progress_bar(
    progress: bool | Callable[[int, int | None], object], total: int | None
) -> Iterator[Callable[[int, int | None], object]]:
    """A function (done, total): the caller's, a rich bar's, or one that does nothing."""
    if callable(progress):
        yield progress
        return
    try:
        if not progress:
            raise ImportError
        from rich.progress import Progress
    except ImportError:
        yield lambda done, total: None
        return
    with Progress(transient=True) as bar:
        task = bar.add_task("measuring attention", total=total)
        yield lambda done, total: bar.update(task, completed=done)

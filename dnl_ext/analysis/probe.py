"""Statistics of every non-local block of a network, gathered by forward hooks while images run through it."""

import contextlib
import dataclasses

import torch

from .blocks import NotAttention, adapter
from .consistency import labels_on_grid
from .measure import QUERIES, measure_terms
from .results import over_images, to_dict
from .tables import markdown
from .terms import split_images


@dataclasses.dataclass
class BlockReport:
    """All images that one block has seen.

    name: the block's name in the network. images: one :class:`measure.AttentionStatistics` per image (and head).
    """

    name: str
    images: list = dataclasses.field(default_factory=list)

    @property
    def joint(self):
        return self.images[0].joint if self.images else None

    def summary(self):
        """Mean over images of every figure: {"pairwise.jsd": Estimate}, whose error is that over images."""
        return over_images(self.images)

    def to_dict(self):
        """{"name", "joint", "images": number, "summary", "per_image"} of plain numbers."""
        return {
            "name": self.name, "joint": self.joint, "images": len(self.images),
            "summary": to_dict(self.summary()), "per_image": [image.to_dict() for image in self.images],
        }  # fmt: skip


class AttentionProbe:
    """Context in which a network's non-local blocks are measured at every forward::

        with AttentionProbe(network) as probe:
            probe.run(loader)  # of images, or of (images, labels)
        print(probe.table())

    or, with a forward of your own, ``probe.labels = labels; network(images)``.

    Args:
        model: any nn.Module. Its blocks are the modules with ``attention_inputs`` and those of
            ``dnl_ext.analysis.blocks.KINDS`` (eager blocks of other code).
        queries: random queries per image, None for all; see :func:`measure_terms`.
        seed: of everything random.

    Attributes:
        blocks: {name: :class:`BlockReport`}. labels: class numbers ``(B, *image_shape)`` int64 of the next forward, or
            None; 255 is no class. skipped: {name: why} of blocks that have no softmax over positions.

    Raises:
        ValueError: the network has no block.

    Its forwards cost each block a second pass over its input projections and a fraction of its attention; nothing of
    Nq x Nk is kept. The network's results are not changed.
    """

    def __init__(self, model, queries=QUERIES, seed=0):
        self.model, self.queries, self.labels = model, queries, None
        self.generator = torch.Generator().manual_seed(seed)
        self._found = {name: module for name, module in model.named_modules() if adapter(module) is not None}
        if not self._found:
            raise ValueError(f"model: {type(model).__name__} has no non-local block that the analysis knows")
        self.blocks = {name: BlockReport(name) for name in self._found}
        self.skipped, self._handles = {}, []

    def __enter__(self):
        for name, module in self._found.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self

    def __exit__(self, *_):
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _hook(self, name):
        def hook(module, args, output):
            if name not in self.skipped:
                with torch.no_grad():
                    self._measure(name, module, args[0], output)

        return hook

    def _measure(self, name, module, x, output):
        try:
            inputs = adapter(module)(x)
        except (NotAttention, NotImplementedError) as error:
            self.skipped[name] = str(error)
            self.blocks.pop(name, None)
            return
        with torch.autocast(x.device.type, enabled=False):  # the inputs are what it made them; sums over them are not
            self._measure_images(name, inputs, x, output)

    def _measure_images(self, name, inputs, x, output):
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

    def _forward(self, images):
        device = next((p.device for p in self.model.parameters()), images.device)
        return self.model(images.to(device))

    @torch.no_grad()
    def run(self, loader, *, forward=None, progress=True):
        """Pass every batch of a loader through the network, in evaluation mode.

        Args:
            loader: iterable of images ``(B, C, *shape)``, or of (images, labels ``(B, *shape)`` int64); what else a
                batch holds is left alone.
            forward: called with the images; None is the network, on the device of its first parameter.
            progress: a rich bar where rich is installed, or a callable ``progress(done, total or None)`` in batches.

        Returns:
            self.
        """
        forward = self._forward if forward is None else forward
        training = self.model.training
        self.model.eval()
        total = len(loader) if hasattr(loader, "__len__") else None
        try:
            with progress_bar(progress, total) as advance:
                for done, batch in enumerate(loader, 1):
                    images, self.labels = (batch, None) if isinstance(batch, torch.Tensor) else (batch[0], batch[1])
                    forward(images)
                    advance(done, total)
        finally:
            self.labels = None
            self.model.train(training)
        return self

    def summary(self):
        """{block name: {figure: Estimate over images}}."""
        return {name: report.summary() for name, report in self.blocks.items()}

    def to_dict(self):
        """Plain numbers of all blocks and images, for JSON."""
        return {"blocks": [report.to_dict() for report in self.blocks.values()], "skipped": self.skipped}

    def table(self):
        """The summary as a Markdown table, a column per block."""
        return markdown(self.blocks.values())


@contextlib.contextmanager
def progress_bar(progress, total):
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

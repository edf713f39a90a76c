"""The training loop: the same settings and seed give the same weights, in one run or in several.

A step is a function of the weights, the optimizer's state and the step's number: which images it sees, their order and
augmentation are drawn from (seed, number of the image), the learning rate from the number of the step. So a run that
resumes from a checkpoint continues bit for bit on a CPU with as many threads, and the number of processes that share a
batch (distributed.py) decides the order of sums only.
"""

import dataclasses
import signal
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from typing_extensions import Self

from ..backbones import TimmBackbone
from ..data.context import ContextData
from ..data.folders import FolderData
from ..data.mosaic import MosaicData
from ..errors import InputError, Interrupted, described
from ..metrics import Confusion
from ..network import FeatureHead, prepare
from . import checkpoint, distributed
from .class_weights import class_weights
from .config import TrainConfig
from .feature_cache import FeatureCache
from .log import CsvLog
from .loss import pixel_weight, segmentation_loss
from .prediction import autocast, predict
from .sync_norm import sync_norms
from .trained import build

#: The data sets have one interface.
Data: TypeAlias = MosaicData | FolderData

CHECKPOINT = "checkpoint.pt"
LOG = "log.csv"
FEATURES = "features"
WARM_UP = 10


def pick_device(name: str) -> torch.device:
    """The device for ``auto``, ``cpu``, ``cuda`` or ``cuda:1``. Raises InputError where there is none.

    Of several processes each takes the GPU of its number on the machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device must be auto, cpu, cuda or cuda:N, got {name}") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device must be auto, cpu, cuda or cuda:N, got {name}")
    if device.type == "cuda" and distributed.is_distributed():
        if device.index is not None:
            raise InputError(f"--device must be auto, cpu or cuda for several processes, one GPU each, got {name}")
        device = torch.device("cuda", distributed.local_rank())
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device {device}: PyTorch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices"
        )
    return device


def open_data(config: TrainConfig, split: str = "val") -> Data:
    """The data set that the settings name, built-in or of a folder.

    Args:
        config: a :class:`TrainConfig`.
        split: the part that is validated on, "val" or "test".

    Raises:
        InputError: the folder cannot be used or has no such part, or what belongs to a folder is given without one.

    Example:
        >>> from dnl_ext.segmentation.training import TrainConfig, open_data
        >>> open_data(TrainConfig(task="context", crop=(64, 128), val_images=2)).summary
        'training images without end, 256 an epoch, and 2 validation images'
    """
    if config.data is None:
        if config.layout is not None or config.classes is not None:
            raise InputError("--layout and --classes belong to --data DIR")
        if split != "val":
            raise InputError(f"--split {split} belongs to --data DIR: built-in data have validation images alone")
        builtin = {"mosaic": MosaicData, "context": ContextData}[config.task]
        return builtin(config.crop, config.val_images or 8)
    return FolderData(config.data, config.layout, config.classes, config.val_images, split)


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step, counted from 0: a linear warm-up of 10 steps, then polynomial decay of power 0.9.

    Example:
        >>> from dnl_ext.segmentation.training import TrainConfig, learning_rate
        >>> config = TrainConfig(steps=100, lr=0.01)
        >>> [round(learning_rate(config, step), 5) for step in (0, 10, 99)]
        [0.001, 0.0091, 0.00016]
    """
    warm = min(1.0, (step + 1) / min(WARM_UP, config.steps))
    return config.lr * warm * max(0.0, 1 - step / config.steps) ** 0.9


class StopFlag:
    """Context in which Ctrl-C and SIGTERM set ``signum`` instead of raising; a second Ctrl-C raises as usual.

    The loop stops at the next end of a step, where the state is whole. Outside the main thread it does nothing.
    """

    signum: int | None = None

    def __enter__(self) -> Self:
        self.previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self.previous[signum] = signal.signal(signum, self._handle)
        return self

    def _handle(self, signum: int, _frame: object) -> None:
        self.signum = signum
        signal.signal(signum, self.previous[signum])

    def __exit__(self, *_: object) -> None:
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)


class Listener:
    """What :meth:`Trainer.run` reports to. This one is silent: derive from it what writes, draws or stops.

    Example:
        >>> from dnl_ext.segmentation.training import Listener, TrainConfig, Trainer
        >>> class Losses(Listener):
        ...     def __init__(self):
        ...         self.values = []
        ...     def step(self, step, loss, rate, seconds):
        ...         self.values.append(loss)
        >>> losses = Losses()
        >>> Trainer(TrainConfig(steps=2, crop=(32, 32), batch_size=1, width=4, val_images=1)).run(losses)
        >>> len(losses.values)
        2
    """

    def step(self, step: int, loss: float, rate: float, seconds: float) -> None:
        """Called after each step with its number from 1, its loss, its learning rate and the seconds that it took."""

    def validation(self, step: int, done: int, total: int, miou: float | None) -> None:
        """Called during validation after ``done`` of ``total`` images; ``miou`` is None until all are done."""

    def encoding(self, done: int, total: int) -> None:
        """Called after ``done`` of the ``total`` images whose features were missing, where the encoder is frozen."""


class Trainer:
    """One training run of a :class:`~dnl_ext.segmentation.SegmentationNetwork`.

    Settings and seed determine the weights: on a CPU, a run that was stopped and resumed gives the same bits as one
    that was not. Of several processes each makes a trainer, with the same arguments.

    Args:
        config: a :class:`TrainConfig`.
        out: folder for the checkpoint and the log; None writes nothing.
        state: checkpoint to continue, from :func:`checkpoint.load`; ``state_path`` names it in messages.
        init: checkpoint whose weights to begin with, of the same variant or without a block; ``init_path`` names it.
        data: a data set with the attributes and methods of :class:`~dnl_ext.segmentation.data.MosaicData`; None opens
            the one that the settings name.

    Attributes:
        config: the settings, with the number of threads that is used.
        data: the data set.
        network: the network that is trained.
        model: the network as a step calls it; its gradients are averaged over all processes.
        out: the folder, or None.
        step: number of finished steps.
        features: the cache of a frozen encoder's features, else None.
        head: the network, or where the encoder is frozen what is behind it.
        class_weights: of the loss, float32 tensor (classes,), or None.
        miou: mean intersection over union of the latest validation, 0 .. 1; None before the first.

    Raises:
        InputError: settings, data or a checkpoint that cannot be used.

    Example:
        >>> from dnl_ext.segmentation.training import TrainConfig, Trainer, checkpoint
        >>> config = TrainConfig(steps=3, crop=(32, 32), batch_size=1, width=4, val_images=1)
        >>> Trainer(config, "run").run(stop_after=1)  # writes run/checkpoint.pt and run/log.csv
        >>> trainer = Trainer(config, "run", state=checkpoint.load("run/checkpoint.pt"))
        >>> trainer.run()
        >>> trainer.step, trainer.predict(trainer.data.validation_sample(0)[0]).shape
        (3, torch.Size([32, 32]))
    """

    def __init__(
        self,
        config: TrainConfig,
        out: str | Path | None = None,
        *,
        state: dict[str, Any] | None = None,
        state_path: str | Path | None = None,
        init: dict[str, Any] | None = None,
        init_path: str | Path | None = None,
        data: Data | None = None,
    ) -> None:
        distributed.together(self._open, config, out, state, state_path, init, init_path, data)
        self.head: nn.Module = self.network if self.features is None else FeatureHead(self.network)
        self.model: nn.Module = distributed.parallel(self.head, self.device)

    def _open(
        self,
        config: TrainConfig,
        out: str | Path | None,
        state: dict[str, Any] | None,
        state_path: str | Path | None,
        init: dict[str, Any] | None,
        init_path: str | Path | None,
        data: Data | None,
    ) -> None:
        """All of the constructor that can fail in one process alone."""
        for parts, path in ((state, state_path), (init, init_path)):
            if parts is not None:
                checkpoint.check_parts(parts, path)
        self.device: torch.device = pick_device(config.device)
        if config.batch_size % distributed.world_size():
            raise InputError(
                f"--batch-size must be a multiple of the {distributed.world_size()} processes that share it, "
                f"got {config.batch_size}"
            )
        if self.device.type == "cuda" and distributed.is_distributed():
            torch.cuda.set_device(self.device)  # where NCCL and SyncBatchNorm look
        if config.threads:
            torch.set_num_threads(config.threads)
        config = dataclasses.replace(config, threads=torch.get_num_threads())
        self.config: TrainConfig = config
        self.data: Data = open_data(config) if data is None else data
        if state is not None and tuple(state["classes"]) != tuple(self.data.classes):
            raise InputError(
                f"checkpoint {state_path} has {len(state['classes'])} classes, the data {len(self.data.classes)}"
                if len(state["classes"]) != len(self.data.classes)
                else f"checkpoint {state_path} has other classes than the data"
            )
        self.class_weights: torch.Tensor | None = None
        if state is not None and state.get("class_weights") is not None:
            self.class_weights = state["class_weights"]
        elif config.class_weights is not None:
            self.class_weights = class_weights(config.class_weights, self.data)
        if self.class_weights is not None:
            self.class_weights = self.class_weights.to(self.device, getattr(torch, config.dtype))
        torch.manual_seed(config.seed)
        self.network: Any = build(config, len(self.data.classes), fresh=state is None and init is None)
        if init is not None:
            checkpoint.load_weights(self.network, init, init_path, partial=True)
        if distributed.is_distributed():
            for child in self.network.children():
                if not isinstance(child, TimmBackbone):  # whose norms keep their statistics
                    sync_norms(child, self.device)
        prepare(self.network.to(getattr(torch, config.dtype)), self.device)
        groups = [
            {"params": [p for n, p in self.network.named_parameters() if not n.startswith("encoder.")], "factor": 1.0}
        ]
        if not config.freeze_backbone:
            groups.insert(0, {"params": list(self.network.encoder.parameters()), "factor": config.encoder_lr})
        self.optimizer: torch.optim.Optimizer
        if config.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(groups, config.lr, momentum=0.9, weight_decay=config.weight_decay)
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
        self.step: int = 0
        self.validated: int = 0
        self.miou: float | None = None
        self.confusion: Confusion | None = None
        self.step_seconds: list[float] = []
        if state is not None:
            self._restore(state, state_path)
        self.out: Path | None = None if out is None else Path(out)
        self.features: FeatureCache | None = None
        if config.freeze_backbone:
            folder = config.feature_cache or (self.out and self.out / FEATURES)
            if folder is None:
                raise InputError("--freeze-backbone needs a folder for its features: --feature-cache DIR")
            self.features = FeatureCache(self.network, self.data, folder)
        self.log: CsvLog | None = None
        if self.out is not None and distributed.is_main():
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                self.log = CsvLog(self.out / LOG, self.step)
            except OSError as error:
                raise InputError(f"cannot write to {self.out}: {error.strerror}") from None

    def _restore(self, state: dict[str, Any], path: str | Path | None) -> None:
        checkpoint.load_weights(self.network, state, path)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.validated, self.miou = state["step"], state["validated"], state["miou"]
            torch.set_rng_state(state["rng"])
            if self.device.type == "cuda" and state["cuda_rng"] is not None:
                torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"checkpoint {path} cannot be resumed: {described(error)}") from None

    def state(self) -> dict[str, Any]:
        """All that a run needs to continue: what :func:`checkpoint.save` writes."""
        on_cuda = self.device.type == "cuda"
        return {
            "format": checkpoint.FORMAT,
            "config": dataclasses.asdict(self.config),
            "classes": list(self.data.classes),
            "data": self.data.name,
            "step": self.step,
            "validated": self.validated,
            "miou": self.miou,
            "class_weights": None if self.class_weights is None else self.class_weights.cpu(),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if on_cuda else None,
        }

    @property
    def checkpoint_path(self) -> Path | None:
        """Where :meth:`save` writes, None without a folder."""
        return None if self.out is None else self.out / CHECKPOINT

    def save(self) -> None:
        """Write the checkpoint, where there is an ``out`` folder: the main process does, and all wait for it."""
        if self.out is not None:
            distributed.together(self._save)

    def _save(self) -> None:
        if distributed.is_main() and self.checkpoint_path is not None:
            checkpoint.save(self.state(), self.checkpoint_path)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Training batch of a step, on the CPU: images (B, 3, h, w) float32 and labels (B, h, w) int64.

        Each of P processes has B = batch_size / P crops. With a frozen encoder they are its features (B, C, h/8, w/8).
        """
        config, first = self.config, step * self.config.batch_size
        numbers = distributed.share(config.batch_size)
        samples = (self.source.training_sample(config.seed, first + n, config.crop) for n in numbers)
        images, labels = zip(*samples, strict=True)
        return torch.stack(images).contiguous(memory_format=torch.channels_last), torch.stack(labels)

    def train_step(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        """One update of the weights; returns the loss over the batch of all processes."""
        rate = learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.network.train()
        stride = self.config.label_stride
        labels = labels[:, stride // 2 :: stride, stride // 2 :: stride].to(self.device, non_blocking=True)
        counted = distributed.total(pixel_weight(labels, self.class_weights))
        with autocast(self.config.amp, self.device):
            outputs = self.model(images.to(self.device, non_blocking=True), labels.shape[-2:])
        logits, auxiliary = outputs if self.config.aux_weight else (outputs, None)
        loss = segmentation_loss(logits, labels, counted, self.class_weights)
        if auxiliary is not None:
            loss = loss + self.config.aux_weight * segmentation_loss(auxiliary, labels, counted, self.class_weights)
        self.optimizer.zero_grad(set_to_none=True)
        # The processes' gradients are averaged, those of a sum over all pixels are wanted.
        (loss * distributed.world_size()).backward()
        self.optimizer.step()
        self.step += 1
        return float(distributed.total(loss.detach()))

    @property
    def source(self) -> "Data | FeatureCache":
        """The data or, where the encoder is frozen, its features, with the same methods for samples."""
        return self.data if self.features is None else self.features

    def predict(self, image: torch.Tensor) -> torch.Tensor:
        """Predicted classes (H, W) int64, on the CPU, of an image (3, H, W) in 0 .. 1."""
        return predict(self.network.eval(), image, self.device, self.config.amp)

    @torch.inference_mode()
    def evaluate(self, samples: torch.Tensor, size: Sequence[int] | None = None) -> torch.Tensor:
        """Logits (B, classes, H, W) of ``size`` (None: that of the samples) for samples as ``source`` has them."""
        self.network.eval()
        with autocast(self.config.amp, self.device):
            return self.head(samples.to(self.device), samples.shape[-2:] if size is None else size)

    def _confusion(self, listener: Listener, stop: StopFlag) -> Confusion:
        """Counts over this process's part of the validation images, and fewer of them where ``stop`` is set."""
        confusion, size = Confusion(len(self.data.classes)), self.data.validation_size
        for index in range(distributed.rank(), size, distributed.world_size()):
            if stop.signum:
                break
            sample, label = self.source.validation_sample(index)
            confusion.add(label, self.evaluate(sample[None], label.shape).argmax(1)[0].cpu())
            listener.validation(self.step, min(index + distributed.world_size(), size), size, None)
        return confusion

    def validate(self, listener: Listener, stop: StopFlag) -> None:
        """Measure the mIoU over the validation images, for ``miou``; it stays as it is where ``stop`` is set."""
        confusion = distributed.together(self._confusion, listener, stop)
        if distributed.largest(stop.signum or 0):
            return
        confusion.counts = distributed.total(confusion.counts)
        self.validated, self.miou, self.confusion = self.step, confusion.miou(), confusion
        listener.validation(self.step, self.data.validation_size, self.data.validation_size, self.miou)
        if self.log:
            self.log.write(step=self.step, epoch=self.epoch, miou=None if self.miou is None else round(self.miou, 5))

    @property
    def epoch(self) -> float:
        """Passes over the training images so far, as in 1.25."""
        return round(self.step * self.config.batch_size / self.data.epoch, 4)

    def run(self, listener: Listener | None = None, stop_after: int | None = None) -> None:
        """Train to the last step, validating and saving on the way.

        Args:
            listener: a :class:`Listener`.
            stop_after: save and return after this many steps in all, as if interrupted without a signal.

        Raises:
            InputError: bad data or a loss that is not finite. What was trained before is saved.
            Interrupted: Ctrl-C or SIGTERM. The state is saved.
        """
        config, listener = self.config, listener or Listener()
        with StopFlag() as stop, ThreadPoolExecutor(config.workers) as pool:
            if self.features is not None:
                distributed.together(self.features.fill, listener.encoding, lambda: stop.signum)
            pending = {}
            while True:
                last = self.step >= config.steps
                due = last or (config.val_every and self.step and self.step % config.val_every == 0)
                try:
                    if due and self.validated != self.step:
                        self.validate(listener, stop)
                    signum = distributed.largest(stop.signum or 0)
                    if signum or last or (self.step and self.step % config.save_every == 0):
                        self.save()
                    if signum:
                        raise Interrupted(signum, self.checkpoint_path, self.step)
                    if last:
                        return
                    if stop_after is not None and self.step >= stop_after:
                        self.save()
                        return
                    for step in range(self.step, min(self.step + 1 + config.workers, config.steps)):
                        if step not in pending:
                            pending[step] = pool.submit(self.batch, step)
                    images, labels = distributed.together(pending.pop(self.step).result)
                except InputError:
                    if self.step:
                        self.save()
                    raise
                finally:
                    if stop.signum:
                        for future in pending.values():
                            future.cancel()
                start = time.perf_counter()
                loss = self.train_step(images, labels)
                seconds = time.perf_counter() - start
                self.step_seconds.append(seconds)
                rate = learning_rate(config, self.step - 1)
                if self.log:
                    self.log.write(
                        step=self.step, epoch=self.epoch, lr=f"{rate:.6g}", loss=f"{loss:.6g}", seconds=f"{seconds:.4f}"
                    )
                listener.step(self.step, loss, rate, seconds)
                if loss != loss or abs(loss) == float("inf"):
                    raise InputError(f"the loss is {loss} at step {self.step}: try a lower --lr than {config.lr:g}")

    def seconds_per_step(self) -> float | None:
        """Median wall time of a step, the first left out; None before the first."""
        return statistics.median(self.step_seconds[1:] or self.step_seconds) if self.step_seconds else None

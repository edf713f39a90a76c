"""Training: settings, loop, checkpoints, logs; one process or several.

:class:`TrainConfig` says what to train, :class:`Trainer` does it, :func:`restore` gives the trained network back, and
:func:`evaluate` measures it. The functions of :mod:`.distributed` are for programs that torchrun starts in several
processes.
"""

from . import checkpoint, distributed
from .class_weights import class_weights
from .config import TrainConfig
from .evaluation import evaluate, evaluation_data
from .feature_cache import FeatureCache
from .log import CsvLog
from .loss import segmentation_loss
from .prediction import predict
from .progress import TerminalProgress
from .sync_norm import SyncBatchNorm, sync_norms
from .trained import Trained, restore
from .trainer import Listener, Trainer, learning_rate, open_data

__all__ = [
    "CsvLog",
    "FeatureCache",
    "Listener",
    "SyncBatchNorm",
    "TerminalProgress",
    "TrainConfig",
    "Trained",
    "Trainer",
    "checkpoint",
    "class_weights",
    "distributed",
    "evaluate",
    "evaluation_data",
    "learning_rate",
    "open_data",
    "predict",
    "restore",
    "segmentation_loss",
    "sync_norms",
]

"""Training and what belongs to it: losses, metrics, batches, threads, optimisers that survive a removal."""

from kfe_fx.training.batches import Batch, Batches, Loader
from kfe_fx.training.finetune import default_epochs, finetune
from kfe_fx.training.group_lasso import GroupLasso
from kfe_fx.training.losses import Loss, resolve_loss
from kfe_fx.training.metrics import Metric, evaluate, resolve_metric
from kfe_fx.training.optimizer_state import close_optimizer, make_optimizer, slice_optimizer
from kfe_fx.training.prune_data import PruneData, arrange
from kfe_fx.training.threads import fastest_threads
from kfe_fx.training.train import train

__all__ = [
    "Batch",
    "Batches",
    "GroupLasso",
    "Loader",
    "Loss",
    "Metric",
    "PruneData",
    "arrange",
    "close_optimizer",
    "default_epochs",
    "evaluate",
    "fastest_threads",
    "finetune",
    "make_optimizer",
    "resolve_loss",
    "resolve_metric",
    "slice_optimizer",
    "train",
]

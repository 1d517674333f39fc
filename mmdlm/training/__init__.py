"""Training: a `Run` says what, `Trainer(run).fit()` does it, and takes it up again after whatever stopped it.

Randomness comes from (seed, step, micro-batch) alone: on a CPU a resumed run equals an uninterrupted one.
"""

from mmdlm.training.best import EarlyStop, load_best
from mmdlm.training.checkpoint import CheckpointError, SaveError, load_tensors
from mmdlm.training.ema import Ema
from mmdlm.training.optim import (
    WSD,
    AdamW,
    BFloat16Autocast,
    Constant,
    Float32,
    Muon,
    Precision,
    WarmupCosine,
)
from mmdlm.training.parallel import DDP, FullyShard, Parallel
from mmdlm.training.ranks import Ranks, join
from mmdlm.training.reconstruct import Exchange, Reconstruction
from mmdlm.training.run import Batches, Divisible, Hook, Moment, Named, Objective, Run, Validation
from mmdlm.training.signals import Stopped
from mmdlm.training.track import Listener, TensorBoard, Trackio, WandB
from mmdlm.training.trainer import BatchError, Trainer
from mmdlm.training.validate import validate

__all__ = [
    "DDP",
    "WSD",
    "AdamW",
    "BFloat16Autocast",
    "BatchError",
    "Batches",
    "CheckpointError",
    "Constant",
    "Divisible",
    "EarlyStop",
    "Ema",
    "Exchange",
    "Float32",
    "FullyShard",
    "Hook",
    "Listener",
    "Moment",
    "Muon",
    "Named",
    "Objective",
    "Parallel",
    "Precision",
    "Ranks",
    "Reconstruction",
    "Run",
    "SaveError",
    "Stopped",
    "TensorBoard",
    "Trackio",
    "Trainer",
    "Validation",
    "WandB",
    "WarmupCosine",
    "join",
    "load_best",
    "load_tensors",
    "validate",
]

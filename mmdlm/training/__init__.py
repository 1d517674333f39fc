"""Training: a `Run` says what, `Trainer(run).fit()` does it, and takes it up again after whatever stopped it.

Randomness comes from (seed, step, micro-batch) alone: on a CPU a resumed run equals an uninterrupted one.
"""

from mmdlm.training.checkpoint import CheckpointError
from mmdlm.training.ema import Ema
from mmdlm.training.optim import WSD, AdamW, BFloat16Autocast, Constant, Float32, Muon, WarmupCosine
from mmdlm.training.reconstruct import Exchange, Reconstruction
from mmdlm.training.run import Batches, Divisible, Hook, Moment, Objective, Run, Validation
from mmdlm.training.trainer import Stopped, Trainer
from mmdlm.training.validate import validate

__all__ = [
    "WSD",
    "AdamW",
    "BFloat16Autocast",
    "Batches",
    "CheckpointError",
    "Constant",
    "Divisible",
    "Ema",
    "Exchange",
    "Float32",
    "Hook",
    "Moment",
    "Muon",
    "Objective",
    "Reconstruction",
    "Run",
    "Stopped",
    "Trainer",
    "Validation",
    "WarmupCosine",
    "validate",
]

"""The mathematics of masked diffusion: schedules, process, laws over noise levels, objectives, bounds."""

from mmdlm.diffusion.bound import Bound, conditional, marginal, nelbo
from mmdlm.diffusion.estimator import Bernoulli, Estimator, ExactCount, MaskGIT, Selection
from mmdlm.diffusion.loss import ByModality, LossOutput, Masking, Objective
from mmdlm.diffusion.process import Absorbing
from mmdlm.diffusion.schedule import Cosine, Linear, LogLinear, Polynomial, Schedule
from mmdlm.diffusion.times import Diagonal, Draw, Edges, Mixture, Raised, Square, Strata, Times

__all__ = [
    "Absorbing",
    "Bernoulli",
    "Bound",
    "ByModality",
    "Cosine",
    "Diagonal",
    "Draw",
    "Edges",
    "Estimator",
    "ExactCount",
    "Linear",
    "LogLinear",
    "LossOutput",
    "MaskGIT",
    "Masking",
    "Mixture",
    "Objective",
    "Polynomial",
    "Raised",
    "Schedule",
    "Selection",
    "Square",
    "Strata",
    "Times",
    "conditional",
    "marginal",
    "nelbo",
]

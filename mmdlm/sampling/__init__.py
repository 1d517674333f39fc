"""Sampling: one loop, the policies that steer it, and guidance around the model."""

from mmdlm.sampling.guidance import Counted, Guided, hide
from mmdlm.sampling.loop import denoise, resume
from mmdlm.sampling.modality import ByModality
from mmdlm.sampling.order import Drawn, LeftToRight, Margin, NegativeEntropy, Order, Peak, Random
from mmdlm.sampling.plan import Blocks, Path, Plan, Windows
from mmdlm.sampling.policy import Ancestral, Policy, Unmask, propose
from mmdlm.sampling.quota import (
    Bounded,
    EntropyBelow,
    Even,
    Factor,
    Fixed,
    Proportional,
    Quota,
    Rule,
    Scheduled,
    Stable,
    Threshold,
)
from mmdlm.sampling.state import Move, Proposal, State, Step

__all__ = [
    "Ancestral",
    "Blocks",
    "Bounded",
    "ByModality",
    "Counted",
    "Drawn",
    "EntropyBelow",
    "Even",
    "Factor",
    "Fixed",
    "Guided",
    "LeftToRight",
    "Margin",
    "Move",
    "NegativeEntropy",
    "Order",
    "Path",
    "Peak",
    "Plan",
    "Policy",
    "Proportional",
    "Proposal",
    "Quota",
    "Random",
    "Rule",
    "Scheduled",
    "Stable",
    "State",
    "Step",
    "Threshold",
    "Unmask",
    "Windows",
    "denoise",
    "hide",
    "propose",
    "resume",
]

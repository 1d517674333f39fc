"""Sampling: one loop, the policies that steer it, and guidance around the model."""

from mmdlm.sampling.guidance import Counted, Guided, hide
from mmdlm.sampling.loop import denoise, resume
from mmdlm.sampling.order import Drawn, LeftToRight, Order, Peak, Random
from mmdlm.sampling.policy import Ancestral, ByModality, Confidence, Path, Policy, propose
from mmdlm.sampling.state import Move, Proposal, State, Step

__all__ = [
    "Ancestral",
    "ByModality",
    "Confidence",
    "Counted",
    "Drawn",
    "Guided",
    "LeftToRight",
    "Move",
    "Order",
    "Path",
    "Peak",
    "Policy",
    "Proposal",
    "Random",
    "State",
    "Step",
    "denoise",
    "hide",
    "propose",
    "resume",
]

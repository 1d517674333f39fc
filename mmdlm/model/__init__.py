"""The model: tokens to features to logits."""

from mmdlm.model.attention import Kernel, Reference, Sdpa, Xformers, attend, default_kernel
from mmdlm.model.cache import Memory
from mmdlm.model.mask import AttentionMask
from mmdlm.model.predictor import Predictor
from mmdlm.model.transformer import Transformer, TransformerConfig, initialise

__all__ = [
    "AttentionMask",
    "Kernel",
    "Memory",
    "Predictor",
    "Reference",
    "Sdpa",
    "Transformer",
    "TransformerConfig",
    "Xformers",
    "attend",
    "default_kernel",
    "initialise",
]

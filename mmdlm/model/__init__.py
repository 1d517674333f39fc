"""The model: tokens to features to logits."""

from mmdlm.model.attention import Kernel, Reference, Sdpa, Xformers, attend, default_kernel
from mmdlm.model.cache import Memory
from mmdlm.model.flops import forward_flops, peak_flops, training_flops, utilisation
from mmdlm.model.lora import (
    LoraLinear,
    add_lora,
    freeze,
    load_lora,
    lora_layers,
    merge_lora,
    save_lora,
    unfreeze,
)
from mmdlm.model.mask import AttentionMask
from mmdlm.model.predictor import Predictor
from mmdlm.model.transformer import Transformer, TransformerConfig, initialise

__all__ = [
    "AttentionMask",
    "Kernel",
    "LoraLinear",
    "Memory",
    "Predictor",
    "Reference",
    "Sdpa",
    "Transformer",
    "TransformerConfig",
    "Xformers",
    "add_lora",
    "attend",
    "default_kernel",
    "forward_flops",
    "freeze",
    "initialise",
    "load_lora",
    "lora_layers",
    "merge_lora",
    "peak_flops",
    "save_lora",
    "training_flops",
    "unfreeze",
    "utilisation",
]

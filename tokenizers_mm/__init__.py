"""Text and pictures become ids of one vocabulary, and back. Useful alone: it imports nothing of mmdlm."""

from tokenizers_mm.autoencoder import Autoencoder, AutoencoderConfig, Reconstruction, reconstruction_loss
from tokenizers_mm.image import ImageTokenizer
from tokenizers_mm.measure import (
    Report,
    RoundTrip,
    code_counts,
    digit_counts,
    entropy,
    measure,
    perplexity,
    psnr,
    round_trip,
    ssim,
)
from tokenizers_mm.pixels import to_pil, to_tensor, to_uint8
from tokenizers_mm.pretrained import HuggingFaceTokenizer, VQModelTokenizer
from tokenizers_mm.quantize import FSQ, Compact, Quantizer
from tokenizers_mm.text import BytePairTokenizer, TextTokenizer
from tokenizers_mm.torchvision_compat import prepare_torchvision
from tokenizers_mm.vocab import SPECIALS, Vocab

__all__ = [
    "FSQ",
    "SPECIALS",
    "Autoencoder",
    "AutoencoderConfig",
    "BytePairTokenizer",
    "Compact",
    "HuggingFaceTokenizer",
    "ImageTokenizer",
    "Quantizer",
    "Reconstruction",
    "Report",
    "RoundTrip",
    "TextTokenizer",
    "VQModelTokenizer",
    "Vocab",
    "code_counts",
    "digit_counts",
    "entropy",
    "measure",
    "perplexity",
    "prepare_torchvision",
    "psnr",
    "reconstruction_loss",
    "round_trip",
    "ssim",
    "to_pil",
    "to_tensor",
    "to_uint8",
]

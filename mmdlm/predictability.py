"""How predictable a tokenizer's codes are, by a small masked model trained for it. Knows no picture."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmdlm.canvas import Canvas, Fill, Frame
from mmdlm.canvas import Run as Span
from mmdlm.data import Batches
from mmdlm.diffusion import Absorbing, Diagonal, ExactCount, Masking, nelbo
from mmdlm.model import Predictor, Transformer, TransformerConfig, initialise
from mmdlm.training import AdamW, Muon, Run, Trainer, WarmupCosine
from tokenizers_mm import ImageTokenizer, Vocab

__all__ = ["Predictability", "Probe", "predictability"]

_AT_ONCE = 64  # rows that go through the model together when it is asked


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A small masked model over grids of codes, and how it is trained and asked."""

    steps: int = 300
    batch: int = 32
    dim: int = 64  # a multiple of 32, the width of a head
    depth: int = 2
    draws: int = 16  # noise levels for each picture
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if self.dim < 32 or self.dim % 32:
            raise ValueError(f"the dim of a probe must be a multiple of 32, got {self.dim}")


@dataclass(frozen=True, kw_only=True)
class Predictability:
    """Bits per code of held-out pictures, each a mean over the positions of all of them."""

    bits: float  # the probe's negative evidence lower bound
    error: float  # its standard error, over pictures and masks; infinite for a single picture
    seen: float  # the same bound on training pictures: where it is far lower, the probe learnt them by heart
    frequency: float  # a guess by the codes' frequencies in the training pictures
    parameters: int
    num_train: int
    probe: Probe


def predictability(
    tokenizer: ImageTokenizer,
    train: Tensor,
    held_out: Tensor,
    *,
    probe: Probe = Probe(),
    device: torch.device | str = "cpu",
) -> Predictability:
    """Train a probe on codes (N, h, w) and bound the bits per code of others, both long and on the CPU.

    The bound is that of `nelbo`, pictures alone: no text, no other condition. The same seed gives the same
    figures, and nothing of torch's global generator is used up. Of `tokenizer` only the size and the digits
    of its codes are asked.
    """
    vocab = Vocab.build(num_text=0, num_codes=tokenizer.size)
    frame = Frame((Span(grid=(train.shape[1], train.shape[2])),))
    process = Absorbing(vocab.mask)

    def canvas(codes: Tensor) -> Canvas:
        ids = codes.flatten(1) + vocab.image.start
        return frame.canvas([Fill(ids, open=torch.ones_like(ids, dtype=torch.bool))], mask=vocab.mask)

    model = _network(vocab, tokenizer.digits, probe).to(device)
    with tempfile.TemporaryDirectory() as folder:  # of its own: nothing of another probe is taken up
        Trainer(
            Run(
                module=model,
                objective=Masking(process, Diagonal(), ExactCount()),
                batches=Batches(
                    int,
                    probe.batch,
                    size=len(train),
                    seed=probe.seed,
                    collate=lambda rows, _: canvas(train[rows]),
                ),
                steps=probe.steps,
                folder=Path(folder),
                optimizer=Muon(rest=AdamW(lr=2e-3, weight_decay=0.05)),
                learning_rate=WarmupCosine(warmup=20, floor=0.01),
                ema=None,
                seed=probe.seed,
                progress=probe.progress,
            )
        ).fit()

    def bits(codes: Tensor) -> Tensor:
        """(N,) bits per code of each picture."""
        rng = torch.Generator().manual_seed(probe.seed)
        parts = [canvas(part).to(device) for part in codes.split(_AT_ONCE)]
        nats = [nelbo(model, part, process, num_draws=probe.draws, rng=rng).nats.cpu() for part in parts]
        return torch.cat(nats) / (frame.length * math.log(2))

    found = bits(held_out)
    spread = float(found.std()) if len(found) > 1 else math.inf
    return Predictability(
        bits=float(found.mean()),
        error=spread / len(found) ** 0.5,
        seen=float(bits(train[: len(held_out)]).mean()),
        frequency=_frequency(train, held_out, tokenizer.size),
        parameters=model.num_parameters(),
        num_train=len(train),
        probe=probe,
    )


def _network(vocab: Vocab, digits: tuple[int, ...] | None, probe: Probe) -> Predictor:
    with torch.random.fork_rng(devices=[]):
        network = Transformer(
            TransformerConfig(
                vocab_size=vocab.size,
                text=(vocab.text.start, vocab.text.stop),
                image=(vocab.image.start, vocab.image.stop),
                mask=vocab.mask,
                dim=probe.dim,
                depth=probe.depth,
                num_heads=probe.dim // 32,
                digits=digits,
            )
        )
    initialise(network, torch.Generator().manual_seed(probe.seed))
    return Predictor(network)


def _frequency(train: Tensor, held_out: Tensor, size: int) -> float:
    """Bits per code under the frequencies of `train`, half a code added to each (Krichevsky, Trofimov)."""
    counts = torch.bincount(train.flatten(), minlength=size).double() + 0.5
    return float((counts.sum() / counts[held_out.flatten()]).log2().mean())

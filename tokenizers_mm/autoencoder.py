"""A trainable convolutional autoencoder whose bottleneck is quantised. Knows no optimizer and no data set."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenizers_mm.image import check_codes, check_images, grid_of
from tokenizers_mm.quantize import FSQ, Compact

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Sizes of an `Autoencoder`. Stage s works at 1 / 2 ** (s + 1) of the resolution of the picture."""

    channels: tuple[int, ...] = (32, 64, 128)  # one stage each; the picture shrinks by 2 ** len(channels)
    encoder_blocks: tuple[int, ...] = (0, 1, 2)  # residual blocks of each stage
    decoder_blocks: tuple[int, ...] = (1, 1, 2)
    levels: tuple[int, ...] = (8, 8, 8)  # of FSQ
    context: int = 1  # kernel of the encoder's blocks; 1: a code depends on its own patch alone
    # groups of the channels of FSQ, and the numbers of each that have a code: see `Compact`
    groups: tuple[int, ...] | None = None
    used: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"channels wants a positive number for each stage, got {self.channels}")
        for name, blocks in (
            ("encoder_blocks", self.encoder_blocks),
            ("decoder_blocks", self.decoder_blocks),
        ):
            if len(blocks) != len(self.channels) or min(blocks) < 0:
                raise ValueError(
                    f"{name} wants {len(self.channels)} numbers, one for each stage, got {blocks}"
                )
        if self.context < 1 or self.context % 2 == 0:
            raise ValueError(f"context is a kernel size and must be odd, got {self.context}")
        if (self.groups is None) != (self.used is None):
            raise ValueError(f"groups {self.groups} and used {self.used} come together")

    @property
    def downsample(self) -> int:
        return 2 ** len(self.channels)

    @staticmethod
    def from_json(values: dict[str, Any]) -> AutoencoderConfig:
        """What `dataclasses.asdict` gave, also after JSON. Raises TypeError for unknown names."""
        return AutoencoderConfig(**{name: _frozen(value) for name, value in values.items()})


def _frozen(value: Any) -> Any:
    """Lists of JSON, also inside one another, as tuples."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


class Reconstruction(NamedTuple):
    """What training sees of one pass."""

    images: Tensor  # (B, 3, H, W) float32, not clipped
    codes: Tensor  # (B, h, w) long


class Block(nn.Module):
    """x + MLP(norm(mix(x))): a depthwise convolution looks around, the rest works on each position alone.

    The norm is over channels, never over space, which would leak the whole picture into every code. The last
    projection starts at zero, so that a block begins as identity.
    """

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.mix = (
            nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
            if kernel > 1
            else None
        )
        self.norm = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, 2 * channels)
        self.narrow = nn.Linear(2 * channels, channels, bias=False)
        nn.init.zeros_(self.narrow.weight)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        y_BHWC = x_BHWC if self.mix is None else convolve(self.mix, x_BHWC)
        return x_BHWC + self.narrow(F.silu(self.widen(self.norm(y_BHWC))))


class Encoder(nn.Module):
    """Pictures to vectors for the quantiser. A stage merges 2 x 2 positions, then come its blocks."""

    def __init__(self, config: AutoencoderConfig, dim: int) -> None:
        super().__init__()
        self.merges = nn.ModuleList()
        self.blocks = nn.ModuleList()
        before = 3
        for channels, num_blocks in zip(config.channels, config.encoder_blocks, strict=True):
            self.merges.append(nn.Linear(4 * before, channels))
            self.blocks.append(nn.Sequential(*(Block(channels, config.context) for _ in range(num_blocks))))
            before = channels
        self.norm = nn.LayerNorm(before)
        self.project = nn.Linear(before, dim)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        for merge, blocks in zip(self.merges, self.blocks, strict=True):
            x_BHWC = blocks(merge(rearrange(x_BHWC, "b (h p) (w q) c -> b h w (p q c)", p=2, q=2)))
        return self.project(self.norm(x_BHWC))


class Decoder(nn.Module):
    """Quantised vectors to pictures: blocks of kernel 3, then each position becomes 2 x 2, stage by stage."""

    def __init__(self, config: AutoencoderConfig, dim: int) -> None:
        super().__init__()
        widths = (3, *config.channels)
        self.project = nn.Linear(dim, widths[-1])
        self.blocks = nn.ModuleList()
        self.splits = nn.ModuleList()
        for stage in reversed(range(len(config.channels))):
            channels = widths[stage + 1]
            self.blocks.append(
                nn.Sequential(*(Block(channels, 3) for _ in range(config.decoder_blocks[stage])))
            )
            # The last split sees around: it draws the pixels.
            kernel = 3 if stage == 0 else 1
            self.splits.append(nn.Conv2d(channels, 4 * widths[stage], kernel, padding=kernel // 2))

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x_BHWC = self.project(x_BHWC)
        for blocks, split in zip(self.blocks, self.splits, strict=True):
            x_BHWC = rearrange(convolve(split, blocks(x_BHWC)), "b h w (p q c) -> b (h p) (w q) c", p=2, q=2)
        return x_BHWC


def convolve(convolution: nn.Module, x_BHWC: Tensor) -> Tensor:
    """Without a copy: the permuted tensor is in the channels_last format."""
    return convolution(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Autoencoder(nn.Module):
    """An `ImageTokenizer` that can be trained: calling it gives gradients, `encode` and `decode` do not.

    Nothing but the blocks' kernels lets a position see another (norms are per position), so with `context=1`
    equal patches get equal codes whatever surrounds them; the decoder always sees around.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        fsq = FSQ(config.levels)
        self.quantizer = (
            fsq if config.groups is None or config.used is None else Compact(fsq, config.groups, config.used)
        )
        self.encoder = Encoder(config, self.quantizer.dim)
        self.decoder = Decoder(config, self.quantizer.dim)

    @property
    def size(self) -> int:
        return self.quantizer.size

    @property
    def downsample(self) -> int:
        return self.config.downsample

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.project.weight.dtype

    @property
    def digits(self) -> tuple[int, ...] | None:
        return self.quantizer.levels

    def compact(self, codes: Tensor, groups: tuple[int, ...]) -> Autoencoder:
        """A copy on the CPU, with codes for no more than what `codes` (...) long show.

        Channels are taken in `groups` of neighbours, and every combination of numbers that occur has a code,
        so that what groups stand for can meet in ways that were not seen. Raises ValueError where this
        tokenizer is compact already.
        """
        if not isinstance(self.quantizer, FSQ):
            raise ValueError("this tokenizer is compact already")
        used = Compact.seen(self.quantizer, groups, codes)
        smaller = Autoencoder(replace(self.config, groups=groups, used=used))
        smaller.load_state_dict(self.state_dict())
        return smaller.train(self.training)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Raises ValueError when a side is no multiple of `downsample`."""
        return grid_of(height, width, self.downsample)

    def forward(self, images: Tensor, exchange: Callable[[Tensor], Tensor] | None = None) -> Reconstruction:
        """(B, 3, H, W) in [-1, 1] to the reconstruction, with gradients, and the codes.

        `exchange` changes the quantised vectors (B, h, w, D), a channel for each level, before the decoder
        sees them; the codes stay the encoder's.
        """
        check_images(images)
        self.grid(images.shape[-2], images.shape[-1])
        vectors, codes = self._quantise(images)
        return Reconstruction(self._reconstruct(vectors if exchange is None else exchange(vectors)), codes)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Patch-local encoders (`context=1`) are asked once for each distinct patch."""
        check_images(images)
        height, width = self.grid(images.shape[-2], images.shape[-1])
        if self.config.context > 1:
            return self._quantise(images)[1]
        side = self.downsample
        patches = rearrange(images, "b c (h p) (w q) -> (b h w) c p q", p=side, q=side)
        some, which = distinct(patches)
        return self._quantise(some)[1].flatten()[which].view(-1, height, width)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        check_codes(codes, self.size)
        return self._reconstruct(self.quantizer.codes_to_vectors(codes)).clamp(-1.0, 1.0)

    def _quantise(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        return self.quantizer(self.encoder(images_BCHW.permute(0, 2, 3, 1).to(self.dtype)))

    def _reconstruct(self, vectors_BHWC: Tensor) -> Tensor:
        return self.decoder(vectors_BHWC.to(self.dtype)).permute(0, 3, 1, 2).float()

    def save_pretrained(self, folder: Path | str) -> None:
        """Write `config.json` and `model.safetensors` into the folder, which is made if it is not there."""
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        (place / CONFIG_NAME).write_text(json.dumps(asdict(self.config), indent=2) + "\n")
        save_file(
            {name: tensor.contiguous() for name, tensor in self.state_dict().items()}, place / WEIGHTS_NAME
        )

    @staticmethod
    def from_pretrained(folder: Path | str) -> Autoencoder:
        """Read what `save_pretrained` wrote, onto the CPU. Raises ValueError when that is no autoencoder."""
        place = Path(folder)
        try:
            config = AutoencoderConfig.from_json(json.loads((place / CONFIG_NAME).read_text()))
            weights = load_file(place / WEIGHTS_NAME)
        except (OSError, TypeError, SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{place} holds no autoencoder ({CONFIG_NAME} and {WEIGHTS_NAME}): {error}"
            ) from error
        model = Autoencoder(config)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"the weights in {place} do not fit its {CONFIG_NAME}: {error}") from error
        return model.eval()


def distinct(patches: Tensor) -> tuple[Tensor, Tensor]:
    """(N, ...) float -> (M, ...) with each patch once, and (N,) long: which of them each patch equals.

    Patches are told apart by a hash of their bits; should unequal ones share one, all are given back.
    """
    flat = patches.flatten(1).float().contiguous().view(torch.int32)
    rng = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (flat.shape[1],), generator=rng)
    keys = (flat * factors.to(flat.device)).sum(dim=1)  # overflows 64 bits, the same way everywhere
    found, which = keys.unique(return_inverse=True)
    first = which.new_full((len(found),), len(flat)).scatter_reduce(
        0, which, torch.arange(len(flat), device=flat.device), "amin"
    )
    if not torch.equal(flat[first][which], flat):
        return patches, torch.arange(len(flat), device=flat.device)
    return patches[first], which


def reconstruction_loss(images: Tensor, output: Tensor, *, square: float = 1.0, edge: float = 0.5) -> Tensor:
    """mean |d| + square * mean d^2 + edge * mean |d - neighbour's d|, where d = output - images.

    The absolute term wants flat colours exact, the square term punishes wrong objects, the edge term wants
    sharp outlines in the right place. Both (B, 3, H, W); computed in float32; a scalar.
    """
    error = output.float() - images.float()
    loss = error.abs().mean() + square * error.square().mean()
    if edge:
        loss = loss + edge * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())
    return loss

"""Tokenizers of transformers and diffusers behind our two protocols. Knows no model family."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenizers_mm.image import check_codes, check_images, grid_of
from tokenizers_mm.text import BytePairTokenizer
from tokenizers_mm.torchvision_compat import prepare_torchvision

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vq_model import VQModel
    from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast


class HuggingFaceTokenizer:
    """A `TextTokenizer` around a tokenizer of transformers.

    Text encodes apart from every control token: what the tokenizer's author added to its vocabulary
    (`<|endoftext|>`, `[MASK]`, ...) cannot be typed, but for what `ordinary` names. Nothing is put before or
    after the text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizer | PreTrainedTokenizerFast, *, ordinary: Iterable[str] = ()
    ) -> None:
        from transformers import PreTrainedTokenizerFast

        self.tokenizer = tokenizer
        self._size = 1 + max(tokenizer.get_vocab().values())
        self._plain: BytePairTokenizer | None = None
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            self._plain = BytePairTokenizer(tokenizer.backend_tokenizer, ordinary=ordinary)
        kept = {*ordinary, str(tokenizer.unk_token)}
        self._control = {
            number: token for token, number in tokenizer.get_added_vocab().items() if token not in kept
        }

    @staticmethod
    def from_pretrained(folder: Path | str, *, ordinary: Iterable[str] = ()) -> HuggingFaceTokenizer:
        """Read the tokenizer of a local folder; never a network call, never code of the folder.

        Raises ValueError when there is none that transformers can read.
        """
        prepare_torchvision()
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"transformers finds no tokenizer in {folder}: {error}") from error
        return HuggingFaceTokenizer(tokenizer, ordinary=ordinary)

    @property
    def size(self) -> int:
        return self._size

    def encode(self, text: str) -> list[int]:
        """Raises ValueError where a tokenizer without fast backend reads a control token out of the text."""
        if self._plain is not None:
            return self._plain.encode(text)
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        spelt = sorted({self._control[number] for number in ids if number in self._control})
        if spelt:
            raise ValueError(
                f"the text spells control tokens {spelt}, which this tokenizer cannot tell apart from text"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        for number in ids:
            if not 0 <= number < self._size:
                raise ValueError(f"id {number} is no text id: this tokenizer has ids 0..{self._size - 1}")
        text = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class VQModelTokenizer:
    """An `ImageTokenizer` around a `VQModel` of diffusers."""

    def __init__(self, model: VQModel, *, black: float = -1.0, white: float = 1.0) -> None:
        """`black` and `white` are what the model takes and gives for them: some were trained on [0, 1]."""
        if not black < white:
            raise ValueError(f"black must be less than white, got {black} and {white}")
        self.model = model.eval()
        self._black, self._span = black, white - black

    @staticmethod
    def from_pretrained(folder: Path | str, *, black: float = -1.0, white: float = 1.0) -> VQModelTokenizer:
        """Read the model of a local folder, safetensors only. Raises ValueError when there is none."""
        prepare_torchvision()
        from diffusers.models.autoencoders.vq_model import VQModel

        try:
            model = VQModel.from_pretrained(str(folder), local_files_only=True, use_safetensors=True)
        except OSError as error:
            raise ValueError(f"diffusers finds no VQModel in {folder}: {error}") from error
        assert isinstance(model, VQModel)
        return VQModelTokenizer(model, black=black, white=white)

    @property
    def size(self) -> int:
        return self.model.quantize.n_e

    @property
    def downsample(self) -> int:
        return 2 ** (len(self.model.config["block_out_channels"]) - 1)

    @property
    def digits(self) -> tuple[int, ...] | None:
        return None

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Raises ValueError when a side is no multiple of `downsample`."""
        return grid_of(height, width, self.downsample)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        check_images(images)
        rows, columns = self.grid(images.shape[-2], images.shape[-1])
        values = (images + 1.0) / 2.0 * self._span + self._black
        z_BCHW = self.model.quant_conv(self.model.encoder(values.to(self.model.dtype)))
        codes = self.model.quantize(z_BCHW)[2][2]
        return codes.reshape(len(images), rows, columns)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        check_codes(codes, self.size)
        # Through the codebook by hand: VQModel.decode looks codes up only where its configuration says so.
        vectors = self.model.quantize.embedding(codes).permute(0, 3, 1, 2)
        spatial = vectors if self.model.config["norm_type"] == "spatial" else None
        values = self.model.decoder(self.model.post_quant_conv(vectors), spatial)
        return ((values.float() - self._black) / self._span * 2.0 - 1.0).clamp(-1.0, 1.0)

"""What a generation gives back: texts, pictures, and a record of how they came about. Knows no model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

__all__ = ["Moment", "Output", "Record", "Score", "read_record", "save_png"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """How one sample was made; written into the text chunks of a saved PNG."""

    task: str
    prompt: str
    seed: int
    sample: int  # index in the random stream: (seed, sample) gives this sample again, alone or in any batch
    steps: int
    guidance: Mapping[str, float]
    policy: str
    model: str  # first 16 hexadecimal digits of the SHA-256 of the weights
    software: str

    def chunks(self) -> dict[str, str]:
        """As PNG text chunks: `prompt`, `seed`, `model` for people and tools, all of it JSON in `mmdlm`."""
        return {
            "prompt": self.prompt,
            "seed": str(self.seed),
            "model": self.model,
            "mmdlm": json.dumps(asdict(self)),
        }


@dataclass(frozen=True, kw_only=True)
class Output:
    """The samples of one call, in the order of its inputs; `texts` or `images` is empty where none are."""

    texts: tuple[str, ...] = ()
    images: tuple[Image.Image, ...] = ()
    records: tuple[Record, ...] = ()
    forwards: int = 0  # rows through the network, summed over its passes, guidance branches counted

    def save(self, folder: Path | str, *, stem: str = "sample") -> list[Path]:
        """Write each picture as `stem-NNN.png`, its record inside; the paths. ValueError for no pictures."""
        if not self.images:
            raise ValueError("this output holds no pictures to save")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{stem}-{number:03d}.png" for number in range(len(self.images))]
        for path, image, record in zip(paths, self.images, self.records, strict=True):
            save_png(image, path, record)
        return paths


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One step of a generation that is being watched; holes are `_` in texts and grey tiles in pictures."""

    step: int
    steps: int
    levels: Mapping[str, float]  # modality -> share of its positions that are still holes
    texts: tuple[str, ...] = ()
    images: tuple[Image.Image, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Score:
    """Bounds on the log-likelihood of image-text pairs, in nats a pair; each a tuple over the pairs.

    All are lower bounds on log p (any-order bounds, arXiv:2406.07524 eq. 10 with exact counts), except
    `pmi` = joint - text - image, a difference of bounds, which is itself no bound.
    """

    joint: tuple[float, ...]
    text_given_image: tuple[float, ...]
    image_given_text: tuple[float, ...]
    text: tuple[float, ...]
    image: tuple[float, ...]
    pmi: tuple[float, ...]
    error: Mapping[str, Sequence[float]]  # standard errors over the noise draws, by the names above


def save_png(image: Image.Image, path: Path | str, record: Record) -> None:
    """Write one picture as a PNG whose text chunks hold its record."""
    info = PngInfo()
    for key, value in record.chunks().items():
        info.add_itxt(key, value)
    image.save(path, format="PNG", pnginfo=info)


def read_record(path: Path | str) -> Record:
    """The record inside a PNG written by `save_png`. Raises ValueError where there is none."""
    with Image.open(path) as image:
        text = image.info.get("mmdlm")
    if text is None:
        raise ValueError(f"{path} holds no record of how it was made (no 'mmdlm' text chunk)")
    try:
        return Record(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its record is not one of this version ({error})") from error

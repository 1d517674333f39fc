"""One id space for text, special tokens, image codes and the mask.

Knows no tokenizer and no model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

# The structure of our own layouts. Each begin token names the run that follows it.
SPECIALS = (
    "end",
    "pad",
    "begin_caption",
    "begin_question",
    "begin_answer",
    "begin_text",
    "begin_image",
    "end_image",
)


@dataclass(frozen=True, kw_only=True)
class Vocab:
    """Which ids mean what.

    Ids are laid out as text ids, then the specials with `end` first, then image codes, then the mask, so that
    the ids that may stand at a text position (text and `end`) are one slice. Published families state their
    own numbers instead.
    """

    size: int  # rows of the embedding table that are in use
    text: slice  # ids that may stand at a text position; includes `end`
    image: slice  # ids of the image codes
    mask: int
    specials: Mapping[str, int] = field(default_factory=dict)  # name -> id

    def __post_init__(self) -> None:
        for name, ids in (("text", self.text), ("image", self.image)):
            if not 0 <= ids.start <= ids.stop <= self.size:
                raise ValueError(
                    f"{name} ids {ids.start}..{ids.stop} do not fit a vocabulary of {self.size} ids"
                )
        for name, number in {"mask": self.mask, **self.specials}.items():
            if not 0 <= number < self.size:
                raise ValueError(f"special {name!r} has id {number}, outside a vocabulary of {self.size} ids")

    @staticmethod
    def build(*, num_text: int, num_codes: int, specials: tuple[str, ...] = SPECIALS) -> Vocab:
        """The layout of our own models: text, specials, image codes, mask."""
        if not specials or specials[0] != "end":
            raise ValueError(f"the first special must be 'end', got {specials[:1]}")
        first_code = num_text + len(specials)
        return Vocab(
            size=first_code + num_codes + 1,
            text=slice(0, num_text + 1),
            image=slice(first_code, first_code + num_codes),
            mask=first_code + num_codes,
            specials={name: num_text + number for number, name in enumerate(specials)},
        )

    @property
    def num_text(self) -> int:
        """Ids that the text tokenizer itself uses."""
        return self.specials["end"] - self.text.start

    @property
    def num_codes(self) -> int:
        return self.image.stop - self.image.start

    def to_json(self) -> dict:
        """Plain JSON values; `from_json` inverts it."""
        return {
            "size": self.size,
            "text": [self.text.start, self.text.stop],
            "image": [self.image.start, self.image.stop],
            "mask": self.mask,
            "specials": dict(self.specials),
        }

    @staticmethod
    def from_json(values: Mapping) -> Vocab:
        return Vocab(
            size=values["size"],
            text=slice(*values["text"]),
            image=slice(*values["image"]),
            mask=values["mask"],
            specials=dict(values["specials"]),
        )

    def save(self, path: Path | str) -> None:
        Path(path).write_text(json.dumps(self.to_json(), indent=2) + "\n")

    @staticmethod
    def load(path: Path | str) -> Vocab:
        return Vocab.from_json(json.loads(Path(path).read_text()))

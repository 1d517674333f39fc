"""Text becomes ids, and back: byte-level BPE. Knows no layout and no special token of ours."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

FILE_NAME = "tokenizer.json"


class TextTokenizer(Protocol):
    """Text to ids, and back. Any class with these members will do."""

    @property
    def size(self) -> int:
        """One more than the largest id."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of the text and nothing else. The spelling of a control token stays ordinary text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text that the ids spell. Raises ValueError for an id outside [0, size)."""
        ...


class BytePairTokenizer:
    """A tokenizer of the `tokenizers` library, for text that users wrote.

    Ours (`train`) is byte-level BPE with all 256 bytes in its alphabet and no special token, so every Unicode
    text comes back exactly: `decode(encode(text)) == text`. A space is put before the text and taken away
    again, so the first word of a caption has the same ids as the same word later on. `load` reads any
    `tokenizer.json`; its round trip is what its author made it. The tokens its author *added* to the
    vocabulary are control tokens and cannot be typed.
    """

    def __init__(self, tokenizer: Tokenizer, *, ordinary: Iterable[str] = ()) -> None:
        """`ordinary` names added tokens that text may spell after all, such as runs of spaces."""
        self._tokenizer = tokenizer
        self._ordinary = frozenset(ordinary)
        self._encoder, self._control = plain_encoder(tokenizer, self._ordinary)
        self._size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())

    @staticmethod
    def train(texts: Iterable[str], size: int) -> BytePairTokenizer:
        """Learn at most `size` tokens (fewer when the texts hold too little), deterministically.

        Raises ValueError when `size` has no room for the 256 bytes.
        """
        if size < 256:
            raise ValueError(
                f"a byte-level tokenizer needs at least 256 ids, one for each byte, got size {size}"
            )
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.Prepend(" ")
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        )
        tokenizer.train_from_iterator(texts, trainer)
        return BytePairTokenizer(tokenizer)

    @property
    def size(self) -> int:
        return self._size

    def encode(self, text: str) -> list[int]:
        """Raises ValueError for a text that is no Unicode (lone surrogates)."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text holds a lone surrogate at character {error.start}; it is no Unicode text"
            ) from error
        ids = self._encoder.encode(text, add_special_tokens=False).ids
        if not self._control.isdisjoint(ids):
            raise ValueError(
                "the text spells a control token of this tokenizer in a way that cannot be told apart from it"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        for number in ids:
            if not 0 <= number < self._size:
                raise ValueError(f"id {number} is no text id: this tokenizer has ids 0..{self._size - 1}")
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def save(self, folder: Path | str) -> None:
        """Write `tokenizer.json` into the folder, which is made if it is not there."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(Path(folder) / FILE_NAME))

    @staticmethod
    def load(path: Path | str, *, ordinary: Iterable[str] = ()) -> BytePairTokenizer:
        """Read a `tokenizer.json`, or the one in a folder. Raises ValueError when there is none."""
        file = Path(path)
        file = file / FILE_NAME if file.is_dir() else file
        try:
            content = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read the tokenizer {file}: {error}") from error
        try:
            tokenizer = Tokenizer.from_str(content)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{file} is no tokenizer.json of the tokenizers library: {error}") from error
        return BytePairTokenizer(tokenizer, ordinary=ordinary)


def plain_encoder(tokenizer: Tokenizer, ordinary: Iterable[str] = ()) -> tuple[Tokenizer, frozenset[int]]:
    """A copy that cannot read control tokens out of text, and the ids of those tokens.

    Every added token counts as control, marked special or not (several families add theirs unmarked), but for
    the `ordinary` ones and the unknown token. Not to match them is not enough: a unigram model finds them in
    its own vocabulary, so they lose their spelling. Every id stays what it was.
    """
    values = json.loads(tokenizer.to_str())
    model = values["model"]
    words = frozenset(ordinary)
    kept = words | ({model["unk_token"]} if model.get("unk_token") else set())
    unknown = model.get("unk_id") if model["type"] == "Unigram" else None
    control = {
        added["id"]
        for added in values["added_tokens"]
        if added["content"] not in kept and added["id"] != unknown
    }
    for added in values["added_tokens"]:
        added["special"] = added["content"] not in words
        if added["id"] in control:
            added["content"] = unspeakable(added["id"])
    values["post_processor"] = None  # it frames sequences by control tokens
    values["truncation"] = values["padding"] = None
    if model["type"] == "Unigram":
        model["vocab"] = [
            [unspeakable(number) if number in control else piece, score]
            for number, (piece, score) in enumerate(model["vocab"])
        ]
    else:
        merged = {left + right for left, right in map(pair_of, model.get("merges", ()))}
        model["vocab"] = {
            unspeakable(number) if number in control and piece not in merged else piece: number
            for piece, number in model["vocab"].items()
        }
    plain = Tokenizer.from_str(json.dumps(values))
    plain.encode_special_tokens = True  # special tokens are encoded as if they were none
    return plain, frozenset(control)


def unspeakable(number: int) -> str:
    """A spelling for control token `number` that no text is meant to hold: it begins with a noncharacter."""
    return f"\ufdd0{number}"


def pair_of(merge: str | Sequence[str]) -> tuple[str, str]:
    """The two halves of a merge of BPE, which older files write as one string."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right

"""Pairs of codes and texts come back from their folder as they went in, or an error names what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmdlm.data import Encoded, EncodedFolder, InOrder, Shuffled, write_encoded

PAIRS = [
    Encoded(
        f"{number}.png",
        np.arange(6).reshape(2, 3) + 100 * number,
        (f"text {number}", "\u00e9t\u00e9\n\r\x0b\x85\u2028"),
    )
    for number in range(5)
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_encoded(tmp_path / "codes", PAIRS)
    return tmp_path / "codes"


def test_what_is_written_is_read(folder):
    source = EncodedFolder(folder, order=InOrder())
    assert len(source) == 5
    assert source.grid == (2, 3)
    assert source.texts() == [text for pair in PAIRS for text in pair.texts]
    for found, pair in zip(source, PAIRS, strict=True):
        assert (found.name, found.texts) == (pair.name, pair.texts)
        assert found.codes.dtype == np.int32
        assert (found.codes == pair.codes).all()
    assert source[-1].name == "4.png"
    with pytest.raises(IndexError):
        source[5]


def test_it_is_shuffled_each_epoch_and_resumes(folder):
    source, other = (EncodedFolder(folder, order=Shuffled(3)) for _ in range(2))
    epochs = [[pair.name for pair in source] for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [sorted(pair.name for pair in PAIRS)] * 3
    assert len({tuple(epoch) for epoch in epochs}) > 1
    begun = iter(other)
    assert [next(begun).name for _ in range(2)] == epochs[0][:2]
    resumed = EncodedFolder(folder, order=Shuffled(3))
    resumed.load_state_dict(json.loads(json.dumps(other.state_dict())))
    assert [pair.name for pair in resumed] == epochs[0][2:]


def test_writing_again_replaces_the_whole(folder):
    write_encoded(folder, PAIRS[:2])
    assert len(EncodedFolder(folder)) == 2


@pytest.mark.parametrize("pairs", [[], [PAIRS[0], Encoded("x", np.zeros((3, 2)), ("a",))]])
def test_pairs_of_no_or_several_shapes_are_not_written(tmp_path, pairs):
    with pytest.raises(ValueError, match=f"one shape, got {len(pairs)} pairs"):
        write_encoded(tmp_path / "codes", pairs)
    assert not (tmp_path / "codes").exists()


def damage(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


CODES, ROWS = "codes.safetensors", "samples.jsonl"


@pytest.mark.parametrize("break_it", [
    lambda folder: (folder / CODES).unlink(),
    lambda folder: (folder / ROWS).unlink(),
    damage(CODES, lambda data: data[:20]),
    damage(CODES, lambda data: data.replace(b'"codes"', b'"cudes"')),
    damage(ROWS, lambda data: data[:-9]),
    damage(ROWS, lambda data: data.replace(b'"name"', b'"nome"')),
    damage(ROWS, lambda data: b"3\n" + data),
    damage(ROWS, lambda data: b"\xff" + data),
    damage(ROWS, lambda data: data + data),
])  # fmt: skip
def test_a_folder_that_is_not_whole_is_refused(folder, break_it):
    EncodedFolder(folder)
    break_it(folder)
    with pytest.raises(ValueError, match="codes"):
        EncodedFolder(folder)

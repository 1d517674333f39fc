"""Text files come in pieces, by name and line, and are not held in memory."""

from __future__ import annotations

import json
import tracemalloc
from itertools import islice

import pytest

from mmdlm.data.images import Skip
from mmdlm.data.indexed import InOrder, Shuffled, forever
from mmdlm.data.sample import SampleError
from mmdlm.data.texts import Chunks, Documents, Lines, Paragraphs, TextFiles

TEXT = "one\r\ntwo  \n\n  \nthree\nfour\n\n\nfive"


def test_text_is_cut_into_lines_paragraphs_or_chunks(tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    path = tmp_path / "a.txt"

    def cut(pieces):
        source = TextFiles(path, pieces=pieces, order=InOrder())
        return [(sample.name.rpartition(":")[2], sample.texts[0]) for sample in source]

    assert cut(Lines()) == [("1", "one"), ("2", "two  "), ("5", "three"), ("6", "four"), ("9", "five")]
    assert cut(Paragraphs()) == [("1", "one\ntwo  "), ("5", "three\nfour"), ("9", "five")]
    text = TEXT.replace("\r\n", "\n")
    chunks = cut(Chunks(5))
    assert "".join(piece for _, piece in chunks) == text
    assert {len(piece) for _, piece in chunks[:-1]} == {5}
    assert [int(line) for line, _ in chunks] == [1 + text[:at].count("\n") for at in range(0, len(text), 5)]


def test_text_files_come_one_after_another(tmp_path):
    (tmp_path / "a.txt").write_text("a\nb\n")
    (tmp_path / "b.txt").write_text("\ufeffc\n", encoding="utf-8")
    source = TextFiles([tmp_path / "a.txt", str(tmp_path / "b.txt")], order=InOrder())
    assert list(source.texts()) == ["a", "b", "c"]
    assert [sample.name for sample in source][-1] == f"{tmp_path / 'b.txt'}:1"
    assert source[2].image is None


def test_text_errors_name_the_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"a\.txt: not UTF-8 at byte 3"):
        TextFiles(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"absent\.txt: cannot be read"):
        TextFiles([tmp_path / "absent.txt"])
    (tmp_path / "b.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="no text"):
        TextFiles(tmp_path / "b.txt")
    with pytest.raises(ValueError, match="at least 1 character"):
        Chunks(0)


def test_documents_are_files_or_what_lies_between_separators(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n<|end|>\n\none\r\n\r\ntwo\n\n<|end|>\n<|end|>\nthree")

    def cut(pieces):
        source = TextFiles(path, pieces=pieces, order=InOrder())
        return [(sample.name.rpartition(":")[2], sample.texts[0]) for sample in source]

    assert cut(Documents("<|end|>")) == [("4", "one\n\ntwo"), ("10", "three")]
    assert cut(Documents()) == [("2", "<|end|>\n\none\n\ntwo\n\n<|end|>\n<|end|>\nthree")]


@pytest.mark.parametrize("size", range(1, 12))
def test_chunks_count_characters_and_not_bytes(tmp_path, size):
    text = "\u00e9a\r\n\U0001f9d1\u200d\r\rb\u2028c\n\n\u0394\r\n"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    plain = text.replace("\r\n", "\n").replace("\r", "\n")
    source = TextFiles(tmp_path / "a.txt", pieces=Chunks(size), order=InOrder())
    assert list(source.texts()) == [plain[at : at + size] for at in range(0, len(plain), size)]
    lines = [int(sample.name.rpartition(":")[2]) for sample in source]
    assert lines == [1 + plain.count("\n", 0, at) for at in range(0, len(plain), size)]


def test_a_last_line_that_nothing_ends_has_no_more_characters(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\nbcd")
    assert list(TextFiles(tmp_path / "a.txt", pieces=Chunks(5), order=InOrder()).texts()) == ["a\nbcd"]


def test_every_position_resumes_exactly(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name}{n}" for n in range(5)))

    def source():
        return TextFiles([tmp_path / "a.txt", tmp_path / "b.txt"], order=Shuffled(1))

    whole = [sample.texts for sample in islice(forever(source()), 23)]
    assert len(set(whole[:10])) == 10
    for stop in range(23):
        first, second = source(), source()
        begun = [sample.texts for sample in islice(forever(first), stop)]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert begun + [sample.texts for sample in islice(forever(second), 23 - stop)] == whole


def test_texts_are_not_held_in_memory(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(("x" * 999 + "\n") * 5000)
    tracemalloc.start()
    try:
        source = TextFiles(path)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 300_000  # of 5 MB
    assert len(source) == 5000


def test_a_file_that_changes_later_is_named(tmp_path):
    path, skip = tmp_path / "a.txt", Skip()
    path.write_text("one\ntwo\nthree\n")
    source = TextFiles(path, order=InOrder(), on_error=skip)
    path.write_bytes(b"one\nt\xffo\n")
    with pytest.raises(SampleError, match=r"a\.txt: not UTF-8 at byte 5"):
        source[1]
    assert [sample.texts for sample in source] == [("one",)]
    assert "wanted 5 bytes at offset 8, there are 0" in skip.failures[str(path)]

"""Documents of texts and pictures: read from every source, encoded on the way and into shards, in order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from mmdlm.data import (
    Census,
    Columns,
    Encoded,
    FromRows,
    ImageError,
    ImageFolder,
    InOrder,
    JsonLines,
    Listed,
    Mapped,
    OnlineEncoded,
    Parquet,
    Sample,
    SampleError,
    ShardPlan,
    Shards,
    Skip,
    WebDataset,
    encode_shards,
)
from mmdlm.data.shards import read_sealed, write_sealed

ONE = Columns(pieces="pieces")
TWO = Columns(pieces=("texts", "images"))
# "#3" is the picture of red 3; the spelling of control tokens is text like any other
DOCUMENTS = [
    ("a red thing ", "#1", "then", "#2", "#3", "\u00e9\u2028 <|mask|>"),
    ("#4", "after it"),
    ("text", "and text"),
    ("#5",),
    ("<begin_image>", "#6", "#6"),
]


def png(red: int) -> bytes:
    file = BytesIO()
    Image.new("RGB", (4, 4), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


def as_one(document: Sequence[str], picture) -> dict:
    objects = [{"image": picture(int(one[1:]))} if one.startswith("#") else {"text": one} for one in document]
    return {"pieces": objects, "id": len(document)}


def as_two(document: Sequence[str], picture) -> dict:
    return {
        "texts": [None if one.startswith("#") else one for one in document],
        "images": [picture(int(one[1:])) if one.startswith("#") else None for one in document],
        "id": len(document),
    }


def json_lines(folder: Path, rows: Sequence[dict]) -> Path:
    for red in range(1, 7):
        (folder / f"{red}.png").write_bytes(png(red))
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def parquet(folder: Path, rows: Sequence[dict]) -> Path:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(list(rows)), folder / "rows.parquet", row_group_size=2)
    return folder / "rows.parquet"


def tar(folder: Path, rows: Sequence[dict]) -> Path:
    import tarfile

    with tarfile.open(folder / "rows.tar", "w") as file:
        for number, row in enumerate(rows):
            members = {f"{red}.png": png(red) for red in range(1, 7)} | {"json": json.dumps(row).encode()}
            for name, data in members.items():
                info = tarfile.TarInfo(f"{number}.{name}")
                info.size = len(data)
                file.addfile(info, BytesIO(data))
    return folder / "rows.tar"


def spelled(item: Sample | Encoded) -> tuple[str, ...]:
    """The document as it is written above; a picture or its codes are all of one value."""
    return tuple(one if isinstance(one, str) else f"#{one.flat[0]}" for one in item.pieces)


def sources(folder: Path, layout: str):
    """The documents in every kind of source."""
    make, columns = (as_one, ONE) if layout == "one" else (as_two, TWO)
    named = [make(document, lambda red: f"{red}.png") for document in DOCUMENTS]
    held = [make(document, png) for document in DOCUMENTS]
    hub = [make(document, lambda red: {"bytes": png(red), "path": None}) for document in DOCUMENTS]
    yield JsonLines(json_lines(folder, named), columns=columns, order=InOrder())
    yield Parquet(parquet(folder, held), columns=columns, order=InOrder())
    yield Parquet(parquet(folder, hub), columns=columns, order=InOrder())
    yield WebDataset(tar(folder, named), columns=columns, order=InOrder())
    yield Mapped(hub, FromRows(columns), order=InOrder())


@pytest.mark.parametrize("layout", ["one", "two"])
def test_every_source_reads_documents_in_their_order(tmp_path, layout):
    for source in sources(tmp_path, layout):
        found = list(source)
        assert [spelled(sample) for sample in found] == DOCUMENTS
        assert [sample.extra for sample in found] == [{"id": len(document)} for document in DOCUMENTS]
        for sample in found:
            assert (sample.image, sample.texts, sample.question) == (None, (), None)
            assert all(image.shape == (4, 4, 3) for image in sample.all_images)
            assert all((image == image[0, 0]).all() for image in sample.all_images)
        if not isinstance(source, Mapped):
            written = [one for document in DOCUMENTS for one in document if not one.startswith("#")]
            assert list(source.texts()) == written


BAD = [
    ({}, ONE, "no column 'pieces'"),
    ({"pieces": "a"}, ONE, "column 'pieces' wants a list, got 'a'"),
    ({"pieces": []}, ONE, "no piece under 'pieces'"),
    ({"pieces": ["a"]}, ONE, "piece 0 of 'pieces' wants {\"text\": ...} or {\"image\": ...}, got 'a'"),
    ({"pieces": [{"text": "a"}, {}]}, ONE, "piece 1 of 'pieces' wants a text or an image, got neither"),
    ({"pieces": [{"text": "a", "image": "1.png"}]}, ONE, "piece 0 of 'pieces' .* got both"),
    ({"pieces": [{"text": 3}]}, ONE, "piece 0 of 'pieces' wants a text, got 3"),
    ({"pieces": [{"image": 3}]}, ONE, "wanted a file name under 'piece 0', got 3"),
    ({"pieces": [{"image": "../1.png"}]}, ONE, "piece 0 .*does not stay inside"),
    ({"texts": ["a"]}, TWO, "no column 'images'"),
    ({"texts": ["a", None], "images": [None]}, TWO, "equal lengths, got 2 and 1"),
    ({"texts": [None], "images": [None]}, TWO, "piece 0 of 'texts' and 'images' .* got neither"),
    ({"texts": [], "images": []}, TWO, "no piece under 'texts' and 'images'"),
]


@pytest.mark.parametrize(("row", "columns", "message"), BAD, ids=[message for _, _, message in BAD])
def test_bad_documents_are_named(tmp_path, row, columns, message):
    good = as_one(("a", "#1"), lambda red: f"{red}.png") | as_two(("a", "#1"), lambda red: f"{red}.png")
    path, skip = json_lines(tmp_path, [good, row, good]), Skip()
    with pytest.raises(SampleError, match=message) as caught:
        JsonLines(path, columns=columns)[1]
    assert str(caught.value).startswith(f"{path}:2: ")
    assert len(list(JsonLines(path, columns=columns, order=InOrder(), on_error=skip))) == 2
    assert skip.names == (f"{path}:2",)


def test_a_picture_that_cannot_be_had_is_named_with_its_place(tmp_path):
    row = {"pieces": [{"text": "a"}, {"image": "none.png"}]}
    with pytest.raises(ImageError, match=r"rows\.jsonl:1: picture 'none\.png'"):
        JsonLines(json_lines(tmp_path, [row]), columns=ONE)[0]
    rows = [{"pieces": [{"text": "a", "image": None}, {"text": None, "image": b"none"}]}]
    with pytest.raises(ImageError, match=r"rows\.parquet:0: piece 1: "):
        Parquet(parquet(tmp_path, rows), columns=ONE)[0]
    with pytest.raises(ImageError, match=r"list\[0\]: piece 1: "):
        Mapped(rows, FromRows(ONE))[0]
    row = {"pieces": [{"image": "9.png"}]}
    with pytest.raises(SampleError, match=r"rows\.tar:0: piece 0 is in no member \.9\.png; there are 1\.png"):
        WebDataset(tar(tmp_path, [row]), columns=ONE)[0]


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"pieces": [{"text": "a"}]}, ONE, 'column \'pieces\' wants a list of {"text", "image"}'),
        ({"pieces": [{"text": "a", "image": "http://a"}]}, ONE, "the image the bytes of pictures"),
        ({"texts": ["a"], "images": ["http://a"]}, TWO, "column 'images' wants a list of the bytes"),
        ({"texts": [1], "images": [b""]}, TWO, "column 'texts' wants a list of texts"),
        ({"texts": ["a"]}, TWO, "no column 'images'"),
    ],
)
def test_columns_of_a_parquet_file_are_checked_at_once(tmp_path, row, columns, message):
    with pytest.raises(ValueError, match=message):
        Parquet(parquet(tmp_path, [row]), columns=columns)


def test_a_document_is_nothing_else(tmp_path):
    picture = np.zeros((4, 4, 3), np.uint8)
    for other in ({"image": picture}, {"texts": ("a",)}, {"question": ""}, {"answer": "a"}):
        with pytest.raises(ValueError, match="d: a document has pieces and no"):
            Sample("d", pieces=("a",), **other)
    with pytest.raises(ValueError, match="d: a document has pieces and no"):
        Encoded("d", np.zeros((2, 2), np.int32), pieces=("a",))
    with pytest.raises(ValueError, match=r"d: an image is \(H, W, 3\) uint8"):
        Sample("d", pieces=("a", picture[..., 0]))
    for others in ({"question": "q"}, {"image": "i"}, {"texts": ("caption",)}):
        with pytest.raises(ValueError, match="with pieces, no texts, question, answer or image"):
            Columns(pieces="pieces", **others)
    with pytest.raises(ValueError, match="one picture a row"):
        ImageFolder(tmp_path, columns=ONE)


def test_columns_as_a_command_line_names_them():
    assert Columns.named(None, None, None) is None
    assert Columns.named("a,b", None, None) == Columns(("a", "b"))
    assert Columns.named(None, "picture", None) == Columns(image="picture")
    assert Columns.named(None, None, "pieces").documents == ("pieces",)
    assert Columns.named(None, None, "texts,images").documents == ("texts", "images")
    for wrong in ((None, None, "a,b,c"), ("caption", None, "a"), (None, "image", "a")):
        with pytest.raises(ValueError, match="pieces"):
            Columns.named(*wrong)


# codes


def encode(images: Sequence[np.ndarray]) -> np.ndarray:
    """Four codes a picture, its red."""
    return np.stack([image[::2, ::2, 0] for image in images]).astype(np.int64)


def mixed(number: int) -> Sample:
    """Documents, pairs, questions and texts, in turn."""
    picture = np.full((4, 4, 3), number, np.uint8)
    match number % 4:
        case 0:
            pieces = tuple(picture + k if k % 2 else f"text {k} of {number}" for k in range(number % 5 + 1))
            return Sample(f"{number}", pieces=pieces)
        case 1:
            return Sample(f"{number}", picture, (f"number {number}", "a picture"))
        case 2:
            return Sample(f"{number}", None, (f"<|mask|> {number}",))
        case _:
            return Sample(f"{number}", picture, (), "which number?", str(number))


def same(one: Encoded, sample: Sample) -> bool:
    codes = [encode([image])[0] for image in sample.all_images]
    said = (sample.name, sample.texts, sample.question, sample.answer)
    return (
        (one.name, one.texts, one.question, one.answer) == said
        and (one.codes is None) == (sample.image is None)
        and [type(piece) for piece in one.pieces] == [type(piece) for piece in sample.pieces]
        and one.all_texts == sample.all_texts
        and len(one.all_codes) == len(codes)
        and all((a == b).all() and a.dtype == np.int32 for a, b in zip(one.all_codes, codes, strict=True))
    )


PLAN = ShardPlan(num_codes=300, shard_size=7, batch_size=3, texts_alone=True)
NUM = 45


def test_items_of_every_kind_come_back_from_shards(tmp_path):
    sizes: list[int] = []

    def counted(images: Sequence[np.ndarray]) -> np.ndarray:
        sizes.append(len(images))
        return encode(images)

    assert encode_shards(Listed(mixed, NUM), tmp_path / "codes", encode=counted, plan=PLAN)
    assert max(sizes) == 3
    source = Shards(tmp_path / "codes", order=InOrder())
    assert (len(source), source.grid) == (NUM, (2, 2))
    assert all(same(item, mixed(number)) for number, item in enumerate(source))
    assert [text for number in range(NUM) for text in mixed(number).all_texts] == list(source.texts())
    assert sum(shard.pictures for shard in source.shards) == sum(len(mixed(n).all_images) for n in range(NUM))
    assert (source.take([1, 3, 41])[:, 0, 0] == [1, 3, 41]).all()
    assert source.take([12])[0, 0, 0] == 13  # a document of one picture
    for number, count in ((4, 2), (2, 0)):
        with pytest.raises(ValueError, match=f"{number}: has {count} pictures, wanted one"):
            source.take([1, number])
    for rank in (1, 0):  # shared out, the same bytes
        encode_shards(Listed(mixed, NUM), tmp_path / "two", encode=encode, plan=PLAN, part=(rank, 2))
    for path in (tmp_path / "codes").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_no_more_pictures_are_held_than_are_encoded_together(tmp_path):
    picture, told = np.zeros((4, 4, 3), np.uint8), []

    def item(number: int) -> Sample:
        told.append("read")
        return Sample(str(number), pieces=(picture, "a", picture, picture))

    def listened(images: Sequence[np.ndarray]) -> np.ndarray:
        told.append("encode")
        return encode(images)

    encode_shards(Listed(item, 4), tmp_path / "codes", encode=listened, plan=PLAN)
    assert told == ["read", "encode"] * 4


def test_items_of_every_kind_are_encoded_on_the_way():
    source = OnlineEncoded(Listed(mixed, NUM, order=InOrder()), encode, batch_size=4, order=InOrder())
    assert all(same(item, mixed(number)) for number, item in enumerate(source))
    assert same(source[8], mixed(8))


def test_shards_of_the_first_format_are_read_and_taken_up(tmp_path):
    """With one picture an item the tensors are those of format 1, whose records did not count pictures."""
    folder, plan = tmp_path / "codes", replace(PLAN, texts_alone=False)
    pairs = [4 * number + 1 for number in range(12)]
    source = Listed(lambda number: mixed(pairs[number]), len(pairs))
    encode_shards(source, folder, encode=encode, plan=plan)
    assert set(load_file(folder / "shard-00000.safetensors")) == {"codes", "ends", "rows"}

    def without(record: dict) -> dict:
        return {name: value for name, value in record.items() if name != "pictures"}

    index = read_sealed(folder / "index.json")
    index |= {"format": 1, "shards": [without(record) for record in index["shards"]]}
    for number in range(2):
        record = read_sealed(folder / f"shard-{number:05}.json")
        write_sealed(folder / f"shard-{number:05}.json", record | {"shard": without(record["shard"])})
    write_sealed(folder / "index.json", index)
    old = Shards(folder, order=InOrder())
    assert all(same(item, mixed(pairs[number])) for number, item in enumerate(old))
    assert old.take(range(12)).shape == (12, 2, 2)
    (folder / "index.json").unlink()
    assert encode_shards(source, folder, encode=lambda images: pytest.fail("made again"), plan=plan)
    assert len(Shards(folder)) == 12
    write_sealed(folder / "index.json", index | {"format": 3})
    with pytest.raises(ValueError, match="format is 3, this version reads 1 and 2"):
        Shards(folder)


def test_a_shard_whose_pictures_are_miscounted_is_damaged(tmp_path):
    from safetensors.numpy import save_file

    encode_shards(Listed(mixed, 4), tmp_path / "codes", encode=encode, plan=PLAN)
    path = tmp_path / "codes" / "shard-00000.safetensors"
    tensors = load_file(path)
    assert tensors["pictures"].tolist() == [0, 1, 1, 2]
    source = Shards(tmp_path / "codes")
    save_file(tensors | {"pictures": tensors["pictures"] + 1}, path)
    with pytest.raises(ValueError, match="4 rows of 3 pictures, wanted 4 rows of 2"):
        source[0]
    fewer = {name: np.delete(tensors[name], 1) for name in ("ends", "pictures")}  # two items are one
    save_file(tensors | fewer, path)
    with pytest.raises(ValueError, match="3 rows of 2 pictures, wanted 4 rows of 2"):
        source[0]


def test_texts_alone_are_nothing_to_encode(tmp_path):
    with pytest.raises(ValueError, match="not one picture"):
        encode_shards(Listed(lambda n: mixed(2), 3), tmp_path / "codes", encode=encode, plan=PLAN)


def test_a_census_counts_what_documents_hold():
    census, picture = Census(), np.zeros((2, 2, 3), np.uint8)
    census.add(Sample("a", pieces=("one", picture, "two")))
    census.add(Sample("b", pieces=("one", "two", picture)))  # other order, another row
    census.add(Sample("c", pieces=("one", picture, "two")))
    census.add(Sample("d", pieces=(picture, picture + 1)))
    census.add(Encoded("e", pieces=("one", np.zeros((2, 2), np.int32))))
    assert census.counts == {"rows": 5, "texts": 7, "pictures": 6}
    assert census.repeated == {"rows": 1, "texts": 5, "pictures": 3}
    assert census.wordless == ["d"]

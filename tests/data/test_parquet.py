"""Parquet files give their rows, a row group at a time, resume exactly, and name file and row."""

from __future__ import annotations

import json
import pickle
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmdlm.data.images import ImageError, Skip, decode, fit
from mmdlm.data.indexed import Grouped, InOrder, Shuffled, forever
from mmdlm.data.parquet import Parquet
from mmdlm.data.rows import Columns
from mmdlm.data.sample import SampleError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

NASTY = Path(__file__).parent / "nasty"


def png(red: int) -> bytes:
    file = BytesIO()
    Image.new("RGB", (4, 3), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, rows: list[dict], group: int = 3, **types) -> Path:
    """A file of `rows`; `types` are those that Arrow would guess wrongly."""
    table = pa.Table.from_pylist(rows)
    for name, kind in types.items():
        table = table.set_column(
            table.schema.get_field_index(name), name, pa.array([row[name] for row in rows], kind)
        )
    pq.write_table(table, path, row_group_size=group, write_page_checksum=True)
    return path


def seven(path: Path, first: int = 0) -> Path:
    rows = []
    for red in range(first, first + 7):
        image = {"bytes": png(red), "path": f"{red}.png"}
        rows.append({"image": image, "text": [f"number {red}", "a picture"], "id": red})
    return write(path, rows)


def test_samples_hold_picture_texts_and_the_rest(tmp_path):
    source = Parquet([seven(tmp_path / "a.parquet"), seven(tmp_path / "b.parquet", 7)], order=InOrder())
    assert (len(source), source.sizes) == (14, (3, 3, 1, 3, 3, 1))
    for index, sample in enumerate(source):
        assert sample.name == f"{tmp_path}/{'ab'[index // 7]}.parquet:{index % 7}"
        assert (sample.texts, sample.extra) == ((f"number {index}", "a picture"), {"id": index})
        assert sample.image is not None
        assert (sample.image == (index, 0, 0)).all()
    assert source[-1].name == f"{tmp_path}/b.parquet:6"
    assert list(source.texts())[::2] == [f"number {index}" for index in range(14)]
    with pytest.raises(IndexError):
        source[14]


def test_plain_bytes_null_pictures_and_other_columns(tmp_path):
    rows = [{"jpg": png(1), "caption": "one", "q": "which?", "a": "1"}, {"jpg": None, "caption": "two"}]
    rows = [{"q": "", "a": "", **row} for row in rows]
    path = write(tmp_path / "a.parquet", rows, caption=pa.large_string())
    columns = Columns(texts=("caption",), question="q", answer="a", image="jpg")
    source = Parquet(path, columns=columns, load=lambda data: fit(decode(data), 2))
    assert source[0].image.shape == (2, 2, 3)
    assert (source[0].texts, source[0].question, source[0].answer) == (("one",), "which?", "1")
    assert source[1].image is None
    texts = Parquet(write(tmp_path / "t.parquet", [{"text": "a"}]))
    assert (texts[0].image, texts[0].texts) == (None, ("a",))


@pytest.mark.parametrize("order", [None, Shuffled(2), InOrder()])
def test_every_position_resumes_exactly(tmp_path, order):
    paths = [seven(tmp_path / "a.parquet"), seven(tmp_path / "b.parquet", 7)]

    def source():
        return Parquet(paths, order=order, window=2, columns=Columns(texts=()), load=decode)

    whole = [sample.extra["id"] for sample in islice(forever(source()), 30)]
    assert sorted(whole[:14]) == sorted(whole[14:28]) == list(range(14))
    for stop in range(0, 30, 1 if order is None else 7):
        first, second = source(), source()
        begun = [sample.extra["id"] for sample in islice(forever(first), stop)]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert begun + [sample.extra["id"] for sample in islice(forever(second), 30 - stop)] == whole


def test_an_epoch_reads_each_row_group_once(tmp_path, monkeypatch):
    source = Parquet([seven(tmp_path / "a.parquet"), seven(tmp_path / "b.parquet", 7)], window=2)
    read, plain = [], source._read
    monkeypatch.setattr(source, "_read", lambda number, *rest: read.append(number) or plain(number, *rest))
    orders = [[sample.extra["id"] for sample in source] for _ in range(2)]
    assert sorted(read[:6]) == sorted(read[6:]) == list(range(6))
    assert len(read) == 12
    assert orders[0] != orders[1]
    assert len(source._held) == 2


def test_a_grouped_order_is_a_permutation_that_mixes_a_window_at_a_time():
    sizes = (5, 1, 4, 0, 7, 3)
    groups = np.repeat(np.arange(6), sizes)
    for epoch in range(20):
        for window in (1, 2, 6):
            order = Grouped(sizes, window, seed=3)(20, epoch)
            assert sorted(order) == list(range(20))
            seen = list(dict.fromkeys(groups[order]))
            switches = 1 + np.count_nonzero(np.diff(groups[order]))
            assert switches == len(seen) if window == 1 else switches > len(seen)
    firsts = np.bincount([Grouped(sizes, 6, seed)(20, 0)[0] for seed in range(4000)], minlength=20)
    assert ((firsts - 200) ** 2 / 200).sum() < 43.8  # 19 degrees of freedom, p = 0.001
    with pytest.raises(ValueError, match="20 items together, the source has 21"):
        Grouped(sizes)(21, 0)
    with pytest.raises(ValueError, match="window of at least 1"):
        Grouped(sizes, 0)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([{"caption": "a"}], Columns(), "no column 'text'; there are caption"),
        ([{"text": 3}], Columns(), "column 'text' wants a text or a list of texts, it holds int64"),
        ([{"text": "a", "image": "a.png"}], Columns(), "column 'image' wants the bytes of pictures"),
        ([{"text": "a", "image": {"path": "a.png"}}], Columns(), "column 'image' wants the bytes"),
        ([{"text": "a"}], Columns(image="image"), "no column 'image'; there are text"),
        ([{"text": ["a"]}], Columns(question="text"), "column 'text' wants a text, it holds list"),
    ],
)
def test_columns_are_checked_at_once(tmp_path, rows, columns, message):
    path = write(tmp_path / "a.parquet", rows)
    with pytest.raises(ValueError, match=message) as caught:
        Parquet(path, columns=columns)
    assert str(caught.value).startswith(f"{path}: ")


def test_bad_rows_are_named_and_may_be_skipped(tmp_path):
    nasty = (NASTY / "png_decompression_dos.png").read_bytes()
    pictures = [png(0), nasty, png(2)[:40], b"", png(4), None]
    rows = [{"image": {"bytes": data, "path": "p.png"}, "text": "t"} for data in pictures]
    rows.append({"image": {"bytes": png(6), "path": None}, "text": None})
    path = write(tmp_path / "a.parquet", rows)
    skip = Skip()
    source = Parquet(path, order=InOrder(), on_error=skip)
    assert [sample.name for sample in source] == [f"{path}:0", f"{path}:4"]
    assert skip.names == tuple(f"{path}:{row}" for row in (1, 2, 3, 5, 6))
    assert "wants a text or a list of texts, got None" in skip.failures[f"{path}:6"]
    assert "path alone ('p.png')" in skip.failures[f"{path}:5"]
    with pytest.raises(ImageError, match=r"a\.parquet:1: "):
        source[1]
    with pytest.raises(SampleError, match=r"a\.parquet:1: "):
        list(Parquet(path, order=InOrder()))


def test_damaged_files_are_named(tmp_path):
    for name, data in (("empty", b""), ("text", b"no parquet file at all"), ("cut", None)):
        path = tmp_path / f"{name}.parquet"
        path.write_bytes(seven(tmp_path / "a.parquet").read_bytes()[:-9] if data is None else data)
        with pytest.raises(ValueError, match=rf"{name}\.parquet: cannot be read as Parquet"):
            Parquet(path)
    with pytest.raises(ValueError, match=r"absent\.parquet: cannot be read"):
        Parquet(tmp_path / "absent.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="no rows"):
        Parquet(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match="at least one path"):
        Parquet([])


def test_a_file_that_becomes_another_is_named(tmp_path):
    path = seven(tmp_path / "a.parquet")
    source = Parquet(path)
    write(path, [{"text": "a"}, {"text": "b"}])
    with pytest.raises(SampleError, match=r"a\.parquet:0: row group 0 has 2 rows, not 3 as stated"):
        source[0]


def test_a_flipped_byte_is_an_error_of_its_row_group_or_does_no_harm(tmp_path):
    def keep(data: bytes) -> Image.Image:
        return Image.new("RGB", (1, 1))

    path = seven(tmp_path / "a.parquet")
    good, rng = path.read_bytes(), np.random.default_rng(0)
    footer = len(good) - 8 - int.from_bytes(good[-8:-4], "little")  # the pages before it bear checksums
    found = 0
    for at in [*rng.integers(4, footer, 60), *rng.integers(footer, len(good), 60)]:
        data = bytearray(good)
        data[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        skip = Skip()
        try:
            samples = list(Parquet(path, order=InOrder(), on_error=skip, load=keep))
        except ValueError as error:
            assert str(error).startswith(f"{path}: ")  # noqa: PT017
            found += at < footer
            continue
        assert len(samples) + skip.count == 7
        assert all(name.startswith(f"{path}:") for name in skip.names)
        found += bool(at < footer and skip.count)
    assert found > 30  # what is left is in what says the same twice


def test_a_source_travels_to_another_process(tmp_path):
    source = Parquet(seven(tmp_path / "a.parquet"))
    before = source[3]
    again = pickle.loads(pickle.dumps(source))
    assert again._held == ()
    assert (again[3].name, again[3].texts) == (before.name, before.texts)

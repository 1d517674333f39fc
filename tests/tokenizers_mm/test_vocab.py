"""The one id space."""

import json

import pytest

from tokenizers_mm import SPECIALS, Vocab


def ids_of(part: slice) -> set[int]:
    return set(range(part.start, part.stop))


def test_every_id_has_one_meaning():
    vocab = Vocab.build(num_text=300, num_codes=512)
    others = {number for name, number in vocab.specials.items() if name != "end"}
    parts = [ids_of(vocab.text), ids_of(vocab.image), {vocab.mask}, others]
    assert sum(map(len, parts)) == len(set().union(*parts)) == vocab.size
    assert set().union(*parts) == set(range(vocab.size))


def test_end_may_stand_in_a_text_and_the_mask_is_last():
    vocab = Vocab.build(num_text=300, num_codes=512)
    assert vocab.specials["end"] == 300 == vocab.text.stop - 1
    assert vocab.mask == vocab.size - 1
    assert (vocab.num_text, vocab.num_codes) == (300, 512)
    assert tuple(vocab.specials) == SPECIALS


def test_json_round_trip(tmp_path):
    vocab = Vocab.build(num_text=17, num_codes=8, specials=("end", "begin_image"))
    assert Vocab.from_json(json.loads(json.dumps(vocab.to_json()))) == vocab
    vocab.save(tmp_path / "vocab.json")
    assert Vocab.load(tmp_path / "vocab.json") == vocab
    assert Vocab.build(num_text=18, num_codes=8, specials=("end", "begin_image")) != vocab


@pytest.mark.parametrize("specials", [(), ("pad", "end")])
def test_end_must_come_first(specials):
    with pytest.raises(ValueError, match="'end'"):
        Vocab.build(num_text=4, num_codes=4, specials=specials)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": slice(0, 11)}, "text ids 0..11"),
        ({"image": slice(8, 6)}, "image ids 8..6"),
        ({"mask": 10}, "'mask' has id 10"),
        ({"specials": {"end": -1}}, "'end' has id -1"),
    ],
)
def test_ids_beyond_the_vocabulary_are_refused(changes, message):
    good = {"size": 10, "text": slice(0, 5), "image": slice(5, 9), "mask": 9, "specials": {"end": 4}}
    Vocab(**good)
    with pytest.raises(ValueError, match=message):
        Vocab(**(good | changes))

"""Byte-level BPE: everything comes back, nothing typed becomes control."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from tokenizers_mm import BytePairTokenizer, TextTokenizer

CAPTIONS = [
    f"a {size} {colour} {shape} on a {ground} background"
    for size in ("small", "large")
    for colour in ("red", "green", "blue")
    for shape in ("circle", "square", "star")
    for ground in ("white", "black")
]
NASTY = [
    "",
    " ",
    "   ",
    "a",
    " a",
    "a ",
    "  two  spaces  ",
    "line\nline\r\n\ttab\n\n",
    "\x00\x01\x7f",
    "Gr\xfc\xdfe, \u4e2d\u6587, \u0639\u0631\u0628\u064a, \u0939\u093f\u0928\u094d\u0926\u0940",
    "e\u0301 is not \u00e9",
    "\U0001f469\u200d\U0001f680 \U0001f1e9\U0001f1ea",
    "\u00a0\u2003\u3000\ufeff",
    "\ufdd0 \ufffe \U0010ffff",
    "<mask>",
    "<|soi|> <|endoftext|>[MASK]</s>",
    "\u0120 is how byte-level BPE writes a space",
    "don't 12345 !!!",
]
CONTROL = "<|soi|>"


@pytest.fixture(scope="module")
def tokenizer() -> BytePairTokenizer:
    return BytePairTokenizer.train(CAPTIONS, 320)


@pytest.mark.parametrize("text", NASTY)
def test_every_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= number < tokenizer.size for number in ids)


def test_characters_of_every_length_come_back(tokenizer):
    everything = "".join(
        map(chr, [*range(0x3100), *range(0xD700, 0xD800), *range(0xE000, 0xE100), *range(0x1F300, 0x1F700)])
    )
    assert tokenizer.decode(tokenizer.encode(everything)) == everything


def test_the_first_word_has_the_ids_of_later_ones(tokenizer):
    (red,) = tokenizer.encode("red")
    assert tokenizer.encode("a red")[-1] == red
    assert tokenizer.encode("red red red") == [red] * 3
    assert tokenizer.encode("a small red circle on a white background")[:4] == [
        *tokenizer.encode("a"),
        *tokenizer.encode("small"),
        red,
        *tokenizer.encode("circle"),
    ]


def test_any_ids_have_a_text(tokenizer):
    text = "".join(tokenizer.decode([number]) for number in range(tokenizer.size))
    assert isinstance(text, str)
    assert tokenizer.decode(range(tokenizer.size))


@pytest.mark.parametrize("number", [-1, 10_000])
def test_ids_of_nothing_are_refused(tokenizer, number):
    with pytest.raises(ValueError, match=f"id {number} is no text id"):
        tokenizer.decode([0, number])
    assert not tokenizer.decode([])


def test_a_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(ValueError, match="lone surrogate at character 3"):
        tokenizer.encode("ab \ud800")


def test_training_is_deterministic_and_saved_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "text_tokenizer")
    BytePairTokenizer.train(CAPTIONS, 320).save(tmp_path / "again")
    file = tmp_path / "text_tokenizer" / "tokenizer.json"
    assert file.read_bytes() == (tmp_path / "again" / "tokenizer.json").read_bytes()
    for place in (file, file.parent):
        loaded: TextTokenizer = BytePairTokenizer.load(place)
        assert loaded.size == tokenizer.size
        for text in (*NASTY, *CAPTIONS):
            assert loaded.encode(text) == tokenizer.encode(text)


def test_the_size_is_kept(tokenizer):
    assert 256 < tokenizer.size <= 320
    assert BytePairTokenizer.train(CAPTIONS, 270).size == 270
    assert BytePairTokenizer.train([], 256).size == 256
    with pytest.raises(ValueError, match="at least 256"):
        BytePairTokenizer.train(CAPTIONS, 255)


def byte_level() -> Tokenizer:
    alphabet = {piece: number for number, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    model = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    return model


@pytest.mark.parametrize("special", [True, False])
def test_control_tokens_of_a_foreign_tokenizer_cannot_be_typed(tmp_path, special):
    theirs = byte_level()
    theirs.add_tokens([AddedToken(CONTROL, special=special, normalized=False)])
    theirs.post_processor = processors.TemplateProcessing(
        single=f"{CONTROL} $A", special_tokens=[(CONTROL, 256)]
    )
    theirs.save(str(tmp_path / "tokenizer.json"))
    assert 256 in theirs.encode(f"a {CONTROL} b", add_special_tokens=False).ids
    ours = BytePairTokenizer.load(tmp_path)
    assert ours.size == 257
    for text in (*NASTY, f"a {CONTROL} b"):
        assert 256 not in ours.encode(text)
        assert ours.decode(ours.encode(text)) == text
    assert ours.decode([256]) == CONTROL
    assert BytePairTokenizer.load(tmp_path, ordinary=[CONTROL]).encode(f"a{CONTROL}")[1:] == [256]


def test_control_tokens_inside_a_unigram_vocabulary_cannot_be_typed_either():
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("\u2581", -2.0), *[(letter, -3.0) for letter in "<>/abs"]]
    theirs = Tokenizer(models.Unigram(pieces, unk_id=0))
    theirs.pre_tokenizer = pre_tokenizers.Metaspace()
    theirs.decoder = decoders.Metaspace()
    theirs.add_special_tokens(["</s>", "<unk>"])
    ours = BytePairTokenizer(theirs)
    ids = ours.encode("a</s>b")
    assert 1 not in ids
    assert ours.decode(ids) == "a</s>b"
    assert 0 in ours.encode("z")  # what is unknown stays so


def test_control_tokens_inside_a_word_vocabulary_cannot_be_typed_either():
    theirs = Tokenizer(models.WordLevel({"[UNK]": 0, "[MASK]": 1, "a": 2}, unk_token="[UNK]"))
    theirs.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    theirs.add_special_tokens(["[MASK]", "[UNK]"])
    assert BytePairTokenizer(theirs).encode("a [MASK] a") == [2, 0, 2]


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot read the tokenizer"):
        BytePairTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        BytePairTokenizer.load(tmp_path)


def test_ids_stay_what_they_were_when_only_some_added_tokens_are_words():
    theirs = byte_level()
    theirs.add_tokens(["<a>", "<b>", "<c>"])
    ours = BytePairTokenizer(theirs, ordinary=["<b>"])
    ids = ours.encode("<a><b><c>\ufdd0256")
    assert ids.count(257) == 1
    assert not {256, 258} & set(ids)
    assert ours.decode(ids) == "<a><b><c>\ufdd0256"

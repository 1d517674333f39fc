"""What a user holds: kinds, sameness whatever the batch, what is given stays, wrong input is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from asked import ASK, DRAWS, HOLES, WRITES, ask, patches, pixels, results
from PIL import Image
from torch import Tensor

from mmdlm import Pipeline, __version__
from mmdlm import jobs as tasks
from mmdlm.pretrained import Settings
from mmdlm.sampling import Ancestral, Unmask

# kinds and shapes


@pytest.mark.parametrize("task", ASK)
def test_each_task_gives_what_it_says_with_a_record_of_it(kit, task):
    output = ask(task, kit.pipe, kit)
    assert len(output.texts) == (3 if task in WRITES else 0)
    assert len(output.images) == (3 if task in DRAWS else 0)
    assert all(isinstance(text, str) for text in output.texts)
    assert all((image.mode, image.size) == ("RGB", (64, 64)) for image in output.images)
    assert output.forwards >= 3
    for number, record in enumerate(output.records):
        assert (record.task, record.seed, record.sample, record.steps) == (task, 5, number, 4)
        assert (record.model, record.software) == (kit.pipe.fingerprint, f"mmdlm {__version__}")
        assert record.policy == repr(kit.pipe.settings[task].policy)
    assert len(output.records) == 3


def test_one_thing_and_a_list_of_one_are_asked_alike(kit):
    pipe, picture, prompt = kit.pipe, kit.pictures[0], kit.prompts[0]
    quiet = {"progress": False}
    assert pipe.caption(picture, **quiet).texts == pipe.caption([picture], **quiet).texts
    one, listed = (pipe.text_to_image(asked, **quiet) for asked in (prompt, [prompt]))
    assert pixels(one.images) == pixels(listed.images)
    question = kit.questions[0]
    repeated = pipe.answer(kit.pictures, question, **quiet)
    assert repeated.texts == pipe.answer(kit.pictures, [question] * 3, **quiet).texts


def test_pictures_of_any_size_and_mode_are_taken(kit):
    wide = Image.new("RGB", (90, 41), (200, 10, 10))
    shown = [wide, wide.convert("L"), wide.convert("RGBA"), wide.convert("P"), wide.resize((300, 7))]
    assert len(kit.pipe.caption(shown, progress=False).texts) == 5
    codes = kit.pipe.encode_images(shown)
    assert codes.shape == (5, 4, 4)
    assert torch.equal(codes[0], codes[2])
    assert [image.size for image in kit.pipe.decode_images(codes)] == [(64, 64)] * 5


def test_the_number_of_pairs_is_that_of_prefixes_times_samples(kit):
    output = kit.pipe.joint(["a small", "two"], num_samples=2, progress=False)
    assert [record.prompt for record in output.records] == ["a small", "a small", "two", "two"]
    assert len(set(results(output))) == 4
    assert len(kit.pipe.text(num_samples=3, progress=False).texts) == 3


# the same, whatever the batch


@pytest.mark.parametrize("task", ASK)
def test_a_seed_fixes_every_sample_and_another_gives_others(kit, task):
    first, again, other = (ask(task, kit.pipe, kit, seed=seed) for seed in (5, 5, 6))
    assert results(first) == results(again)
    assert results(first) != results(other)


@pytest.mark.parametrize("task", ASK)
def test_samples_do_not_depend_on_the_batch_size(kit, task):
    whole = ask(task, kit.pipe, kit)
    for size in (1, 2):
        parts = ask(task, kit.like(batch_size=size), kit)
        assert results(parts) == results(whole)
        assert parts.records == whole.records


@pytest.mark.parametrize("task", ASK)
def test_samples_do_not_depend_on_their_neighbours(kit, task):
    guidance = {} if task == "text" else {"guidance": 1.5}
    whole = results(ask(task, kit.pipe, kit, **guidance))
    assert results(ask(task, kit.pipe, kit, (0, 0, 2), **guidance))[2] == whole[2]
    assert results(ask(task, kit.pipe, kit, (0,), **guidance)) == whole[:1]


def test_nothing_outside_is_seeded_or_printed(kit, capsys):
    before = torch.random.get_rng_state()
    ask("joint", kit.pipe, kit)
    assert torch.equal(before, torch.random.get_rng_state())
    assert capsys.readouterr() == ("", "")
    kit.pipe.text_to_image(kit.prompts[0])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "text_to_image" in printed.err
    steps = kit.pipe.settings["text_to_image"].steps
    assert f"{steps}/{steps}" in printed.err  # one tick a step, none for the state before the first


# settings


def test_guidance_costs_one_more_forward_for_each_guided_modality(kit):
    def forwards(task: str, guidance) -> int:
        return ask(task, kit.pipe, kit, guidance=guidance).forwards

    plain = 3 * 4  # rows times steps
    assert forwards("text_to_image", None) == plain
    assert forwards("text_to_image", 0) == plain
    assert forwards("text_to_image", 2.0) == 2 * plain
    assert forwards("joint", 0.0) == plain
    assert forwards("joint", {"image": 2.0}) == 2 * plain
    assert forwards("joint", 2.0) == 3 * plain
    assert forwards("caption", {"image": 2.0, "text": 0.0}) == plain
    assert forwards("caption", {"text": 2.0}) == 2 * plain


def test_guidance_of_scale_zero_changes_nothing_and_another_does(kit):
    plain, zero, other = (ask("joint", kit.pipe, kit, guidance=scale) for scale in (None, 0.0, 3.0))
    assert results(plain) == results(zero)
    assert results(plain) != results(other)
    assert zero.records[0].guidance == {"text": 0.0, "image": 0.0}


def test_steps_and_policy_of_the_call_win_over_the_models_own(kit):
    own = kit.pipe.settings["joint"]
    assert own.steps == 4
    changed = ask("joint", kit.pipe, kit, steps=2, policy=Ancestral())
    assert {record.steps for record in changed.records} == {2}
    assert {record.policy for record in changed.records} == {repr(Ancestral())}
    settings = {"joint": replace(own, steps=2, policy=Ancestral())}
    kept = kit.like()
    kept.settings = {**kept.settings, **settings}
    assert results(ask("joint", kept, kit)) == results(changed)


def test_tasks_without_settings_have_the_default(kit):
    pipe = kit.pipe
    bare = Pipeline(
        transformer=pipe.transformer,
        text_tokenizer=pipe.text_tokenizer,
        image_tokenizer=pipe.image_tokenizer,
        layout=pipe.layout,
        settings={"joint": Settings(steps=3)},
    )
    assert bare.settings["joint"].steps == 3
    assert bare.settings["caption"] == Settings()


def test_the_policy_of_a_call_is_heeded_at_temperature_zero(kit):
    layout = kit.pipe.layout
    pipe = kit.even()
    cold = pipe.caption(kit.pictures[0], policy=Unmask(temperature=0.0), steps=1, progress=False)
    assert cold.texts == (kit.pipe.text_tokenizer.decode([0] * layout.caption),)


# what is given stays


@pytest.mark.parametrize("task", ["joint", "text"])
def test_prefixes_stay(kit, task):
    prefixes = ["a small red", "two", "one large blue star on"]
    output = getattr(kit.pipe, task)(prefixes, num_samples=2, progress=False)
    for text, prefix in zip(output.texts, [p for p in prefixes for _ in range(2)], strict=True):
        assert text.startswith(prefix)


def test_infill_keeps_the_words_around_its_holes(kit):
    pipe, layout = kit.pipe, kit.pipe.layout
    filled = "a small red circle"
    whole = pipe.text_tokenizer.encode(filled)
    place = len(pipe.text_tokenizer.encode("a small"))
    word = whole[len(pipe.text_tokenizer.encode("a")) : place]
    assert len(word) == 1, "the hole wants a word of one token"
    with_hole = pipe.codec.ids_with_holes("a ___ red circle", "___")
    assert [word[0] if i is None else i for i in with_hole] == whole
    knowing = kit.saying(word, layout.pair_frame.places[0].start + place - 1, layout.pair_frame.length)
    for hole in ("___", "?"):
        asked = f"a {hole} red circle"
        assert knowing.infill(asked, hole=hole, progress=False).texts == (filled,)
    assert ask("infill", pipe, kit).texts != tuple(HOLES)


@pytest.mark.parametrize(("text", "pieces"), [
    ("___", ["", ""]),
    ("___ star", ["", "star"]),
    ("a ___", ["a", ""]),
    ("a ___ ___ star", ["a", "", "star"]),
    ("plain  text ", ["plain  text "]),
])  # fmt: skip
def test_holes_stand_where_they_are_written(kit, text, pieces):
    expected = []
    for number, piece in enumerate(pieces):
        expected += [None] if number else []
        expected += kit.pipe.text_tokenizer.encode(piece)
    assert kit.pipe.codec.ids_with_holes(text, "___") == expected


def test_infill_needs_no_picture(kit):
    output = kit.pipe.infill(HOLES, progress=False)
    assert len(output.texts) == 3
    assert output.images == ()


class Spy:
    """An image tokenizer that remembers what went through it."""

    def __init__(self, inner) -> None:
        self.inner = inner
        self.size, self.downsample, self.digits = inner.size, inner.downsample, inner.digits
        self.encoded: list[Tensor] = []
        self.decoded: list[Tensor] = []

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return self.inner.grid(height, width)

    def encode(self, images: Tensor) -> Tensor:
        self.encoded.append(images)
        return self.inner.encode(images)

    def decode(self, codes: Tensor) -> Tensor:
        self.decoded.append(codes)
        return self.inner.decode(codes)


def test_inpainting_opens_what_the_mask_touches_and_nothing_else(kit):
    faint = Image.new("L", (64, 64), 0)
    faint.putpixel((47, 16), 1)
    masks = [*kit.masks, faint, kit.masks[0].convert("1"), kit.masks[0].convert("RGB")]
    job = tasks.inpaint(kit.pipe.codec, [kit.pictures[0]] * 6, masks, [kit.prompts[0]] * 6)
    place = job.frame.places[1]
    expected = np.stack([patches(mask) for mask in masks]).reshape(6, 16)
    assert expected.sum(axis=1).tolist()[:4] == [4, 1, 4, 1]
    for column in (job.canvas.masked, job.canvas.fillable):
        assert (column[:, place].numpy() == expected).all()
        assert int(column.sum()) == expected.sum()


def test_inpainting_leaves_the_given_codes_and_hides_the_masked_pixels(kit):
    spy = Spy(kit.pipe.image_tokenizer)
    output = ask("inpaint", kit.like(image_tokenizer=spy), kit)
    assert len(output.images) == 3
    seen, drawn = spy.encoded[0], spy.decoded[-1]
    given = kit.pipe.image_tokenizer.encode(seen)
    covered = torch.from_numpy(np.stack([np.asarray(mask) > 0 for mask in kit.masks]))
    assert (seen.permute(0, 2, 3, 1)[covered] == 0).all()
    whole = kit.pipe.codec.pixels(kit.pictures)
    assert torch.equal(seen.permute(0, 2, 3, 1)[~covered], whole.permute(0, 2, 3, 1)[~covered])
    holes = torch.from_numpy(np.stack([patches(mask) for mask in kit.masks]))
    assert torch.equal(drawn[~holes], given[~holes])
    assert not torch.equal(drawn[holes], given[holes])


def test_inpainting_knows_a_single_pixel_of_a_large_picture(kit):
    picture, mask = kit.pictures[0].resize((512, 512)), Image.new("L", (512, 512), 0)
    mask.putpixel((130, 300), 255)
    job = tasks.inpaint(kit.pipe.codec, picture, mask, kit.prompts[0])
    assert job.canvas.masked[0, job.frame.places[1]].nonzero().flatten().tolist() == [4 * 2 + 1]


def test_inpainting_nothing_asks_the_model_nothing(kit):
    pipe, model = kit.watched()
    output = pipe.inpaint(kit.pictures[0], kit.mask(0, 0, 0, 0), kit.prompts[0], progress=False)
    rebuilt = pipe.decode_images(pipe.encode_images(kit.pictures[0]))
    assert (model.calls, output.forwards) == (0, 0)
    assert pixels(output.images) == pixels(rebuilt)


# texts


def test_nothing_behind_the_end_is_shown(kit):
    layout, encode = kit.pipe.layout, kit.pipe.text_tokenizer.encode
    said = [*encode("a red circle"), layout.vocab.specials["end"], *encode("and a secret")]
    pipe = kit.saying(said, layout.pair_frame.places[0].start, layout.pair_frame.length)
    assert pipe.caption(kit.pictures[0], progress=False).texts == ("a red circle",)
    assert pipe.joint(progress=False).texts == ("a red circle",)
    *_, last = pipe.stream_caption(kit.pictures[0])
    assert last.texts == ("a red circle",)


def test_holes_are_shown_as_such_and_only_before_the_end(kit):
    codec, end = kit.pipe.codec, kit.pipe.layout.vocab.specials["end"]
    small, red = codec.ids(["a small"], 9)[0], codec.ids(["red"], 9)[0]
    ids = [*small, 0, 0, *red, end, 0, *red]
    holes = [*([False] * len(small)), True, True, *([False] * len(red)), False, True, *([False] * len(red))]
    assert codec.read(ids, holes) == "a small _ _ red"
    assert codec.read([0, *red], [True, *([False] * len(red))]) == "_ red"
    assert codec.read([end, *red], [False] * (1 + len(red))) == ""


SPELLED = ["<mask>", "begin_image", "<|soi|>", "end", "<pad> <|mdm_mask|> </s>", "_ ___ \\n\t\x00"]


@pytest.mark.parametrize("text", SPELLED)
def test_prompts_that_spell_control_tokens_are_ordinary_text(kit, text):
    pipe, vocab = kit.pipe, kit.pipe.layout.vocab
    ids = pipe.codec.ids([text], 99)[0]
    assert all(0 <= i < vocab.num_text for i in ids)
    plain, spelt = (tasks.draw(pipe.codec, prompt).canvas for prompt in ("a circle", text))
    controls = set(vocab.specials.values()) - {vocab.specials["end"]} | {vocab.mask}
    for control in controls:
        assert ((plain.tokens == control) == (spelt.tokens == control)).all(), control
    assert pipe.text(text, progress=False).texts[0].startswith(text)
    assert pipe.text_to_image(text, progress=False).records[0].prompt == text


# wrong input


LONG = "circle " * 80
WRONG: dict[str, tuple[Callable, str]] = {
    "long prompt": (lambda p, k: p.text_to_image(LONG), "room for 63"),
    "long question": (lambda p, k: p.answer(k.pictures[0], LONG), "room for 27"),
    "long prefix": (lambda p, k: p.joint(LONG), "has room for"),
    "long stream": (lambda p, k: p.stream_text_to_image(LONG), "has room for"),
    "long infill": (lambda p, k: p.infill(LONG + "___"), "do not fit"),
    "long score": (lambda p, k: p.score(k.pictures[0], LONG), "has room for"),
    "more steps than positions": (
        lambda p, k: p.text_to_image("a", steps=500, policy=Unmask()),
        "steps=500: a step fills one position at least",
    ),
    "no prompt": (lambda p, k: p.text_to_image([]), "got no text, wanted at least one"),
    "no picture": (lambda p, k: p.caption([]), "got no picture, wanted at least one"),
    "no samples": (lambda p, k: p.joint(num_samples=0), "num_samples must be at least 1, got 0"),
    "no hole": (lambda p, k: p.infill("a", hole=""), "hole must not be empty"),
    "questions": (
        lambda p, k: p.answer(k.pictures, k.questions[:2]),
        "3 pictures and 2 questions; wanted one question for each, or one",
    ),
    "infill": (
        lambda p, k: p.infill(HOLES, k.pictures[:2]),
        "3 texts and 2 pictures; wanted one picture for each text",
    ),
    "inpaint": (
        lambda p, k: p.inpaint(k.pictures, k.masks[:1], k.prompts),
        "3 pictures, 1 masks and 3 prompts; wanted one of each",
    ),
    "score": (
        lambda p, k: p.score(k.pictures, "a circle"),
        "3 pictures and 1 texts; wanted one text for each picture",
    ),
    "mask size": (
        lambda p, k: p.inpaint(k.pictures[0], k.mask(0, 0, 9, 9, size=32), "a"),
        "mask 0 is (32, 32) pixels, its picture (64, 64); wanted the same",
    ),
    "guidance": (
        lambda p, k: p.joint(guidance={"picture": 1.0, "text": 1.0}),
        "guidance for ['picture']; it is a number, or a mapping from text and image to numbers",
    ),
    "stream guidance": (
        lambda p, k: list(p.stream_caption(k.pictures[0], guidance={"images": 1.0})),
        "guidance for ['images']",
    ),
    "steps": (lambda p, k: p.joint(steps=0, progress=False), "steps must be at least 1, got 0"),
    "draws": (lambda p, k: p.score(k.pictures[0], "a", draws=0), "num_draws is 0"),
    "surrogate": (lambda p, k: p.text_to_image("a \ud800"), "lone surrogate"),
    "file name": (lambda p, k: p.caption("a.png"), "wanted PIL images, got str"),
    "array": (lambda p, k: p.caption([np.zeros((64, 64, 3))]), "wanted PIL images, got ndarray"),
    "number": (lambda p, k: p.text_to_image([3]), "wanted texts, got an object of int"),
    "width": (
        lambda p, k: Pipeline.untrained(p.codec, dim=48),
        "dim must be a multiple of 32 and depth at least 1, got 48 and 6",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_named(kit, name):
    pipe, model = kit.watched()
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        call(pipe, kit)
    assert model.calls == 0


def test_settings_of_an_unknown_task_are_refused(kit):
    message = re.escape("settings for unknown tasks ['drawing']; the tasks are text_to_image, caption")
    with pytest.raises(ValueError, match=message):
        Pipeline.untrained(kit.pipe.codec, dim=32, depth=1, settings={"drawing": Settings()})

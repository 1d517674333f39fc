"""A generation watched step by step."""

from __future__ import annotations

import numpy as np
import pytest
from asked import ASK, patches, pixels, shown, stream


@pytest.mark.parametrize("name", ASK)
def test_a_stream_shows_each_step_and_ends_where_the_call_does(kit, name):
    moments = list(stream(name, kit.pipe, kit))
    assert [moment.step for moment in moments] == [0, 1, 2, 3, 4]
    assert {moment.steps for moment in moments} == {4}
    output = getattr(kit.pipe, name)(*shown(name, kit), seed=5, progress=False)
    assert moments[-1].texts == output.texts
    assert pixels(moments[-1].images) == pixels(output.images)


@pytest.mark.parametrize(("name", "text", "image"), [
    ("text_to_image", 0.0, 1.0),
    ("caption", 1.0, 0.0),
    ("joint", 1.0, 1.0),
    ("inpaint", 0.0, 4 / 16),
    ("infill", 8 / 64, 0.0),
])  # fmt: skip
def test_levels_fall_to_zero_where_something_is_made_and_stay_zero_where_it_is_given(kit, name, text, image):
    levels = [moment.levels for moment in stream(name, kit.pipe, kit)]
    assert levels[0] == pytest.approx({"text": text, "image": image})
    assert levels[-1] == {"text": 0.0, "image": 0.0}
    for modality, start in (("text", text), ("image", image)):
        walk = [level[modality] for level in levels]
        assert walk == sorted(walk, reverse=True)
        assert (len(set(walk)) == 1) == (start == 0.0)


def test_beside_text_alone_the_picture_stays_unknown(kit):
    levels = [moment.levels for moment in stream("text", kit.pipe, kit)]
    given = len(kit.pipe.text_tokenizer.encode("a small"))
    assert levels[0] == pytest.approx({"text": 1 - given / kit.pipe.layout.caption, "image": 1.0})
    assert levels[-1] == {"text": 0.0, "image": 1.0}


@pytest.mark.parametrize("name", ASK)
def test_a_stream_that_is_left_asks_the_model_no_more(kit, name):
    pipe, model = kit.watched()
    for moment in stream(name, pipe, kit, steps=4):
        assert model.calls == moment.step
        if moment.step == 2:
            break
    assert model.calls == 2


def test_what_is_not_drawn_yet_is_grey(kit):
    first, *_, last = stream("text_to_image", kit.pipe, kit)
    assert (np.asarray(first.images[0]) == 128).all()
    assert (np.asarray(last.images[0]) != 128).any()
    begun = next(stream("inpaint", kit.pipe, kit))
    holes = patches(kit.masks[0]).repeat(16, 0).repeat(16, 1)
    assert (np.asarray(begun.images[0])[holes] == 128).all()
    assert (np.asarray(begun.images[0])[~holes] != 128).any()

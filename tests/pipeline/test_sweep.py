"""Points are sampled as they say, kept one by one, not measured twice; orders cost the same forwards."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mmdlm import sweep as room
from mmdlm.canvas import IMAGE, TEXT
from mmdlm.data import captions
from mmdlm.evaluate import KINDS
from mmdlm.output import Output
from mmdlm.pipeline import Pipeline
from mmdlm.pretrained import Settings
from mmdlm.sampling import Ancestral, Unmask, denoise
from mmdlm.sweep import (
    HALTON,
    ORDERS,
    POLICIES,
    Curves,
    Paper,
    guidance_points,
    joint_points,
    measure,
    policies,
    read_curves,
    steps_points,
    sweep,
    take_up,
)

PAPER = Paper(num=3, kinds=("one", "groups"), seed=5)


@pytest.fixture(scope="module")
def questions():
    return PAPER.questions()


@pytest.fixture
def asked(monkeypatch):
    """The points that were measured, in their order."""
    points = []

    def watched(pipe, point, questions, *, seed):
        points.append(point)
        return measure(pipe, point, questions, seed=seed)

    monkeypatch.setattr(room, "measure", watched)
    return points


def like(pipe: Pipeline, **settings: Settings) -> Pipeline:
    """The same model with other settings for some tasks."""
    return Pipeline(
        transformer=pipe.transformer,
        text_tokenizer=pipe.text_tokenizer,
        image_tokenizer=pipe.image_tokenizer,
        layout=pipe.layout,
        settings={**pipe.settings, **settings},
    )


# what is asked


def test_a_paper_takes_of_all_kinds_in_turn():
    asked = Paper(num=7, kinds=KINDS, seed=1).questions()
    assert [q.kind for q in asked] == [*KINDS, *KINDS[:3]]
    assert [q.scene for q in asked] == [q.scene for q in Paper(num=9, kinds=KINDS, seed=1).questions()[:7]]
    with pytest.raises(ValueError, match="unknown kinds"):
        Paper(kinds=("one", "four")).questions()
    with pytest.raises(ValueError, match="unknown kinds"):
        Paper(kinds=()).questions()


def test_steps_are_asked_of_every_policy_and_both_tasks(tiny):
    points = steps_points(tiny, (2, 8))
    assert len(points) == len({(p.task, p.line, p.x) for p in points}) == 2 * (3 + 2 * len(POLICIES))
    assert {p.task for p in points} == {"text_to_image", "caption"}
    for point in points:
        assert point.policy == policies(tiny, point.task)[point.line]
        assert (point.x, point.guidance, point.cost) == (point.steps, 0.0, point.steps)


def test_policies_differ_and_halton_is_for_pictures(tiny):
    drawing, telling = policies(tiny, "text_to_image"), policies(tiny, "caption")
    assert len({repr(policy) for policy in drawing.values()}) == len(drawing)
    assert drawing.keys() - telling.keys() == {HALTON}


def test_guidance_is_asked_at_the_models_own_settings(tiny):
    points = guidance_points(tiny, (0.0, 2.0))
    own = tiny.settings["text_to_image"]
    assert [(p.x, p.guidance, p.steps, p.policy) for p in points] == [
        (scale, scale, own.steps, own.policy) for scale in (0.0, 2.0)
    ]
    assert [p.cost for p in points] == [own.steps, 2 * own.steps]


# pairs at equal forwards


@pytest.mark.parametrize("total", [2, 3, 5, 8, 16, 32, 64])
def test_orders_cost_equal_forwards(tiny, questions, total):
    points = joint_points(tiny, (total,))
    assert [p.line for p in points] == list(ORDERS)
    found = [measure(tiny, point, questions, seed=0) for point in points]
    assert [one.forwards for one in found] == [total * len(questions)] * len(ORDERS)


@pytest.mark.parametrize("total", [3, 7, 12, 30, 64])
def test_orders_walk_as_they_are_called(tiny, total):
    layout, walks = tiny.layout, {}
    for point in joint_points(tiny, (total,)):
        canvas = layout.joint([[]])
        spans = {kind: (canvas.modality == kind) & canvas.masked for kind in (TEXT, IMAGE)}
        states = denoise(tiny.transformer, canvas, policy=point.policy, steps=total, mask=layout.vocab.mask)
        left = [
            [int((state.canvas.masked & spans[kind]).sum()) for kind in (TEXT, IMAGE)] for state in states
        ]
        walks[point.line] = left
        assert len(left) == total + 1
        assert left[-1] == [0, 0]
    text, image = walks["both at once"][0]
    both = walks["both at once"][1]
    assert both[0] < text
    assert both[1] < image
    assert all(now[0] == 0 or now[1] == image for now in walks["text first"])
    assert all(now[1] == 0 or now[0] == text for now in walks["image first"])
    turn = sum(now[0] > 0 for now in walks["text first"])
    assert turn == max(total // 2, total - image)
    assert sum(now[1] > 0 for now in walks["image first"]) == min(total // 2, image)


def test_totals_that_cannot_be_spent_are_refused(tiny):
    for total in (1, 65):
        with pytest.raises(ValueError, match=f"{total} forwards cannot be compared: wanted from 2 to 64"):
            joint_points(tiny, (8, total))


def test_pairs_are_compared_on_confidence_alone(tiny):
    other = like(tiny, joint=Settings(policy=Ancestral()))
    with pytest.raises(ValueError, match=r"of class Unmask, and the model's is Ancestral\("):
        joint_points(other)


def test_forwards_that_are_not_equal_are_not_passed_over(tiny, questions):
    point = replace(joint_points(tiny, (4,))[0], policy=Unmask(), steps=70)
    with pytest.raises(ValueError, match=r"both at once: \d+ forwards, wanted 70 for each of 3"):
        measure(tiny, point, questions, seed=0)


# what is measured


class Fixed:
    """Draws and tells the truth about every second question; dreams a pair that agrees, one not, nonsense."""

    def __init__(self, questions, own: Pipeline) -> None:
        self.settings, self.training = own.settings, {}
        self.questions = questions
        self.asked: list[dict] = []

    def _note(self, **settings) -> None:
        assert settings.pop("progress") is False
        self.asked.append(settings)

    def text_to_image(self, prompts, **settings) -> Output:
        self._note(**settings)
        assert prompts == [q.caption for q in self.questions]
        pictures = [q.picture for q in self.questions]
        return Output(images=(pictures[0], pictures[0], pictures[2]), forwards=6)

    def caption(self, images, **settings) -> Output:
        self._note(**settings)
        told = [captions(q.scene.description)[0] for q in self.questions]
        return Output(texts=(told[0], told[0], "nothing"), forwards=9)

    def joint(self, *, num_samples, **settings) -> Output:
        self._note(**settings)
        first, second, _ = self.questions
        pictures = (first.picture, first.picture, first.picture)
        return Output(texts=(first.caption, second.caption, "no"), images=pictures, forwards=num_samples * 4)


def test_results_are_counted_by_task(tiny, questions):
    model = Fixed(questions, tiny)
    points = [steps_points(tiny, (2,))[0], steps_points(tiny, (2,))[-1], joint_points(tiny, (4,))[1]]
    found = [measure(model, point, questions, seed=7) for point in points]
    assert [(one.right, one.total, one.forwards) for one in found] == [(2, 3, 6), (1, 3, 9), (1, 3, 12)]
    assert [(one.lawful, one.distinct) for one in found] == [(None, None), (None, None), (2, 3)]
    first, second, third = (one.law for one in found)
    assert first is second is None
    assert third is not None
    assert list(third) == ["count", "shape", "colour", "size", "relation", "background"]
    assert third["background"] >= 1 / 3  # one of three captions is nonsense
    assert model.asked == [
        {"steps": p.steps, "guidance": p.guidance, "policy": p.policy, "seed": 7} for p in points
    ]
    assert [one.policy for one in found] == [repr(p.policy) for p in points]


# the file


def test_a_broken_sweep_is_taken_up_point_by_point(tiny, tmp_path, asked):
    path, points = tmp_path / "curves.json", [*steps_points(tiny, (2,))[:3], *joint_points(tiny, (2,))]
    begun = sweep(tiny, points, take_up(path, tiny, PAPER), path)
    first = [next(begun) for _ in range(2)]
    begun.close()  # broken off
    kept = take_up(path, tiny, PAPER)
    assert list(kept.measurements) == first
    left = [point for point in points if not kept.holds(point)]
    assert left == points[2:]
    rest = list(sweep(tiny, left, kept, path))
    assert asked == points
    whole = read_curves(path)
    assert list(whole.measurements) == [*first, *rest]
    assert all(whole.holds(point) for point in points)


def test_a_point_counts_only_with_the_very_same_settings(tiny, tmp_path):
    path, (point, *_) = tmp_path / "curves.json", steps_points(tiny, (2,))
    empty = Curves(model=tiny.fingerprint, paper=PAPER)
    assert not empty.holds(point)
    (found,) = sweep(tiny, [point], empty, path)
    curves = read_curves(path)
    assert curves.holds(point)
    changed = replace(point, policy=Unmask(temperature=0.9))
    assert not curves.holds(changed)
    for change in ({"steps": 3}, {"guidance": 1.0}, {"task": "caption"}, {"x": 4.0}):
        assert not curves.holds(replace(point, **change)), change
    (again,) = sweep(tiny, [changed], curves, path)  # stands in the place of the old one
    assert read_curves(path).measurements == (again,)
    assert again.policy != found.policy


def test_a_file_of_another_model_or_paper_is_left_alone(tiny, tmp_path):
    path = tmp_path / "curves.json"
    list(sweep(tiny, steps_points(tiny, (2,))[:1], Curves(model=tiny.fingerprint, paper=PAPER), path))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="choose another folder, or remove the file"):
        take_up(path, tiny, replace(PAPER, num=4))
    path.write_text(path.read_text().replace(tiny.fingerprint, "another"))
    with pytest.raises(ValueError, match="holds model another on"):
        take_up(path, tiny, PAPER)
    path.write_bytes(before)
    assert len(take_up(path, tiny, PAPER).measurements) == 1
    assert take_up(tmp_path / "none.json", tiny, PAPER) == Curves(model=tiny.fingerprint, paper=PAPER)


def test_what_is_no_longer_the_models_own_is_left_out(tiny, tmp_path):
    path = tmp_path / "curves.json"
    points = [steps_points(tiny, (2,))[0], *guidance_points(tiny, (0.0, 1.0)), *joint_points(tiny, (2,))]
    list(sweep(tiny, points, Curves(model=tiny.fingerprint, paper=PAPER), path))
    assert len(take_up(path, tiny, PAPER).measurements) == 7
    changed = like(tiny, text_to_image=Settings(steps=5), joint=Settings(policy=Unmask(temperature=0.1)))
    assert [found.figure for found in take_up(path, changed, PAPER).measurements] == ["steps"]
    changed = like(tiny, joint=Settings(steps=9, policy=tiny.settings["joint"].policy))
    assert len(take_up(path, changed, PAPER).measurements) == 7
    path.write_text(path.read_text().replace("temperature=0.0", "temperature=0.05"))
    figures = [found.figure for found in take_up(path, tiny, PAPER).measurements]
    assert "steps" not in figures


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"model": "m", "paper": {"kinds": []}, "measurements": [{}]}']
)
def test_a_file_that_is_none_is_named(tmp_path, text):
    (tmp_path / "curves.json").write_text(text)
    with pytest.raises(ValueError, match=r"curves\.json does not hold curves of this version"):
        read_curves(tmp_path / "curves.json")


def test_results_are_the_same_each_time(tiny, questions):
    for point in (steps_points(tiny, (3,))[-1], joint_points(tiny, (4,))[2]):
        first, second = (measure(tiny, point, questions, seed=1) for _ in range(2))
        assert replace(first, seconds=0.0) == replace(second, seconds=0.0)
        json.dumps(vars(first))

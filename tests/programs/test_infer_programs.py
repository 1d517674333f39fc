"""The programs of infer/: what they print and write, how wrong input ends, and what their help costs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from mmdlm import Pipeline
from mmdlm.evaluate import Exam
from mmdlm.io import seal
from mmdlm.output import read_record
from mmdlm.sweep import ORDERS

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "infer").glob("*.py"))
PROMPT = "a small red circle on a white background"
PNG = b"\x89PNG\r\n\x1a\n"

# In one fresh interpreter: the help of every program, and which heavy libraries that loads.
HELP = """
import contextlib, io, json, runpy, sys
told = {}
for path in sys.argv[1:]:
    sys.argv = [path, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_path(path, run_name="__main__")
            status = 0
        except SystemExit as error:
            status = error.code or 0
    told[path] = [status, out.getvalue()]
heavy = sorted({"torch", "numpy", "PIL", "tokenizers", "safetensors"} & set(sys.modules))
print(json.dumps([told, heavy]))
"""


def shell(*arguments: object, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.fixture
def model(tiny_folder: Path) -> tuple[str, ...]:
    return "--model", str(tiny_folder)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """Two pictures and a mask for the first."""
    folder = tmp_path_factory.mktemp("pictures")
    questions = Exam(kinds=("one",), num=2).questions()
    questions[0].picture.save(folder / "a.png")
    questions[1].picture.resize((100, 80)).save(folder / "b.jpg")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (20, 20, 44, 44))
    mask.save(folder / "mask.png")
    return str(folder / "a.png"), str(folder / "b.jpg"), str(folder / "mask.png")


# what they do


def test_text_to_image_draws_each_prompt_and_writes_down_how(program, model, tmp_path):
    out = tmp_path / "pictures"
    done = program("infer/text_to_image.py", PROMPT, "two stars", *model, "--num", 2, "--out", out, "--quiet")
    assert (done.status, done.err) == (0, "")
    paths = [out / f"sample-{number:03d}.png" for number in range(4)]
    prompts = [PROMPT, PROMPT, "two stars", "two stars"]
    assert done.lines == [f"{path}\t{prompt}" for path, prompt in zip(paths, prompts, strict=True)]
    for number, path in enumerate(paths):
        assert path.read_bytes().startswith(PNG)
        found = read_record(path)
        assert (found.prompt, found.seed, found.sample) == (prompts[number], 0, number)


def test_a_seed_gives_the_same_bytes_and_another_does_not(program, model, tmp_path):
    def drawn(name: str, seed: int) -> bytes:
        arguments = (PROMPT, *model, "--seed", seed, "--steps", 3, "--guidance", 1.5, "--quiet")
        program("infer/text_to_image.py", *arguments, "--out", tmp_path / name)
        return (tmp_path / name / "sample-000.png").read_bytes()

    assert drawn("one", 7) == drawn("two", 7) != drawn("three", 8)
    found = read_record(tmp_path / "one" / "sample-000.png")
    assert (found.steps, found.guidance) == (3, {"text": 1.5, "image": 1.5})


def test_the_bar_is_on_stderr_unless_quiet(program, model, tmp_path):
    loud = program("infer/text_to_image.py", PROMPT, *model, "--out", tmp_path)
    assert len(loud.lines) == 1
    assert "text_to_image" in loud.err


def test_caption_says_a_line_for_each_picture(program, model, pictures, tiny):
    done = program("infer/caption.py", *pictures[:2], *model, "--quiet", "--seed", 2)
    opened = [Image.open(path).convert("RGB") for path in pictures[:2]]
    texts = tiny.caption(opened, seed=2, progress=False).texts
    wanted = [f"{path}\t{text}" for path, text in zip(pictures[:2], texts, strict=True)]
    assert done == (0, "".join(f"{line}\n" for line in wanted), "")


def test_answer_says_a_line_for_each_question(program, model, pictures, tiny):
    asked = ("which colour is it?", "how many circles are there?")
    done = program("infer/answer.py", pictures[0], *asked, *model, "--quiet")
    texts = tiny.answer([Image.open(pictures[0])] * 2, asked, progress=False).texts
    assert done.out == "".join(f"{q}\t{text}\n" for q, text in zip(asked, texts, strict=True))


def test_inpaint_writes_the_picture(program, model, pictures, tmp_path):
    image, _, mask = pictures
    done = program("infer/inpaint.py", image, mask, PROMPT, *model, "--out", tmp_path / "x", "--quiet")
    assert done == (0, f"{tmp_path / 'x' / 'sample-000.png'}\n", "")
    assert read_record(tmp_path / "x" / "sample-000.png").task == "inpaint"


def test_joint_dreams_pairs_with_a_prefix_or_without(program, model, tmp_path, tiny):
    done = program("infer/joint.py", *model, "--num", 2, "--out", tmp_path / "free", "--quiet")
    texts = tiny.joint(num_samples=2, progress=False).texts
    paths = [tmp_path / "free" / f"sample-{number:03d}.png" for number in range(2)]
    assert done.out == "".join(f"{path}\t{text}\n" for path, text in zip(paths, texts, strict=True))
    begun = program(
        "infer/joint.py", "a small", "two", *model, "--num", 1, "--out", tmp_path / "begun", "--quiet"
    )
    assert "sample-000.png\ta small" in begun.out
    assert "sample-001.png\ttwo" in begun.out


def test_text_writes_on_or_fills_holes(program, model, tiny):
    begun = program("infer/text.py", "a small", *model, "--num", 2, "--quiet")
    assert begun.out == "".join(f"{t}\n" for t in tiny.text("a small", num_samples=2, progress=False).texts)
    filled = program("infer/text.py", "a ?? circle", "--hole", "??", *model, "--num", 2, "--quiet")
    asked = ["a ___ circle"] * 2
    assert filled.out == "".join(f"{t}\n" for t in tiny.infill(asked, progress=False).texts)


def test_score_prints_a_table_or_json(program, model, small_law):
    told = program("infer/score.py", *model, "--num", 2, "--seeds", 2, "--unseen", 1, "--draws", 2, "--json")
    scores = json.loads(told.out)
    assert len(told.lines) == 1
    assert told.err == ""
    tasks = ("text_to_image", "caption", "answer", "inpaint")
    assert [scores[task]["num"] for task in (*tasks, "joint", "likelihood")] == [16] * 4 + [4, 16]
    assert set(scores["caption"]["by_kind"]) == {"one", "two", "three", "groups"}
    assert scores["inpaint"]["untouched"] == {"right": 16, "num": 16}
    assert [scores["unseen"][task]["num"] for task in tasks[:3]] == [8] * 3
    assert list(scores["unseen"]) == list(tasks[:3])
    exam = scores["exam"]
    assert (exam["kinds"], exam["seeds"]) == (["one", "two", "groups", "three"], [0, 1])
    assert (exam["num"], exam["split"]) == (2, "held_out")
    assert scores["joint"]["mixture"] == [0.25] * 4


def test_score_prints_a_table_of_the_tasks_that_are_asked(program, model, small_law):
    few = ("--num", 1, "--seeds", 2, "--seed", 3, "--kinds", "one,two", "--split", "unseen", "--unseen", 0)
    table = program("infer/score.py", *model, *few, "--tasks", "caption,joint,likelihood", "--law", "1,1,0,0")
    assert table.status == 0
    assert table.lines[0].startswith("1 unseen scenes of each kind, seeds 3, 4; model ")
    assert [line.split()[0] for line in table.lines[2:5]] == ["caption", "one", "two"]
    assert [line.split()[-4] for line in table.lines[2:5]] == ["4", "2", "2"]
    assert "groups: 0.5, 0.5, 0, 0)" in table.out
    assert "text_to_image" not in table.out
    assert "never-seen" not in table.out
    assert "+- " in table.out


def test_score_holds_pairs_against_the_law_that_the_model_names(program, tiny_folder, small_law, tmp_path):
    pipe = Pipeline.from_pretrained(tiny_folder)
    pipe.training = {"mixture": [0.1, 0.2, 0.3, 0.4]}
    pipe.save_pretrained(tmp_path / "model")
    few = ("--model", tmp_path / "model", "--num", 1, "--seeds", 1, "--kinds", "one", "--tasks", "joint")
    told = program("infer/score.py", *few, "--json")
    assert json.loads(told.out)["joint"]["mixture"] == [0.1, 0.2, 0.3, 0.4]
    told = program("infer/score.py", *few, "--json", "--law", "0,0,0,2")
    assert json.loads(told.out)["joint"]["mixture"] == [0.0, 0.0, 0.0, 1.0]


def test_demo_makes_one_page_with_all_of_it(program, model, small_law, tmp_path):
    done = program("infer/demo.py", *model, "--num", 2, "--kinds", "one", "--out", tmp_path)
    assert done.status == 0
    assert done.lines[0].endswith("== alone: tokens equal")
    written = {Path(line) for line in done.lines[1:]}
    assert written == set(tmp_path.glob("*.*"))
    names = {path.name for path in written}
    walks = {f"walk-{name}.gif" for name in ("text-to-image", "caption", "joint", "inpaint")}
    assert walks | {"index.html", "scores.json", "joint-00.png", "text_to_image-01.png"} <= names
    page = (tmp_path / "index.html").read_text("utf-8")
    assert page.count("data:image/gif") == 4
    assert page.count("data:image/png") == 4 * 2
    assert 'src="data:' in page
    assert "http" not in page
    assert json.loads((tmp_path / "scores.json").read_text())["exam"]["num"] == 2


def test_demo_shows_the_curves_of_its_model(program, model, small_law, tmp_path):
    curves = ("infer/curves.py", *model, "--num", 2, "--kinds", "one", "--steps", "2,4", "--scales", "0,1")
    program(*curves, "--forwards", "2,4", "--out", tmp_path / "curves")
    stored = tmp_path / "curves" / "curves.json"
    arguments = (*model, "--num", 2, "--kinds", "one", "--out", tmp_path / "demo", "--curves", stored)
    assert program("infer/demo.py", *arguments).status == 0
    page = (tmp_path / "demo" / "index.html").read_text("utf-8")
    assert page.count("<svg") == 2 + 7
    assert "Measured beforehand" in page
    stored.write_text(stored.read_text().replace(Pipeline.from_pretrained(model[1]).fingerprint, "another"))
    refused(program("infer/demo.py", *arguments), "was measured on model another")


def test_demo_finds_the_curves_in_the_models_folder(program, tiny_folder, small_law, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    made = ("--model", folder, "--num", 2, "--kinds", "one", "--out", folder)
    assert program("infer/curves.py", *made, "--only", "joint", "--forwards", "2").status == 0
    (folder / "curves.html").unlink()
    seal(folder)
    done = program(
        "infer/demo.py", "--model", folder, "--num", 1, "--kinds", "one", "--out", tmp_path / "demo"
    )
    assert done.status == 0
    page = (tmp_path / "demo" / "index.html").read_text("utf-8")
    assert page.count("Together, or one after the other?") == 2


def test_curves_measure_each_point_once_and_draw_them(program, model, tmp_path):
    arguments = ("infer/curves.py", *model, "--num", 2, "--kinds", "one,groups", "--out", tmp_path)
    joint = program(*arguments, "--only", "joint", "--forwards", "2,4")
    assert joint.status == 0
    assert joint.lines[-2:] == [str(tmp_path / "curves.json"), str(tmp_path / "curves.html")]
    assert [line.split()[0] for line in joint.lines[:-2]] == [f"{n}/8" for n in range(1, 9)]
    guided = program(*arguments, "--only", "guidance,joint", "--scales", "0,1.5", "--forwards", "2,4,8")
    assert len(guided.lines) == 2 + 2 + 4  # two scales, and of the pairs what is new
    again = program(*arguments, "--only", "guidance,joint", "--scales", "0,1.5", "--forwards", "2,4,8")
    assert again.lines == joint.lines[-2:]
    stored = json.loads((tmp_path / "curves.json").read_text())
    assert len(stored["measurements"]) == 2 + 12
    assert stored["paper"] == {"num": 2, "kinds": ["one", "groups"], "seed": 0}
    dreamt = [found for found in stored["measurements"] if found["line"] in ORDERS]
    assert sorted(found["forwards"] / found["total"] for found in dreamt) == [2] * 4 + [4] * 4 + [8] * 4
    page = (tmp_path / "curves.html").read_text("utf-8")
    assert page.count("<svg") == 1 + 2
    assert "http" not in page
    refused(program(*arguments[:-1], tmp_path, "--seed", 1, "--only", "joint"), "choose another folder")


# wrong input ends in a line


def refused(done, *words: str) -> None:
    assert done.status == 2
    assert done.out == ""
    assert len(done.err.splitlines()) == 1, done.err
    for word in words:
        assert word in done.err


def test_wrong_files_are_named(program, model, pictures, tmp_path):
    garbage = tmp_path / "garbage.png"
    garbage.write_bytes(PNG + b"and nothing behind it")
    missing = tmp_path / "missing.png"
    refused(
        program("infer/caption.py", pictures[0], missing, *model), "caption.py: ", "missing.png", "no such"
    )
    refused(program("infer/answer.py", garbage, "what?", *model), "answer.py: ", "garbage.png")
    refused(program("infer/caption.py", __file__, *model), "not a picture")
    refused(program("infer/inpaint.py", pictures[0], tmp_path, PROMPT, *model), str(tmp_path))


def test_wrong_masks_are_named(program, model, pictures):
    done = program("infer/inpaint.py", pictures[1], pictures[2], PROMPT, *model)
    refused(done, "mask 0 is (64, 64) pixels, its picture (100, 80)")


def test_unknown_models_and_devices_are_named(program, model, tmp_path):
    refused(program("infer/text.py", "--model", "nowhere"), "no model 'nowhere'", "scenes")
    refused(program("infer/text.py", "--model", tmp_path), "is no model folder")
    refused(program("infer/text.py", *model, "--device", "abacus"), "--device abacus: no such device")
    refused(program("infer/text.py", *model, "--device", "meta"), "--device meta: wanted cpu or cuda")
    refused(program("infer/text.py", *model, "--device", "cuda:99"), "--device cuda:99")


def test_texts_that_do_not_fit_are_named(program, model, tmp_path, pictures):
    long = "circle " * 90
    refused(program("infer/text_to_image.py", long, *model, "--out", tmp_path / "x"), "has room for")
    assert not (tmp_path / "x").exists()
    refused(program("infer/joint.py", long, *model), "has room for")
    refused(program("infer/answer.py", pictures[0], long, *model), "has room for")
    refused(program("infer/text.py", *model, long + "___"), "do not fit")


def test_wrong_choices_are_named(program, model, tmp_path):
    refused(program("infer/score.py", *model, "--kinds", "one,many"), "unknown kinds of scene ['many']")
    refused(program("infer/score.py", *model, "--split", "test"), "--split test", "held_out")
    refused(program("infer/score.py", *model, "--law", "1,2"), "--law 1,2: wanted four weights")
    refused(program("infer/score.py", *model, "--num", 1, "--tasks", "dance"), "unknown tasks ['dance']")
    refused(program("infer/score.py", *model, "--unseen", -1), "--unseen -1")
    refused(program("infer/demo.py", *model, "--kinds", "", "--out", tmp_path), "unknown kinds")
    refused(program("infer/curves.py", *model, "--kinds", "five", "--out", tmp_path), "unknown kinds")
    refused(program("infer/curves.py", *model, "--forwards", "99", "--out", tmp_path), "from 2 to 64")
    (tmp_path / "file").write_text("")
    refused(program("infer/text_to_image.py", "a", *model, "--quiet", "--out", tmp_path / "file"), "file")


@pytest.mark.parametrize("arguments", [("--steps", "0"), ("--num", "none"), ("--stepz", "3")])
def test_options_that_are_none_are_refused_before_anything_is_loaded(program, arguments):
    done = program("infer/joint.py", "--model", "nowhere", *arguments)
    assert done.status == 2
    assert arguments[0] in done.err.splitlines()[-1]
    assert "nowhere" not in done.err


# in a process of their own


def test_help_is_there_for_all_and_loads_nothing_heavy():
    paths = [*PROGRAMS, "train/encode_images.py", "train/run.py", "train/train_tokenizer.py"]
    done = shell("-c", HELP, *paths)
    assert done.returncode == 0, done.stderr
    told, heavy = json.loads(done.stdout)
    assert heavy == []
    assert list(told) == paths
    for path, (status, text) in told.items():
        assert status == 0, path
        assert f"python {path}" in text or path == "infer/demo.py", f"{path} says nowhere how it is called"
        assert "usage" in text


def test_a_program_runs_from_any_folder(tiny_folder, tmp_path):
    done = shell(
        ROOT / "infer" / "text_to_image.py", PROMPT, "--model", tiny_folder, "--quiet", folder=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"out/text_to_image/sample-000.png\t{PROMPT}\n"
    saved = tmp_path / "out/text_to_image/sample-000.png"
    assert read_record(saved).model == Pipeline.from_pretrained(tiny_folder).fingerprint


def test_a_program_refuses_in_a_line_of_its_own_process(tmp_path):
    done = shell("infer/caption.py", tmp_path / "missing.png")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"caption.py: {tmp_path / 'missing.png'}: no such file\n"

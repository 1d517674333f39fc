"""Configurations survive JSON unchanged, and every mistake in one is named with its place."""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from mmdlm.io import describe, from_json, parse_arguments, signature, to_json


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclass(frozen=True)
class Linear:
    pass


@dataclass(frozen=True)
class Times:
    parts: tuple[tuple[float, Linear], ...]
    ids: slice = field(default_factory=lambda: slice(0, 4))


@dataclass(frozen=True, kw_only=True)
class Run:
    lr: float
    times: Times = Times(((0.5, Linear()),))
    colour: Colour = Colour.RED
    names: Mapping[str, int | None] = field(default_factory=dict)
    derived: int = field(init=False, default=3)

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")


CLASSES = {"Linear": Linear, "Times": Times, "Run": Run, "Shade": Colour}
RUN = Run(
    lr=math.inf, times=Times(((0.25, Linear()), (0.75, Linear())), slice(2, 9, 3)), names={"a": 1, "b": None}
)


def test_a_configuration_survives_json():
    for value in (
        RUN,
        Run(lr=1e-3, colour=Colour.BLUE),
        (1, (2.5, ("x", None, True))),
        {"a": {}},
        slice(None, 3),
    ):
        text = json.dumps(to_json(value, CLASSES), allow_nan=False)
        assert from_json(json.loads(text), CLASSES) == value
    assert math.isnan(from_json(to_json(math.nan, {}), {}))


def test_what_is_written_is_legible():
    assert to_json(Run(lr=1.0), CLASSES) == {
        "class": "Run",
        "lr": 1.0,
        "times": {
            "class": "Times",
            "parts": [[0.5, {"class": "Linear"}]],
            "ids": {"class": "slice", "start": 0, "stop": 4, "step": None},
        },
        "colour": {"class": "Shade", "name": "RED"},
        "names": {},
    }


def test_absent_keys_take_their_defaults():
    assert from_json({"class": "Run", "lr": 2.0}, CLASSES) == Run(lr=2.0)


TIMES = {"class": "Times", "parts": [[1.0, {"class": "Linear"}]]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"class": "Run", "lr": 1.0, "lrr": 2}, r"Run\): unknown key 'lrr'; allowed are lr, times, col"),
        ({"class": "Run"}, r"config \(Run\): key 'lr' is missing"),
        ({"class": "Run", "lr": -1.0}, r"config \(Run\): lr must be above 0, got -1.0"),
        ({"class": "Run", "lr": "big"}, r"config \(Run\): '<=' not supported"),
        ({"class": "os.system"}, "config: unknown class 'os.system'; known are Linear, Times, Run, Shade"),
        ({"class": ["Run"]}, "config: unknown class"),
        ({"class": "Run", "lr": 1.0, "times": {**TIMES, "parts": [[1.0, {"class": "Cosine"}]]}},
         r"config\.times\.parts\[0\]\[1\]: unknown class 'Cosine'"),
        ({"class": "Run", "lr": 1.0, "colour": {"class": "Shade", "name": "PINK"}},
         r"config\.colour: Colour has RED"),
        ({"class": "Shade", "value": 1}, "unknown key 'value'; allowed are name"),
        ({"class": "slice", "start": 0}, "config: key 'stop' is missing"),
        ({"class": "float", "value": "1.0"}, "wanted 'inf'"),
        ({"a": [{1, 2}]}, r"config\.a\[0\]: wanted a JSON value, got a set"),
    ],
)  # fmt: skip
def test_mistakes_are_named_with_their_place(data, message):
    with pytest.raises(ValueError, match=message):
        from_json(data, CLASSES)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [1]}, r"here\.a: a list cannot be written"),
        ({1: 2}, "here: a mapping's keys are strings"),
        ({"class": 2}, "here: a mapping's keys are strings other than 'class'"),
        ((Linear, 1), r"here\[0\]: a type cannot"),
        (Path("x"), "here: a PosixPath|WindowsPath cannot"),
    ],
)
def test_what_would_not_survive_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        to_json(value, CLASSES, place="here")


def test_a_class_outside_the_table_is_refused():
    with pytest.raises(ValueError, match=r"config\.times\.parts\[0\]\[1\]: class Linear is not in the table"):
        to_json(RUN, {"Run": Run, "Times": Times})


def test_anything_can_be_described():
    @dataclass(frozen=True)
    class Odd:
        hook: Callable[..., Any]
        path: Path
        items: list[Any]
        other: object
        colour: Colour = Colour.BLUE
        ids: slice = field(default_factory=lambda: slice(1, 2))
        rate: float = math.inf

    told = describe(Odd(json.dumps, Path("a") / "b", [1, {2: "x"}], object()))
    assert json.loads(json.dumps(told, allow_nan=False)) == {
        "class": "Odd",
        "hook": "json.dumps",
        "path": str(Path("a") / "b"),
        "items": [1, {"2": "x"}],
        "other": {"class": "object"},
        "colour": "BLUE",
        "ids": {"class": "slice", "start": 1, "stop": 2},
        "rate": "inf",
    }


def recipe(
    *,
    data: Path,
    size: Literal["small", "base"] = "small",
    lr: float = 3e-4,
    steps: int = 100,
    ema: bool = True,
    name: str | None = None,
    limit: int | None = None,
    sides: tuple[int, ...] = (1,),
    range: tuple[float, float] = (0.0, 1.0),
    colour: Colour = Colour.RED,
    bare=None,
    hook: Callable[[], None] | None = None,
) -> None:
    raise AssertionError("parsing does not call")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("size=base", "base"),
        ("lr=2e-4", 2e-4),
        ("lr=1", 1.0),
        ("steps=20", 20),
        ("steps=1e6", 1_000_000),
        ("steps=10_000", 10_000),
        ("ema=false", False),
        ("ema=True", True),
        ("name=none", None),
        ("name=a=b", "a=b"),
        ("name=", ""),
        ("limit=none", None),
        ("limit=3", 3),
        ("sides=8,16", (8, 16)),
        ("sides=(8, 16)", (8, 16)),
        ("sides=8,", (8,)),
        ("sides=()", ()),
        ("range=0.5,1", (0.5, 1.0)),
        ("colour=BLUE", Colour.BLUE),
    ],
)
def test_arguments_are_read_by_annotation(argument, value):
    found = parse_arguments(recipe, ["data=x/y", argument])
    assert found == {"data": Path("x/y"), argument.partition("=")[0]: value}
    assert type(found[argument.partition("=")[0]]) is type(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data=x", "lrr=1"], r"unknown argument 'lrr' \(did you mean 'lr'\?\)"),
        (["data=x", "qqqqq=1"], "unknown argument 'qqqqq'\n"),
        (["data=x", "lr"], "arguments look like key=value, got 'lr'"),
        (["data=x", "lr=1", "lr=2"], "'lr' is given twice"),
        (["lr=1"], "data must be given"),
        (["data=x", "lr=fast"], "lr=fast: could not convert"),
        (["data=x", "steps=1.5"], "steps=1.5: wanted a whole number"),
        (["data=x", "steps=inf"], "steps=inf: wanted a whole number"),
        (["data=x", "ema=1"], "ema=1: wanted true or false"),
        (["data=x", "size=huge"], "wanted one of small, base"),
        (["data=x", "range=1"], "wanted 2 values between commas, got 1"),
        (["data=x", "sides=1,x"], "sides=1,x: "),
        (["data=x", "colour=red"], "wanted one of RED, BLUE"),
        (["data=x", "hook=f"], "cannot be given on a command line"),
    ],
)
def test_wrong_arguments_show_the_signature(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_arguments(recipe, arguments)
    assert "recipe takes:" in str(caught.value)
    assert "  lr: float = 0.0003" in str(caught.value)
    assert "  data: Path\n" in str(caught.value)


def test_a_parameter_without_annotation_is_said_to_be_so():
    with pytest.raises(ValueError, match="'bare' of recipe has no annotation"):
        parse_arguments(recipe, ["data=x", "bare=1"])


def test_the_signature_is_legible():
    lines = signature(recipe).splitlines()
    assert lines[1:4] == [
        "  data: Path",
        "  size: Literal['small', 'base'] = 'small'",
        "  lr: float = 0.0003",
    ]
    assert "  bare = None" in lines

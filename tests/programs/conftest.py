"""Programs run inside this process, as a shell would: arguments in, exit status, output and errors out."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


class Done(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()


Program = Callable[..., Done]


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Program:
    """Runs `infer/caption.py` and the like with some arguments."""

    def run(name: str, *arguments: object) -> Done:
        path = str(ROOT / name)
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        capsys.readouterr()
        status: object = 0
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        assert status is None or isinstance(status, int), status
        return Done(status or 0, out, err)

    return run


@pytest.fixture(scope="session")
def imagefolder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve small pictures with one or two texts each, and one file that is no picture."""
    import json

    folder = tmp_path_factory.mktemp("data") / "pairs"
    folder.mkdir()
    rows = []
    for number, colour in enumerate(("red", "lime", "blue", "white") * 3):
        picture = Image.new("RGB", (20, 16), colour)
        picture.paste("black", (number, 0, number + 4, 8))
        picture.save(folder / f"{number}.png")
        texts = f"{colour} with a bar" if number % 2 else [f"{colour} with a bar", f"bar on {colour}"]
        rows.append({"file_name": f"{number}.png", "text": texts})
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnot one")
    rows.insert(3, {"file_name": "broken.png", "text": "nothing"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return folder

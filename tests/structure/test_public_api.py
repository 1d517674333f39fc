"""The public names and signatures are those of public_api.txt; a change shows in the diff and is meant."""

from __future__ import annotations

import difflib

import pytest
from house import read_house
from write_public_api import FILE, public_api

COMMAND = "python tests/structure/write_public_api.py"


def test_the_public_api_is_the_one_written_down():
    was, now = FILE.read_text("utf-8").splitlines(), public_api(read_house()).splitlines()
    change = "\n".join(difflib.unified_diff(was, now, "written down", "in the source", lineterm="", n=1))
    assert not change, f"if this is meant, run `{COMMAND}` and say so in CHANGELOG.md:\n{change}"


SOURCE = {
    "mmdlm/__init__.py": "__version__ = '0.1.0'\n__all__ = ['Pipeline', '__version__']",
    "mmdlm/io/__init__.py": (
        "from mmdlm.io import config\nfrom mmdlm.io.config import SIZES, LOW, HIGH, Reader, read\n"
        "__all__ = ['HIGH', 'LOW', 'SIZES', 'Reader', 'config', 'read']"
    ),
    "mmdlm/io/config.py": (
        "SIZES: dict[str, int] = {'small': 1}\nLOW, HIGH = 0, 1\n"
        "def read(path: str, *, strict: bool = True) -> dict: ...\ndef _hidden(): ...\n"
        "@dataclass(frozen=True)\nclass Reader(Protocol):\n    depth: int = 3\n    _cache: int = 0\n"
        "    @property\n    def size(self) -> int: ...\n    def _private(self): ...\n"
        "    @overload\n    def get(self, a: int) -> int: ...\n"
        "    @overload\n    def get(self, a: str) -> str: ...\n"
        "    def get(self, a): ...\n"
    ),
}
WANTED = """\
mmdlm
    Pipeline, of mmdlm.pipeline, which is not there
    __version__ = '0.1.0'

mmdlm.io
    HIGH = 1
    LOW = 0
    SIZES = {'small': 1}
    @dataclass(frozen=True) class Reader(Protocol)
        depth: int = 3
        @property def size(self) -> int
        @overload def get(self, a: int) -> int
        @overload def get(self, a: str) -> str
        def get(self, a)
    module config
    def read(path: str, *, strict: bool=True) -> dict
"""


@pytest.fixture
def tree(tmp_path):
    for name, text in SOURCE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_names_are_described_where_they_are_made(tree):
    assert public_api(read_house(tree)) == WANTED


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("strict: bool = True", "strict: bool = False"),
        ("path: str,", "file: str,"),
        ("depth: int = 3", "depth: int = 4"),
        ("def size(self)", "def length(self)"),
        ("frozen=True", "frozen=False"),
        ("class Reader(Protocol)", "class Reader(ABC)"),
        ("LOW, HIGH = 0, 1", "LOW, HIGH = 0, 2"),
        ("-> dict", "-> list"),
    ],
)
def test_a_change_of_a_signature_shows(tree, old, new):
    path = tree / "mmdlm/io/config.py"
    path.write_text(path.read_text().replace(old, new))
    assert public_api(read_house(tree)) != WANTED


def test_a_name_that_nothing_makes_is_refused(tree):
    path = tree / "mmdlm/io/__init__.py"
    path.write_text(path.read_text().replace("'read'", "'reed'"))
    with pytest.raises(LookupError, match="reed"):
        public_api(read_house(tree))

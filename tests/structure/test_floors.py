"""No import runs upward and none in a circle, lazy ones neither; and the reader that says so can say no."""

from __future__ import annotations

import pytest
from house import OFFERED, circles, floor_faults, kernel_faults, public_names, read_house, room_of


def build(root, files: dict[str, str]):
    """A small tree of source files, read as a house."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read_house(root)


def test_the_house_keeps_its_floors():
    assert floor_faults(read_house()) == []


def test_the_house_has_no_circles():
    assert circles(read_house()) == []


def test_only_one_file_names_the_attention_kernels():
    assert kernel_faults(read_house()) == []


def test_every_file_stands_on_a_floor():
    house = read_house()
    assert len(house) > 5
    assert all(room_of(name) for name in house)


def test_the_table_of_offered_names_is_the_one_stated_here():
    import mmdlm

    assert mmdlm._OFFERED == OFFERED
    assert set(OFFERED) | {"__version__"} == set(public_names(read_house()["mmdlm"]) or [])


UPWARD = [
    ("mmdlm/canvas/canvas.py", "import mmdlm.data.sources"),
    ("mmdlm/canvas/canvas.py", "from mmdlm.model import Transformer"),
    ("mmdlm/canvas/canvas.py", "from mmdlm import model"),
    ("mmdlm/canvas/canvas.py", "from ..model import Transformer"),
    ("mmdlm/canvas/__init__.py", "from ..model import Transformer"),
    ("mmdlm/model/cache.py", "def f():\n    from mmdlm.sampling.loop import denoise"),
    ("mmdlm/model/cache.py", "class A:\n    def f(self):\n        import mmdlm.training as t"),
    ("mmdlm/model/cache.py", "if TYPE_CHECKING:\n    from mmdlm.diffusion import Linear"),
    ("mmdlm/data/loader.py", "from mmdlm.model import Transformer"),
    ("mmdlm/diffusion/loss.py", "from mmdlm.model import Transformer"),
    ("mmdlm/diffusion/loss.py", "from tokenizers_mm import Vocab"),
    ("mmdlm/training/trainer.py", "from mmdlm.sampling import denoise"),
    ("mmdlm/sampling/loop.py", "from mmdlm.training import Run"),
    ("mmdlm/sampling/loop.py", "from mmdlm import Pipeline"),
    ("mmdlm/sampling/loop.py", "import importlib\nimportlib.import_module('mmdlm.pipeline')"),
    ("mmdlm/sampling/loop.py", "from importlib import import_module\nname = 'x'\nimport_module(name)"),
    ("mmdlm/io/folder.py", "from mmdlm.canvas import Canvas"),
    ("mmdlm/io/folder.py", "from tokenizers_mm import Vocab"),
    ("mmdlm/pipeline.py", "import train.run"),
    ("mmdlm/cli.py", "import infer.caption"),
    ("mmdlm/output.py", "from mmdlm.cli import main"),
    ("mmdlm/__init__.py", "from mmdlm.canvas import Canvas"),
    ("tokenizers_mm/text.py", "from mmdlm import __version__"),
    ("tokenizers_mm/text.py", "import mmdlm.io"),
    ("train/run.py", "from infer import caption"),
]


@pytest.mark.parametrize(("name", "text"), UPWARD)
def test_an_import_upward_or_sideways_is_seen(tmp_path, name, text):
    assert floor_faults(build(tmp_path, {name: text}))


DOWNWARD = [
    ("mmdlm/canvas/layout.py", "from tokenizers_mm import Vocab\nfrom mmdlm.canvas.canvas import Canvas"),
    ("mmdlm/sampling/loop.py", "from mmdlm.diffusion import Cosine\nfrom mmdlm.canvas import Canvas"),
    ("mmdlm/pipeline.py", "from mmdlm import __version__\nfrom mmdlm.interop import llada"),
    ("mmdlm/pipeline.py", "from mmdlm.output import Record"),
    ("mmdlm/__init__.py", "def f():\n    from mmdlm.pipeline import Pipeline\nimport_module(table[name])"),
    ("train/run.py", "from mmdlm.training import Trainer\nfrom mmdlm import Pipeline"),
]


@pytest.mark.parametrize(("name", "text"), DOWNWARD)
def test_an_import_downward_is_let_pass(tmp_path, name, text):
    assert floor_faults(build(tmp_path, {name: text})) == []


def test_a_room_without_a_floor_is_refused(tmp_path):
    with pytest.raises(LookupError, match=r"mmdlm\.utils"):
        floor_faults(build(tmp_path, {"mmdlm/utils/strings.py": ""}))


def test_circles_are_found_at_file_level_and_through_lazy_imports(tmp_path):
    files = {
        "mmdlm/canvas/__init__.py": "from mmdlm.canvas.a import A",
        "mmdlm/canvas/a.py": "def f():\n    from mmdlm.canvas import b",
        "mmdlm/canvas/b.py": "from mmdlm.canvas.c import C",
        "mmdlm/canvas/c.py": "from .a import A",
        "mmdlm/canvas/d.py": "from mmdlm.canvas.a import A",
    }
    assert circles(build(tmp_path, files)) == [["mmdlm.canvas.a", "mmdlm.canvas.b", "mmdlm.canvas.c"]]


def test_a_file_that_imports_its_own_room_is_a_circle(tmp_path):
    files = {
        "mmdlm/io/__init__.py": "from mmdlm.io.folder import load",
        "mmdlm/io/folder.py": "from mmdlm.io import load",
    }
    assert circles(build(tmp_path, files)) == [["mmdlm.io", "mmdlm.io.folder"]]


def test_a_room_whose_init_gathers_its_files_is_no_circle(tmp_path):
    files = {
        "mmdlm/io/__init__.py": "from mmdlm.io.folder import load",
        "mmdlm/io/folder.py": "from mmdlm.io.config import read",
        "mmdlm/io/config.py": "import json",
    }
    assert circles(build(tmp_path, files)) == []


def test_the_offered_name_is_the_one_edge_that_makes_no_circle(tmp_path):
    files = {
        "mmdlm/__init__.py": "from mmdlm.pipeline import Pipeline",
        "mmdlm/pipeline.py": "from mmdlm import __version__\nfrom mmdlm.output import Record",
        "mmdlm/output.py": "def f():\n    from mmdlm import Pipeline",
    }
    assert circles(build(tmp_path, files)) == [["mmdlm.output", "mmdlm.pipeline"]]


@pytest.mark.parametrize(
    "text",
    [
        "import xformers.ops as xops",
        "from xformers import ops",
        "def f():\n    from torch.nn.attention.flex_attention import create_block_mask",
        "from torch.nn.attention import flex_attention",
        "import torch.nn.functional as F\nF.scaled_dot_product_attention(q, k, v)",
        "import importlib\nimportlib.import_module('xformers.ops')",
    ],
)
def test_a_kernel_named_elsewhere_is_seen(tmp_path, text):
    assert kernel_faults(build(tmp_path, {"mmdlm/model/layers.py": text}))
    assert kernel_faults(build(tmp_path / "other", {"mmdlm/model/attention.py": text})) == []

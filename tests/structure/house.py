"""The house as its source shows it: imports, floors, circles, public names. Runs none of it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mmdlm", "tokenizers_mm")
PROGRAMS = ("train", "infer")

# What a file belongs to, by the longest prefix of its dotted name, and the floor it stands on.
FLOORS = {
    "tokenizers_mm": 1,
    "mmdlm.io": 1,
    "mmdlm.canvas": 2,
    "mmdlm.data": 3,
    "mmdlm.model": 3,
    "mmdlm.diffusion": 3,
    "mmdlm.training": 4,
    "mmdlm.sampling": 4,
    "mmdlm.interop": 5,
    "mmdlm.codec": 6,
    "mmdlm.contests": 6,
    "mmdlm.contests_training": 6,
    "mmdlm.jobs": 6,
    "mmdlm.likelihood": 6,
    "mmdlm.pipeline": 6,
    "mmdlm.lessons": 6,
    "mmdlm.pairs": 6,
    "mmdlm.rows": 6,
    "mmdlm.naive": 6,
    "mmdlm.ngrams": 6,
    "mmdlm.predictability": 6,
    "mmdlm.card": 6,
    "mmdlm.evaluate": 6,
    "mmdlm.exam": 6,
    "mmdlm.law": 6,
    "mmdlm.figures": 6,
    "mmdlm.output": 6,
    "mmdlm.pretrained": 6,
    "mmdlm.program": 6,
    "mmdlm.report": 6,
    "mmdlm.sweep": 6,
    "mmdlm.texts": 6,
    "mmdlm.tokenizer_report": 6,
    "mmdlm.training_report": 6,
    "mmdlm.cli": 7,
    "train": 7,
    "infer": 7,
    "mmdlm": 0,  # mmdlm/__init__.py: the version, and the table of offered names
}
# The files of this floor lie directly in mmdlm/: together one room, each public where it states `__all__`.
PIPELINE_FLOOR = 6
# The floors allow these, the theory does not.
STRANGERS = {("mmdlm.diffusion", "tokenizers_mm"): "the mathematics knows no tokenizer"}
# `mmdlm/__init__.py` offers these names through its literal table; the one import that may run upward.
OFFERED = {"Pipeline": "mmdlm.pipeline"}
# The kernels of attention, and the only file that names them.
KERNELS = {"xformers", "flex_attention", "memory_efficient_attention", "scaled_dot_product_attention"}
KERNEL_FILE = "mmdlm.model.attention"


@dataclass(frozen=True)
class Import:
    """One import statement, or a call of `import_module` or `__import__`, wherever in the file it stands."""

    importer: str  # dotted name of the file's module
    line: int
    module: str  # absolute dotted name; "" where a dynamic import names no literal
    name: str | None = None  # of `from module import name`


@dataclass(frozen=True)
class Module:
    """One source file."""

    name: str  # dotted; a package's __init__.py bears the package's name
    path: Path
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    def imports(self) -> list[Import]:
        """All imports: top level, inside functions, under TYPE_CHECKING, and by `import_module`."""
        return list(_read_imports(self))


def read_module(path: Path, name: str) -> Module:
    """The file at `path` under the dotted `name`."""
    return Module(name, path, ast.parse(path.read_text("utf-8"), str(path)))


def read_house(root: Path = ROOT) -> dict[str, Module]:
    """Every Python file of the packages and programs below `root`, by dotted name."""
    house = {}
    for folder in (*PACKAGES, *PROGRAMS):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            house[name] = read_module(path, name)
    return house


def room_of(name: str) -> str | None:
    """The room (a key of FLOORS) that the dotted `name` belongs to; None outside the house.

    What lies under `mmdlm` and in no room stated above has no floor: a LookupError.
    """
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        room = ".".join(parts[:length])
        if room in FLOORS:
            if room == "mmdlm" and name != "mmdlm":
                raise LookupError(f"{name} belongs to no floor; state its room in FLOORS")
            return room
    return None


def targets(found: Import, house: dict[str, Module]) -> list[str]:
    """The house's modules that `found` loads, besides parents of what it names; none if it is foreign."""
    if found.module.split(".")[0] not in (*PACKAGES, *PROGRAMS):
        return []
    if found.name is None:
        return [found.module]
    if found.module == "mmdlm" and found.name in OFFERED:
        return [OFFERED[found.name]]
    submodule = f"{found.module}.{found.name}"
    return [submodule if submodule in house or submodule in FLOORS else found.module]


def floor_faults(house: dict[str, Module]) -> list[str]:
    """What breaks the order of the floors, one line each."""
    faults = []
    for module in house.values():
        here = room_of(module.name)
        assert here is not None
        for found in module.imports():
            where = f"{module.name}:{found.line}"
            if found.module == "" and module.name != "mmdlm":
                faults.append(f"{where}: a dynamic import whose target cannot be read")
            for target in targets(found, house):
                there = room_of(target)
                if there is None or there == here or _is_offer(module.name, target):
                    continue
                low, high = FLOORS[here], FLOORS[there]
                if low <= high and not low == high == PIPELINE_FLOOR:
                    faults.append(f"{where}: {here} on floor {low} imports {target} of floor {high}")
                if (here, there) in STRANGERS:
                    faults.append(f"{where}: {here} imports {target}: {STRANGERS[here, there]}")
                if here == "tokenizers_mm":
                    faults.append(f"{where}: tokenizers_mm imports {target}; it is useful alone")
    return faults


def kernel_faults(house: dict[str, Module]) -> list[str]:
    """Files other than the one for it that name an attention kernel."""
    faults = []
    for module in house.values():
        if module.name == KERNEL_FILE or module.name.split(".")[0] != "mmdlm":
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Name):
                named = [node.id]
            elif isinstance(node, ast.Attribute):
                named = [node.attr]
            elif isinstance(node, ast.alias):
                named = node.name.split(".")
            elif isinstance(node, ast.ImportFrom):
                named = (node.module or "").split(".")
            else:
                continue
            faults += [f"{module.name}:{node.lineno}: names {name}" for name in named if name in KERNELS]
        faults += [
            f"{module.name}:{found.line}: imports {found.module}"
            for found in module.imports()
            if found.name is None and KERNELS & set(found.module.split("."))
        ]
    return sorted(set(faults))


def circles(house: dict[str, Module]) -> list[list[str]]:
    """The groups of files that import one another in a circle, lazy imports counted."""
    graph = {
        name: {
            target
            for found in module.imports()
            for target in targets(found, house)
            if target in house and target != name and not _is_offer(name, target)
        }
        for name, module in house.items()
    }
    reached = {name: _reach(graph, name) for name in graph}
    found = {
        frozenset({name, *(other for other in reached[name] if name in reached[other])})
        for name in graph
        if name in reached[name]
    }
    return sorted(sorted(circle) for circle in found)


def public_names(module: Module) -> list[str] | None:
    """The literal `__all__` of a package, or of a file of the pipeline's floor; None where it states none."""
    if not module.is_package and FLOORS.get(module.name) != PIPELINE_FLOOR:
        return None
    for node in module.tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
        ):
            return list(ast.literal_eval(node.value))
    return None


def _is_offer(importer: str, target: str) -> bool:
    """The one stated exception: the package's own __init__ hands on what lies above it, when it is asked."""
    return importer == "mmdlm" and target in OFFERED.values()


def _reach(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    ahead = list(graph[start])
    while ahead:
        name = ahead.pop()
        if name not in seen:
            seen.add(name)
            ahead += graph[name]
    return seen


def _read_imports(module: Module) -> Iterator[Import]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(module.name, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.name.split(".")
                kept = parts[: len(parts) - node.level + (1 if module.is_package else 0)]
                base = ".".join([*kept, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(module.name, node.lineno, base, alias.name)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            literals = [value for value in _first_argument(node) if isinstance(value, str)]
            yield Import(module.name, node.lineno, literals[0] if literals else "")


def _called(node: ast.Call) -> str:
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def _first_argument(node: ast.Call) -> Iterable[object]:
    return [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]

"""Writes public_api.txt, the public names and signatures, from the source; runs none of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from house import OFFERED, PACKAGES, ROOT, Module, public_names, read_house

FILE = Path(__file__).with_name("public_api.txt")
MAX_VALUE = 60  # characters of a constant's value that are shown


def public_api(house: dict[str, Module]) -> str:
    """One block per room that states `__all__`: each name, and what a caller sees of it."""
    blocks = []
    for name, module in sorted(house.items()):
        if name.split(".")[0] in PACKAGES:
            names = public_names(module) or []
            lines = [line for public in names for line in _describe(public, module, house)]
            if lines:
                blocks.append("\n".join([name, *("    " + line for line in lines)]))
    return "\n\n".join(blocks) + "\n"


def _describe(name: str, module: Module, house: dict[str, Module]) -> list[str]:
    """What `name` is in `module`, followed through the imports to where it is made."""
    for node in module.tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            return list(_functions(name, module.tree.body))
        if isinstance(node, ast.ClassDef) and node.name == name:
            return list(_class(node))
        if isinstance(node, ast.Assign | ast.AnnAssign):
            line = _constant(name, node)
            if line is not None:
                return [line]
    for found in module.imports():
        if found.name == name and f"{found.module}.{name}" in house:
            return [f"module {name}"]
        if found.name == name and found.module in house and found.module != module.name:
            return _describe(name, house[found.module], house)
    if module.name == "mmdlm" and name in OFFERED:
        return [f"{name}, of {OFFERED[name]}, which is not there"]
    raise LookupError(f"{module.name} offers {name!r} and nothing in the house makes it")


def _functions(name: str, body: list[ast.stmt]) -> Iterator[str]:
    """The signature of a function or method; of an overloaded one, all of them."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
            marks = [ast.unparse(mark) for mark in node.decorator_list]
            kind = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
            returns = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
            head = "".join(f"@{mark} " for mark in marks)
            yield f"{head}{kind} {name}({ast.unparse(node.args)}){returns}"


def _class(node: ast.ClassDef) -> Iterator[str]:
    """The class with its bases and decorators, its public fields, the signatures of its public methods."""
    head = "".join(f"@{ast.unparse(mark)} " for mark in node.decorator_list)
    bases = [ast.unparse(base) for base in [*node.bases, *node.keywords]]
    yield f"{head}class {node.name}" + (f"({', '.join(bases)})" if bases else "")
    seen = set()
    for member in node.body:
        if isinstance(member, ast.AnnAssign) and _is_public(ast.unparse(member.target)):
            yield f"    {ast.unparse(member)}"
        elif isinstance(member, ast.Assign):
            yield from (f"    {name}" for name in map(ast.unparse, member.targets) if _is_public(name))
        elif not isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) or member.name in seen:
            continue
        elif _is_public(member.name):
            seen.add(member.name)
            yield from (f"    {line}" for line in _functions(member.name, node.body))


def _constant(name: str, node: ast.Assign | ast.AnnAssign) -> str | None:
    """The line of a constant, if this assignment makes it; `A, B = 1, 2` makes two."""
    if isinstance(node, ast.AnnAssign):
        pairs = [(node.target, node.value)]
    else:
        pairs = [(target, node.value) for target in node.targets]
        for target, value in list(pairs):
            if isinstance(target, ast.Tuple):
                values = value.elts if isinstance(value, ast.Tuple) else [None] * len(target.elts)
                pairs += list(zip(target.elts, values, strict=True))
    for target, value in pairs:
        if isinstance(target, ast.Name) and target.id == name:
            text = "" if value is None else ast.unparse(value)
            return f"{name} = {text}" if 0 < len(text) <= MAX_VALUE else name
    return None


def _is_public(name: str) -> bool:
    return not name.startswith("_") or name in ("__init__", "__call__", "__iter__", "__len__", "__getitem__")


if __name__ == "__main__":
    FILE.write_text(public_api(read_house(ROOT)), "utf-8")
    print(f"wrote {FILE.relative_to(ROOT)}")

"""The layer order of the package (DESIGN of imports: commands at the top, the compiled module at the bottom).

Imports are read from the source, including those inside functions: lazy imports must not point upward either.
"""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "diffratio_fast"

LAYERS = (
    ("divergences",),
    ("ops", "storage", "errors"),
    ("launch", "command", "progress"),
    ("devices",),
    ("config",),
    ("data", "networks"),
    ("objectives",),
    ("runs",),
    ("report",),
    ("verifier",),
    ("sampling",),
    ("metrics",),
    ("training.processes",),
    ("training.state",),
    ("training.step",),
    ("training",),
    ("train", "pretrain", "sample", "evaluate", "refit", "average", "prepare", "convert", "export"),
    ("completion", "__main__"),
)
"""Layers from bottom to top. A part of the package imports only from lower layers and from itself."""
FOUNDATION = {"errors"}
"""Modules that every part may import, including those of the same layer."""
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}


def modules() -> dict[str, Path]:
    """Dotted name to module of the package; a package has its own name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path, *, lazy: bool = True) -> set[str]:
    """Modules of the package that a file imports; without ``lazy`` only those that its import runs."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if lazy else at_import(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in MODULES else str(node.module))
    return {name for name in found if name in MODULES}


def at_import(tree: ast.AST) -> list[ast.AST]:
    """The nodes outside functions, and outside ``if TYPE_CHECKING``."""
    found: list[ast.AST] = []
    for node in ast.iter_child_nodes(tree):
        checking = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not checking and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found += [node, *at_import(node)]
    return found


def part_of(module: str) -> str:
    """The part of the package that a module belongs to: a key of ``RANK``."""
    inner = module.split(".")[1:]
    return ".".join(inner[:2]) if ".".join(inner[:2]) in RANK else inner[0] if inner else ""


def test_every_module_has_a_layer() -> None:
    assert {part_of(name) for name in MODULES} - {""} == RANK.keys()


def test_imports_point_down() -> None:
    upward = []
    for name, path in MODULES.items():
        own = part_of(name)
        if not own:
            continue
        for target in imports(path):
            part = part_of(target)
            if part and part != own and part not in FOUNDATION and RANK[part] >= RANK[own]:
                upward.append(f"{name} imports {target}")
    assert upward == []


def test_imports_have_no_circle() -> None:
    graph = {name: imports(path, lazy=False) - {name} for name, path in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_private_modules_stay_in_their_package() -> None:
    for name, path in MODULES.items():
        for target in imports(path):
            owner, _, last = target.rpartition(".")
            if last.startswith("_"):
                assert name == owner or name.startswith(owner + "."), f"{name} imports {target}"


def test_a_command_line_is_read_without_torch() -> None:
    code = """
import sys
from diffratio_fast import pretrain, train
train.resolve({"preset": "digits", "config": None, "objective": "vsd", "teacher": "x"})
pretrain.resolve({"preset": "digits", "config": None})
train.parser().format_help()
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

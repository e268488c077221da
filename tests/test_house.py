"""The house: imports go one way, from the course's machinery to the paper's ideas, and never back."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "ivt_utils"
# What a wing may import from, besides itself. "": the paper's own modules, at the root of the package.
MAY = {
    "runtime": set(), "": {"runtime"}, "micro": {"", "runtime"}, "show": {"", "runtime"},
    "paper_scale": {"", "runtime", "micro", "show"},
    "course": {"", "runtime", "micro", "show", "paper_scale", "exercises"},
    "exercises": {""}, "cli": {"", "runtime", "micro", "show", "paper_scale", "course", "exercises"},
}  # fmt: skip
MODULES = sorted(PACKAGE.rglob("*.py"))


def wing(path: Path) -> str:
    """Return the wing of a module's file, relative to the package."""
    return path.parts[0] if len(path.parts) > 1 else "cli" if path.stem == "cli" else ""


def imported(path: Path):
    """Yield the files, relative to the package, of the modules that a file imports from it, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}: imports name the whole path"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            root, *parts = name.split(".")
            file = Path(*parts).with_suffix(".py") if parts else None
            if root == PACKAGE.name and file and (PACKAGE / file).is_file():
                yield file


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    own = wing(path.relative_to(PACKAGE))
    for file in imported(path):
        assert wing(file) in MAY[own] | {own}, f"{path.relative_to(PACKAGE)} imports {file}"


def test_no_module_reaches_itself():
    arrows = {path.relative_to(PACKAGE): {*imported(path)} for path in MODULES}
    done: set[Path] = set()
    while ready := [path for path, needed in arrows.items() if path not in done and needed <= done]:
        done.update(ready)
    assert done == set(arrows), f"in a circle: {sorted(map(str, set(arrows) - done))}"

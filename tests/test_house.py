"""The house: imports go one way, from the course's machinery to the paper's ideas, and CONTRIBUTING.md describes it."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "ivt_utils"
# What a wing may import from, besides itself. "": the paper's own modules, at the root of the package.
MAY = {
    "runtime": set(),
    "": {"runtime"},
    "micro": {"", "runtime"},
    "show": {"", "runtime"},
    "paper_scale": {"", "runtime", "micro", "show"},
    "course": {"", "runtime", "micro", "show", "paper_scale", "exercises"},
    "exercises": {""},
    "cli": {"", "runtime", "micro", "show", "paper_scale", "course", "exercises"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))
PAGE = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")


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


def test_the_tree_names_every_file_and_no_other():
    tree = PAGE.split("```text\nivt_utils/\n")[1].split("```")[0]
    folder, named = "", []
    for indent, name in re.findall(r"^( {2,4})([\w./]+)  +\S", tree, re.M):
        folder = folder if indent == "    " else name if name.endswith("/") else ""
        named += [] if name.endswith("/") else [folder + name]
    there = [path for kind in ("py", "js", "jinja") for path in PACKAGE.rglob(f"*.{kind}") if path.stat().st_size]
    assert sorted(named) == sorted(path.relative_to(PACKAGE).as_posix() for path in there)


def test_the_directions_are_those_that_are_held():
    rows = re.findall(r"^\| (`\w+`|the root) \| (.+) \|$", PAGE, re.M)
    told = {name: {*names.split(", ")} - {"nothing"} for name, names in rows}
    quoted = {name: f"`{name}`" if name else "the root" for name in MAY}
    assert told == {quoted[name]: {quoted[other] for other in others} for name, others in MAY.items()}

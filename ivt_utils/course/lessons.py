"""The notebooks as they are committed: with the cells that are made from elsewhere, and the reference run's outputs.

`ivt build notebooks` writes both. The stages come from `data/reference/`, so nothing is trained: every table and figure
is drawn by the present code from the reference's predictions, on any computer.
"""

import re
import shutil
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell

from ivt_utils import exercises
from ivt_utils.course import guide
from ivt_utils.course.execute import MARK, find_notebooks, made_from, run_course
from ivt_utils.course.setting_up import badges, readme_badges, repository, setup_cell
from ivt_utils.profiles import get_profile
from ivt_utils.runtime import pace
from ivt_utils.runtime.files import ROOT, ArtefactError, checksum, read_json, write_text
from ivt_utils.runtime.store import REFERENCE, Run, find_reference
from ivt_utils.runtime.text import write_between

NOTEBOOKS = ROOT / "notebooks"
SETUP = "setup"
README_OPENS = "01_self_correction_gap"  # what the README's badges open
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def build_notebooks(folder: Path = NOTEBOOKS, scratch: Path = ROOT / "build" / "reference") -> Path:
    """Write the notebooks of `folder` anew, executed over the reference results, and return the folder.

    The badges of the README come with those of the project's own notebooks.
    """
    notebooks = {path: with_made_cells(nbformat.read(path, as_version=4), path.stem) for path in find_notebooks(folder)}
    for path, notebook in notebooks.items():
        write_notebook(path, notebook)
    if folder == NOTEBOOKS:
        write_between(ROOT / "README.md", "badges", readme_badges(README_OPENS, repository()))
    shutil.rmtree(scratch, ignore_errors=True)
    run = seed_run(get_profile("micro"), read_json(REFERENCE / "run.json")["seed"], scratch)
    run_course(run.profile, run.seed, scratch, folder)
    for path in notebooks:
        executed = nbformat.read(scratch / "notebooks" / path.name, as_version=4)
        write_notebook(path, with_outputs(nbformat.read(path, as_version=4), executed, stamp(path)))
    return folder


def seed_run(profile, seed: int, root: Path) -> Run:
    """Return a run in `root` in which every stage of the reference is finished; one that is so already stays as it is.

    An ArtefactError, before anything is written, when profile, seed or values are not the reference's, or the folder
    holds another run.
    """
    recipe = read_json(find_reference("run.json"))
    if (profile.name, seed) != (recipe["profile"], recipe["seed"]):
        raise ArtefactError(
            f"The reference results are of profile {recipe['profile']} and seed {recipe['seed']}, not of "
            f"{profile.name} and {seed}."
        )
    if other := profile.changed(recipe["values"]):
        raise ArtefactError(f"The reference results were made with another {', '.join(other)}.")
    if (root / "stages.json").exists():
        there, shipped = read_json(root / "stages.json"), read_json(REFERENCE / "stages.json")
        if all(there.get(key, {}).get("sha256") == stage["sha256"] for key, stage in shipped.items()):
            return Run(profile, seed, root)
        raise ArtefactError(f"{root} holds a run already, and nothing in it is overwritten; name another --run-dir.")
    run = Run(profile, seed, root)
    for name in ("rollouts", "tables", "adapters", "seeds"):
        shutil.copytree(REFERENCE / name, root / name, dirs_exist_ok=True)
    shutil.copyfile(REFERENCE / "stages.json", root / "stages.json")
    return run


def stamp(path: Path) -> str:
    """Return the hex SHA-256 over what a committed notebook's outputs rest on: its source, the code, the reference."""
    return made_from(path, {"reference": checksum(REFERENCE / "stages.json")}, [])


def write_notebook(path: Path, notebook) -> None:
    """Write a notebook, whole or not at all, in the form that is committed."""
    write_text(path, nbformat.writes(notebook, version=4) + "\n")


# ------------------------------------------------------------------------------------------------ cells made elsewhere
def with_made_cells(notebook, stem: str):
    """Return the notebook with all that is made from elsewhere: set-up cell, badges, minutes, and its exercises.

    A code cell names its exercise in its metadata; the task above it and the solution below it come with it.
    """
    title, *rest = [cell for cell in notebook.cells if cell.id != SETUP]
    fresh = new_code_cell(id=SETUP, metadata={"tags": [SETUP]})
    setup = next((cell for cell in notebook.cells if cell.id == SETUP), fresh)
    setup.source = setup_cell(repository())
    cells, number = [title, setup], 0
    for cell in rest:
        name = cell.metadata.get("exercise")
        if name and cell.cell_type == "code":
            number += 1
            if cell.source.strip() and exercises.GAP not in cell.source:
                raise ArtefactError(
                    f"{stem}: {name} holds an answer, which would be lost; work in a copy of "
                    "notebooks/, and restore this one with git."
                )
            task, mark = exercises.find(name), {"exercise": name}
            cell.source = exercises.stub_text(task)
            cells += [
                new_markdown_cell(exercises.task_text(task, number), id=f"{name}-task", metadata=mark),
                cell,
                new_markdown_cell(exercises.solution_markdown(task), id=f"{name}-solution", metadata=mark),
            ]
        elif not name:
            cells.append(cell)
    for cell in cells:
        if cell.cell_type == "markdown" and not cell.metadata.get("exercise"):
            cell.source = re.sub("\n{3,}", "\n\n", guide.without_made(cell.source)).strip()
    parts, (ran, read, write) = guide.sections(cells), guide.total(stem, cells)
    title.source += (
        f"\n\n*About {read} minutes to read and {write} for the exercises. "
        f"The cells run for {pace.clock(ran)} on {pace.machine()} (profile micro).*"
        f"\n\n{badges(stem, repository())}"
    )
    for cell, part in zip(filter(pace.heading, cells), parts[1:], strict=True):
        head, *text = cell.source.splitlines()
        text = "\n".join(text).strip()
        whole = part["read"] + part["write"]
        cell.source = f"{head}\n\n*{whole} minute{'s' if whole != 1 else ''}*\n\n{text}".strip()
    return nbformat.from_dict({**notebook, "cells": cells})


# ------------------------------------------------------------------------------------------------ outputs
def with_outputs(notebook, executed, mark: str):
    """Return the notebook with the outputs of its executed form, numbered in order, and the stamp in its metadata."""
    outputs = {cell.id: cell.outputs for cell in executed.cells if cell.cell_type == "code"}
    cells, count = [], 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            count += 1
            numbered = [{**o, "execution_count": count} if "execution_count" in o else o for o in outputs[cell.id]]
            cell = nbformat.from_dict({**cell, "execution_count": count, "outputs": numbered})
        cells.append(cell)
    return nbformat.from_dict({**notebook, "cells": cells, "metadata": {**METADATA, MARK: {"made_from": mark}}})

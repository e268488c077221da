"""The minutes of the course, section by section: measured where cells run, estimated where somebody reads or writes.

A section is what stands under one `##` heading of a notebook. `ivt build guide` keeps the seconds of a finished run in
`data/timings.json` and writes the tables of the instructor's guide.
"""

import json
import platform
import re
from pathlib import Path
from typing import Any

from ivt_utils import exercises
from ivt_utils.runtime import hardware, pace
from ivt_utils.runtime.files import ROOT, ArtefactError, note_files, read_json, write_text
from ivt_utils.runtime.pace import START, clock, heading, measured
from ivt_utils.runtime.text import between, markdown_table, write_between

GUIDE = ROOT / "docs" / "instructor.md"
SHOWS = {  # what the README says of each notebook
    "01_self_correction_gap": "the loop, its fall, and where the fall comes from: the words or the drawn box",
    "02_error_harvesting": "the student's own errors, and trajectories that lead from an error to the truth",
    "03_sft_warmup": "a training that you set up, in two recipes; true and untrue traces; final step and oracle",
    "04_grpo": "learning from an IoU reward: one step by hand, a reward of your own, and the long trainings",
    "05_ablations": "what each choice is worth, in paired differences with intervals",
    "06_mirage": "what is left of the oracle's gain without labels; confidence, controls and a closer look",
}
WORDS_A_MINUTE = 130  # of prose that is new to the reader
LINES_A_MINUTE = 12  # of code
# Lines that are written into a notebook from elsewhere, its minutes among them: nobody's reading.
MADE = re.compile(r"\*About \d+ minutes to read|\*\d+ minutes?\*$|\[!\[Open in Colab|<!-- No badges")
FIGURE_MINUTES = 0.5  # for each picture that a cell shows
ASKED = re.compile(r"### (.+) \(about (\d+) minutes?\)")  # the first line of a task without a gap, such as a prediction
SHARED = ("picture", "claims", "commands", "minutes", "notebooks")  # parts of the README on the book's first page


def sections(cells: list[dict]) -> list[dict]:
    """Return a notebook's sections in order: {"title", "read", "write", "exercises"}, whole minutes by estimate.

    `cells` as in the file of a notebook. `read` counts prose, code and figures, at least a minute; `write` the
    exercises, by their authors' estimates, whose texts, code and folded answers are not counted again. Every other
    number of minutes in the course is a sum of these.
    """
    parts: list[dict[str, Any]] = [{"title": START, "read": 0.0, "write": 0, "exercises": []}]
    asked = None  # the task without a gap that goes on, up to the next prose
    for cell in cells:
        text, name = "".join(cell["source"]), cell["metadata"].get("exercise")
        if title := heading(cell):
            parts.append({"title": title, "read": 0.0, "write": 0, "exercises": []})
        now = parts[-1]
        if cell["cell_type"] == "markdown" and not text.lstrip().startswith("<details>"):
            asked = None if name else ASKED.match(text)
            if asked:
                now["write"] += int(asked[2])
                now["exercises"].append(asked[1])
        if asked:
            continue
        if name:
            if cell["cell_type"] == "code":
                now["write"] += exercises.find(name).minutes
                now["exercises"].append(name)
        elif cell["cell_type"] == "markdown":
            now["read"] += len(without_made(text).split()) / WORDS_A_MINUTE
        elif {"parameters", "injected-parameters", "setup"}.isdisjoint(cell["metadata"].get("tags", [])):
            figures = len(re.findall(r"^show\(", text, re.MULTILINE))
            now["read"] += len(text.splitlines()) / LINES_A_MINUTE + FIGURE_MINUTES * figures
    return [{**part, "read": max(1, round(part["read"]))} for part in parts]


def without_made(text: str) -> str:
    """Return the text of a cell without the lines that are written into it from elsewhere."""
    return "\n".join(line for line in text.splitlines() if not MADE.match(line))


def read_cells(path: Path) -> list[dict]:
    """Return the cells of a notebook file."""
    return read_json(path)["cells"]


def keep_timings(run_dir: Path) -> Path:
    """Write `data/timings.json` from the executed notebooks of a run and from its closer looks, and return it.

    A run that holds nothing but closer looks renews their seconds alone, on the machine of the others.
    """
    timings: dict[str, Any] = pace.timings() if pace.TIMINGS.exists() else {}
    machine = {"processor": hardware.processor(), "cores": hardware.usable_cores(), "python": platform.python_version()}
    if timings.get("machine") != machine:
        timings = {"machine": machine}  # seconds of two machines do not go together
    stages = read_json(run_dir / "stages.json")
    if any("seconds" not in stage for stage in stages.values()):
        raise ArtefactError(
            f"{run_dir} began with the reference results, so its trainings were not timed: take a run of `make course`."
        )
    # A table's seconds hold those of the trainings and answers that it is made of.
    spent = {key: stage["seconds"] for key, stage in stages.items() if not key.startswith("tables/")}
    looks = {key: seconds for key, seconds in spent.items() if "/closer_" in key}  # `ivt closer` makes them
    if seeds := sum(key.startswith("adapters/closer_seed") for key in looks):
        timings["closer"] = round(sum(looks.values()) / seeds, 1)
    notebooks = [run_dir / "notebooks" / f"{stem}.ipynb" for stem in exercises.LESSONS]
    if all(path.is_file() for path in notebooks):
        timings["seconds"] = {path.stem: measured(read_cells(path)) for path in notebooks}
        if sum(sum(parts.values()) for parts in timings["seconds"].values()) < sum(spent.values()) - sum(
            looks.values()
        ):
            raise ArtefactError(
                f"{run_dir} was interrupted and went on later, so its notebooks ran for less than its "
                "stages took: take a run of `make course` in one go."
            )
    elif not (seeds and "seconds" in timings):
        raise ArtefactError(f"{run_dir} does not hold every executed notebook: finish it with `ivt run` first.")
    write_text(pace.TIMINGS, json.dumps(timings, indent=1, ensure_ascii=False) + "\n")
    note_files(pace.TIMINGS.parent, [pace.TIMINGS.name])
    return pace.TIMINGS


def tables(folder: Path = ROOT / "notebooks") -> str:
    """Return the Markdown tables of the guide: one a notebook, and their totals."""
    parts, whole, measured_seconds = [], totals(folder), pace.section_seconds("micro")
    for stem in exercises.LESSONS:
        rows, ran = [], measured_seconds.get(stem, {})
        for part in sections(read_cells(folder / f"{stem}.ipynb")):
            seconds = ran.get(part["title"])
            named = (f"`{name}`" if name.isidentifier() else name for name in part["exercises"])
            names = ", ".join(named) or "-"
            time = "not measured" if seconds is None else clock(seconds)
            rows.append([part["title"], time, part["read"], part["write"] or "-", names])
        head = ["section", "cells run", "read (min)", "exercises (min)", "which"]
        parts.append(f"**{stem}**\n\n{markdown_table(head, rows)}")
    rows_of_all = [[name, clock(ran), read, write] for name, (ran, read, write) in whole.items()]
    head = ["notebook", "cells run", "read (min)", "exercises (min)"]
    about = f"Cells measured on {pace.machine()}; the other minutes are estimates."
    return "\n\n".join([markdown_table(head, rows_of_all), about, *parts]) + "\n"


def total(stem: str, cells: list[dict]) -> tuple[int, int, int]:
    """Return how many seconds a notebook's cells ran, and the minutes to read it and for its exercises."""
    parts, ran = sections(cells), pace.section_seconds("micro").get(stem, {})
    seconds = sum(ran.get(part["title"], 0) for part in parts)
    return seconds, sum(part["read"] for part in parts), sum(part["write"] for part in parts)


def totals(folder: Path = ROOT / "notebooks") -> dict[str, tuple[int, ...]]:
    """Return the `total` of each notebook, and of all of them as "together"."""
    found = {stem: total(stem, read_cells(folder / f"{stem}.ipynb")) for stem in exercises.LESSONS}
    return {**found, "together": tuple(map(sum, zip(*found.values(), strict=True)))}


def notebooks_table(folder: Path = ROOT / "notebooks") -> str:
    """Return the README's table of the notebooks: what each shows, and how long it takes."""
    rows, whole = [], totals(folder)
    for stem in exercises.LESSONS:
        title = "".join(read_cells(folder / f"{stem}.ipynb")[0]["source"]).splitlines()[0].removeprefix("# ")
        rows.append([f"[{title}](notebooks/{stem}.ipynb)", SHOWS[stem], *whole[stem][1:], clock(whole[stem][0])])
    rows.append(["together", "", *whole["together"][1:], clock(whole["together"][0])])
    return markdown_table(["notebook", "what it shows", "read (min)", "exercises (min)", "cells run"], rows) + "\n"


def course_sentence() -> str:
    """Return how long the course runs, and on which machine that was measured, for the README."""
    duration = f"{clock(totals()['together'][0])} on {pace.machine()}"
    return f"The cells of the six notebooks, their trainings among them, run for {duration}.\n"


def write_guide() -> Path:
    """Write the measured minutes into the guide, the README and the book's first page, and return the guide."""
    write_between(GUIDE, "minutes", tables())
    write_between(ROOT / "README.md", "minutes", course_sentence())
    write_between(ROOT / "README.md", "notebooks", notebooks_table())
    write_start_page(ROOT)
    return GUIDE


def write_start_page(root: Path) -> None:
    """Write the README's parts into the book's first page, with links as they go from `docs/`."""
    readme = (root / "README.md").read_text(encoding="utf-8")
    for mark in SHARED:
        part = between(readme, mark).replace("](docs/", "](").replace("](notebooks/", "](../notebooks/")
        write_between(root / "docs" / "index.md", mark, part)

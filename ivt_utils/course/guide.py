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
from ivt_utils.runtime.text import markdown_table, write_between

GUIDE = ROOT / "docs" / "instructor.md"
WORDS_A_MINUTE = 130  # of prose that is new to the reader
LINES_A_MINUTE = 12  # of code
# Lines that are written into a notebook from elsewhere, its minutes among them: nobody's reading.
MADE = re.compile(r"\*About \d+ minutes to read|\*\d+ minutes?\*$|\[!\[Open in Colab|<!-- No badges")
FIGURE_MINUTES = 0.5  # for each picture that a cell shows


def sections(cells: list[dict]) -> list[dict]:
    """Return a notebook's sections in order: {"title", "read", "write", "exercises"}, minutes by estimate.

    `cells` as in the file of a notebook. `read` counts prose, code and figures; `write` the exercises, by
    their authors' estimates, whose texts are not counted again.
    """
    parts: list[dict[str, Any]] = [{"title": START, "read": 0.0, "write": 0.0, "exercises": []}]
    for cell in cells:
        text, name = "".join(cell["source"]), cell["metadata"].get("exercise")
        if title := heading(cell):
            parts.append({"title": title, "read": 0.0, "write": 0.0, "exercises": []})
        now = parts[-1]
        if name:
            if cell["cell_type"] == "code":
                now["write"] += exercises.find(name).minutes
                now["exercises"].append(name)
        elif cell["cell_type"] == "markdown":
            now["read"] += len(without_made(text).split()) / WORDS_A_MINUTE
        elif {"parameters", "injected-parameters", "setup"}.isdisjoint(cell["metadata"].get("tags", [])):
            figures = len(re.findall(r"^show\(", text, re.MULTILINE))
            now["read"] += len(text.splitlines()) / LINES_A_MINUTE + FIGURE_MINUTES * figures
    return parts


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


def minutes(value: float) -> str:
    """Return whole minutes, at least 1, of something that takes any time at all."""
    return str(max(1, round(value))) if value > 0 else "-"


def tables(folder: Path = ROOT / "notebooks") -> str:
    """Return the Markdown tables of the guide: one a notebook, and their totals."""
    timings = pace.timings()
    parts, totals, together = [], [], [0.0, 0.0, 0.0]
    for stem in exercises.LESSONS:
        rows, whole = [], [0.0, 0.0, 0.0]
        ran = timings["seconds"].get(stem, {})
        for part in sections(read_cells(folder / f"{stem}.ipynb")):
            seconds = ran.get(part["title"])
            names = ", ".join(f"`{name}`" for name in part["exercises"]) or "-"
            time = "not measured" if seconds is None else clock(seconds)
            rows.append([part["title"], time, minutes(part["read"]), minutes(part["write"]), names])
            whole = [a + b for a, b in zip(whole, (seconds or 0.0, part["read"], part["write"]), strict=True)]
        head = ["section", "cells run", "read (min)", "exercises (min)", "which"]
        parts.append(f"**{stem}**\n\n{markdown_table(head, rows)}")
        totals.append([stem, clock(whole[0]), minutes(whole[1]), minutes(whole[2])])
        together = [a + b for a, b in zip(together, whole, strict=True)]
    totals.append(["together", clock(together[0]), minutes(together[1]), minutes(together[2])])
    head = ["notebook", "cells run", "read (min)", "exercises (min)"]
    about = f"Cells measured on {pace.machine()}; the other minutes are estimates."
    return "\n\n".join([markdown_table(head, totals), about, *parts]) + "\n"


def course_sentence() -> str:
    """Return how long the course runs, and on which machine that was measured, for the README."""
    whole = sum(sum(parts.values()) for parts in pace.timings()["seconds"].values())
    duration = f"{minutes(whole / 60)} minutes on {pace.machine()}"
    return f"The cells of the six notebooks, their trainings among them, run for {duration}.\n"


def write_guide() -> Path:
    """Write the measured minutes into the instructor's guide and the README, and return the guide."""
    write_between(GUIDE, "minutes", tables())
    write_between(ROOT / "README.md", "minutes", course_sentence())
    return GUIDE

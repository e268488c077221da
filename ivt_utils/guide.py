"""The minutes of the course, section by section: measured where cells run, estimated where somebody reads or writes.

A section is what stands under one `##` heading of a notebook. `ivt build guide` keeps the seconds of a finished run in
`data/timings.json` and writes the tables of the instructor's guide.
"""

import json
import math
import platform
import re
from pathlib import Path

from ivt_utils import exercises
from ivt_utils.artefacts import DATA, ROOT, ArtefactError, read_json, write_text
from ivt_utils.doctor import usable_cores
from ivt_utils.report import markdown_table, write_between

TIMINGS = DATA / "timings.json"
GUIDE = ROOT / "docs" / "instructor.md"
START = "Start"  # what stands before the first heading
WORDS_A_MINUTE = 130  # of prose that is new to the reader
LINES_A_MINUTE = 12  # of code
FIGURE_MINUTES = 0.5  # for each picture that a cell shows


def sections(cells: list[dict]) -> list[dict]:
    """Return a notebook's sections in order: {"title", "read", "write", "exercises"}, minutes by estimate.

    `cells` as in the file of a notebook. `read` counts prose, code and figures; `write` the exercises, by
    their authors' estimates, whose texts are not counted again.
    """
    found = [{"title": START, "read": 0.0, "write": 0.0, "exercises": []}]
    for cell in cells:
        text, name = "".join(cell["source"]), cell["metadata"].get("exercise")
        if title := heading(cell):
            found.append({"title": title, "read": 0.0, "write": 0.0, "exercises": []})
        now = found[-1]
        if name:
            if cell["cell_type"] == "code":
                now["write"] += exercises.find(name).minutes
                now["exercises"].append(name)
        elif cell["cell_type"] == "markdown":
            now["read"] += len(text.split()) / WORDS_A_MINUTE
        elif {"parameters", "injected-parameters", "setup"}.isdisjoint(cell["metadata"].get("tags", [])):
            figures = len(re.findall(r"^show\(", text, re.MULTILINE))
            now["read"] += len(text.splitlines()) / LINES_A_MINUTE + FIGURE_MINUTES * figures
    return found


def heading(cell: dict) -> str | None:
    """Return the title when the cell opens a section, else None."""
    text = "".join(cell["source"])
    return text.splitlines()[0][3:].strip() if cell["cell_type"] == "markdown" and text.startswith("## ") else None


def measured(cells: list[dict]) -> dict[str, float]:
    """Return the seconds that the cells of each section ran, from an executed notebook."""
    seconds, now = {START: 0.0}, START
    for cell in cells:
        now = heading(cell) or now
        seconds.setdefault(now, 0.0)
        seconds[now] += cell["metadata"].get("papermill", {}).get("duration") or 0.0
    return {title: round(value, 1) for title, value in seconds.items()}


def read_cells(path: Path) -> list[dict]:
    """Return the cells of a notebook file."""
    return read_json(path)["cells"]


def keep_timings(run_dir: Path) -> Path:
    """Write `data/timings.json` from the executed notebooks of a run, and return it."""
    found = [run_dir / "notebooks" / f"{stem}.ipynb" for stem in exercises.LESSONS]
    if not all(path.is_file() for path in found):
        raise ArtefactError(f"{run_dir} does not hold every executed notebook: finish it with `ivt run` first.")
    if any("seconds" not in noted for noted in read_json(run_dir / "stages.json").values()):
        raise ArtefactError(f"{run_dir} began with the reference results, so its trainings were not timed: take a run "
                            "of `make course`.")  # fmt: skip
    notebooks = {path.stem: measured(read_cells(path)) for path in found}
    machine = {"processor": processor(), "cores": usable_cores(), "python": platform.python_version()}
    write_text(TIMINGS, json.dumps({"machine": machine, "seconds": notebooks}, indent=1, ensure_ascii=False) + "\n")
    return TIMINGS


def processor() -> str:
    """Return the processor's name as the system gives it."""
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def minutes(value: float) -> str:
    """Return whole minutes, at least 1, of something that takes any time at all."""
    return str(max(1, round(value))) if value > 0 else "-"


def seconds_text(value: float | None) -> str:
    """Return a time as "0:05"; "not measured" for None."""
    if value is None:
        return "not measured"
    whole = math.ceil(value)
    return f"{whole // 60}:{whole % 60:02d}"


def tables(folder: Path = ROOT / "notebooks") -> str:
    """Return the Markdown tables of the guide: one a notebook, and their totals."""
    timings = read_json(TIMINGS)
    parts, totals, together = [], [], [0.0, 0.0, 0.0]
    for stem in exercises.LESSONS:
        rows, whole = [], [0.0, 0.0, 0.0]
        ran = timings["seconds"].get(stem, {})
        for found in sections(read_cells(folder / f"{stem}.ipynb")):
            seconds = ran.get(found["title"])
            names = ", ".join(f"`{name}`" for name in found["exercises"]) or "-"
            rows.append([found["title"], seconds_text(seconds), minutes(found["read"]), minutes(found["write"]), names])
            whole = [a + b for a, b in zip(whole, (seconds or 0.0, found["read"], found["write"]), strict=True)]
        head = ["section", "cells run (min:s)", "read (min)", "exercises (min)", "which"]
        parts.append(f"**{stem}**\n\n{markdown_table(head, rows)}")
        totals.append([stem, seconds_text(whole[0]), minutes(whole[1]), minutes(whole[2])])
        together = [a + b for a, b in zip(together, whole, strict=True)]
    totals.append(["together", seconds_text(together[0]), minutes(together[1]), minutes(together[2])])
    head = ["notebook", "cells run (min:s)", "read (min)", "exercises (min)"]
    machine = timings["machine"]
    about = f"Cells measured on {machine['cores']} cores of {machine['processor']}; the other minutes are estimates."
    return "\n\n".join([markdown_table(head, totals), about, *parts]) + "\n"


def write_guide() -> Path:
    """Write the tables of minutes into the instructor's guide, and return it."""
    write_between(GUIDE, "minutes", tables())
    return GUIDE

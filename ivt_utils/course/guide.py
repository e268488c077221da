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
SHOWS = {  # what the README says of each notebook
    "01_self_correction_gap": "the loop, its fall, and where the fall comes from: the words or the drawn box",
    "02_error_harvesting": "the student's own errors, and trajectories that lead from an error to the truth",
    "03_sft_warmup": "learning to correct, in two recipes; the final step, step 0 and the oracle kept apart",
    "04_grpo": "learning from an IoU reward through TRL's tool loop, and GRPO without the loop",
    "05_ablations": "what each choice is worth, in paired differences with intervals",
    "06_mirage": "what is left of the oracle's gain without labels; confidence, controls and a closer look",
}
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
    parts, whole = [], totals(folder)
    for stem in exercises.LESSONS:
        rows, ran = [], pace.timings()["seconds"].get(stem, {})
        for part in sections(read_cells(folder / f"{stem}.ipynb")):
            seconds = ran.get(part["title"])
            names = ", ".join(f"`{name}`" for name in part["exercises"]) or "-"
            time = "not measured" if seconds is None else clock(seconds)
            rows.append([part["title"], time, minutes(part["read"]), minutes(part["write"]), names])
        head = ["section", "cells run", "read (min)", "exercises (min)", "which"]
        parts.append(f"**{stem}**\n\n{markdown_table(head, rows)}")
    whole["together"] = tuple(map(sum, zip(*whole.values(), strict=True)))
    rows_of_all = [[name, clock(ran), minutes(read), minutes(write)] for name, (ran, read, write) in whole.items()]
    head = ["notebook", "cells run", "read (min)", "exercises (min)"]
    about = f"Cells measured on {pace.machine()}; the other minutes are estimates."
    return "\n\n".join([markdown_table(head, rows_of_all), about, *parts]) + "\n"


def totals(folder: Path = ROOT / "notebooks") -> dict[str, tuple[float, ...]]:
    """Return of each notebook how many seconds its cells ran, and the minutes to read it and for its exercises."""
    found = {}
    for stem in exercises.LESSONS:
        parts, ran = sections(read_cells(folder / f"{stem}.ipynb")), pace.timings()["seconds"].get(stem, {})
        seconds = sum(ran.get(part["title"], 0.0) for part in parts)
        found[stem] = (seconds, *(sum(part[kind] for part in parts) for kind in ("read", "write")))
    return found


def notebooks_table(folder: Path = ROOT / "notebooks") -> str:
    """Return the README's table of the notebooks: what each shows, and how long it takes."""
    rows = []
    for stem, (ran, read, write) in totals(folder).items():
        title = "".join(read_cells(folder / f"{stem}.ipynb")[0]["source"]).splitlines()[0].removeprefix("# ")
        rows.append([f"[{title}](notebooks/{stem}.ipynb)", SHOWS[stem], minutes(read), minutes(write), clock(ran)])
    return markdown_table(["notebook", "what it shows", "read (min)", "exercises (min)", "cells run"], rows) + "\n"


def course_sentence() -> str:
    """Return how long the course runs, and on which machine that was measured, for the README."""
    whole = sum(sum(parts.values()) for parts in pace.timings()["seconds"].values())
    duration = f"{minutes(whole / 60)} minutes on {pace.machine()}"
    return f"The cells of the six notebooks, their trainings among them, run for {duration}.\n"


def write_guide() -> Path:
    """Write the measured minutes into the instructor's guide and the README, and return the guide."""
    write_between(GUIDE, "minutes", tables())
    write_between(ROOT / "README.md", "minutes", course_sentence())
    write_between(ROOT / "README.md", "notebooks", notebooks_table())
    return GUIDE

"""How long the course takes: the measured seconds of every section, and how much of them is left on this machine.

A section is what stands under one `##` heading of a notebook. `data/timings.json` has the seconds that the cells of
each section took in one run of the profile `micro`, and names the machine; `ivt build guide` writes it.
"""

import math
import time
from collections.abc import Mapping

from ivt_utils.runtime.files import DATA, intact, read_json

TIMINGS = DATA / "timings.json"
START = "Start"  # what stands before the first heading
ENOUGH = 5.0  # seconds that must have been measured before this machine is compared with the other
LONG, FOUND = 10.0, 0.2  # a section measured to take so many seconds, and here less than this share, was found finished


def timings() -> dict:
    """Return {"machine": {"processor", "cores", "python"}, "closer": seconds for a seed of the closer look,
    "seconds": {notebook: {section: seconds}}}."""
    return read_json(intact(TIMINGS))


def machine() -> str:
    """Return what the seconds were measured on, such as "2 cores of AMD EPYC"."""
    measured_on = timings()["machine"]
    return f"{measured_on['cores']} cores of {measured_on['processor']}"


def section_seconds(profile: str) -> dict[str, dict[str, int]]:
    """Return {notebook: {section: seconds}} of a profile, in whole seconds; {} for those that were not measured.

    Whole here, so that every sum of them is that of the numbers shown.
    """
    measured_seconds = timings()["seconds"] if profile == "micro" else {}
    return {stem: {title: round(s) for title, s in parts.items()} for stem, parts in measured_seconds.items()}


def clock(seconds: float) -> str:
    """Return `3m05s`, or `1h02m` from an hour on; whole seconds, rounded up."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{rest:02d}s"


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


class Pace:
    """What is left of a course, in seconds of this machine.

    `expected` has the measured seconds of each section, {notebook: {section: seconds}}. They are multiplied by the
    ratio that this machine has shown so far: its seconds over the measured ones, of the sections that it has run.
    Sections whose stages were found finished tell nothing of its speed and are left out, unless all long ones were:
    then there is nothing to train, and little is left.
    """

    def __init__(self, expected: Mapping[str, Mapping[str, float]]):
        self.expected = {(stem, title): s for stem, parts in expected.items() for title, s in parts.items()}
        self.here: dict[tuple, float] = {}  # seconds of the sections that this machine has run
        self.section, self.since = None, 0.0  # the one that is running, and when it began
        self.done: set[str] = set()  # the notebooks of which nothing is left

    def enter(self, stem: str, title: str, now: float | None = None) -> None:
        """Note that a cell of a section begins at `now` (by default the present); with the first, another one ends."""
        if (stem, title) != self.section:
            self._end(now)
            self.section, self.since = (stem, title), time.monotonic() if now is None else now

    def leave(self, stem: str, now: float | None = None) -> dict[str, float]:
        """Note that a notebook has run, and return the seconds of its sections here: {section: seconds}."""
        self._end(now)
        self.done.add(stem)
        return {title: round(value, 1) for (name, title), value in self.here.items() if name == stem}

    def finished(self, stem: str, seconds: dict[str, float]) -> None:
        """Note the seconds of the sections of a notebook that this machine has run before, as `leave` returned them."""
        self.here |= {(stem, title): value for title, value in seconds.items()}
        self.done.add(stem)

    def _end(self, now: float | None) -> None:
        if self.section is not None:
            now = time.monotonic() if now is None else now
            self.here[self.section] = self.here.get(self.section, 0.0) + now - self.since
            self.section = None

    def left(self, now: float | None = None) -> float | None:
        """Return the seconds that are left at `now` (by default the present); None when nothing was measured."""
        if not self.expected:
            return None
        now = time.monotonic() if now is None else now
        so_far = now - self.since if self.section else 0.0
        usual = self.expected.get(self.section, 0.0)
        ran = {section: value for section, value in self.here.items() if section in self.expected}
        if self.section and so_far > usual > 0:  # what is running already takes longer
            ran[self.section] = so_far
        worked = {section: value for section, value in ran.items() if value >= FOUND * self.expected[section]}
        if any(self.expected[section] >= LONG for section in worked):
            ran = worked
        base = sum(self.expected[section] for section in ran)
        ratio = sum(ran.values()) / base if base >= ENOUGH else 1.0
        rest = sum(
            value
            for section, value in self.expected.items()
            if section not in self.here and section != self.section and section[0] not in self.done
        )
        return ratio * rest + max(0.0, ratio * usual - so_far)

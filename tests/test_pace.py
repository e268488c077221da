"""How long the course takes: where the seconds come from, and what is left of them on a machine of another speed."""

import re

import pytest

from ivt_utils.course import execute
from ivt_utils.runtime import pace
from ivt_utils.runtime.files import ROOT, read_json
from ivt_utils.runtime.pace import Pace

EXPECTED = {"01_first": {"Start": 1.0, "Look": 9.0}, "02_second": {"Start": 2.0, "Train": 100.0, "Score": 20.0}}


def test_before_anything_has_run_the_measured_seconds_are_told():
    assert Pace(EXPECTED).left(now=0) == pytest.approx(132)


def test_what_was_not_measured_is_not_promised():
    assert Pace({}).left() is None


def test_a_machine_of_half_the_speed_is_seen_and_believed():
    slow = Pace(EXPECTED)
    slow.enter("01_first", "Start", now=0)
    slow.enter("01_first", "Look", now=2)
    slow.enter("01_first", "Look", now=5)  # the section's second cell
    assert slow.left(now=6) == pytest.approx(127)  # too little has run to say more
    slow.enter("02_second", "Start", now=20)
    assert slow.left(now=20) == pytest.approx(2 * 122)
    slow.enter("02_second", "Train", now=24)
    assert slow.left(now=124) == pytest.approx(100 + 40)


def test_a_section_that_already_takes_longer_counts_at_once():
    pace_here = Pace(EXPECTED)
    pace_here.finished("01_first", {"Start": 1.0, "Look": 9.0})
    pace_here.enter("02_second", "Start", now=0)
    pace_here.enter("02_second", "Train", now=2)
    assert pace_here.left(now=102) == pytest.approx(20)
    assert pace_here.left(now=502) == pytest.approx(20 * 512 / 112)


def test_a_course_whose_trainings_are_found_finished_soon_promises_little():
    quick = Pace(EXPECTED)
    quick.enter("01_first", "Look", now=0)
    quick.enter("02_second", "Train", now=0.9)
    assert quick.left(now=0.9) == pytest.approx(122 * 0.1, rel=0.01)


def test_stages_that_are_found_finished_tell_nothing_of_the_speed():
    """A course that was interrupted: its first training is there already, the next one is not."""
    later = Pace({**EXPECTED, "03_third": {"Train": 200.0}})
    later.finished("01_first", {"Start": 1.0, "Look": 9.0})
    later.enter("02_second", "Train", now=0)
    later.enter("02_second", "Score", now=1)
    later.leave("02_second", now=31)
    later.enter("03_third", "Train", now=31)
    assert later.left(now=31) == pytest.approx(200 * 40 / 30)


def test_nothing_is_left_of_a_notebook_that_has_run():
    short = Pace(EXPECTED)
    short.enter("01_first", "Start", now=0)
    assert short.leave("01_first", now=5) == {"Start": 5.0}  # its second section has another name now
    assert short.left(now=5) == pytest.approx(122)
    short.finished("02_second", {})
    assert short.left(now=5) == 0


def test_what_a_machine_ran_before_is_not_left_and_tells_its_speed():
    again = Pace(EXPECTED)
    again.finished("01_first", {"Start": 3.0, "Look": 27.0})
    assert again.left(now=0) == pytest.approx(3 * 122)


def test_a_heading_that_was_not_measured_changes_nothing():
    new = Pace(EXPECTED)
    new.enter("01_first", "A new section", now=0)
    assert new.left(now=50) == pytest.approx(132)


def test_clock():
    """In whole seconds, rounded up."""
    told = [pace.clock(s) for s in (0, 0.2, 59.5, 61, 65, 3599, 3660)]
    assert told == ["0m00s", "0m01s", "1m00s", "1m01s", "1m05s", "59m59s", "1h01m"]


# ------------------------------------------------------------------------------------------------ one source
def test_every_section_of_the_present_notebooks_was_measured():
    """Otherwise: `make course`, then `ivt build guide`."""
    for path in execute.find_notebooks(ROOT / "notebooks"):
        sections = pace.measured(read_json(path)["cells"])
        assert list(pace.section_seconds("micro")[path.stem]) == list(sections), path.stem
    assert pace.timings()["closer"] > 0


def told_minutes(page: str) -> dict[str, tuple[str, str, str]]:
    """{notebook: (cells run, read, exercises)} as the README or the book's first page has them, and "together"."""
    row = re.compile(
        r"^\| (?:\[.*?\]\((?:\.\./)?notebooks/(\w+)\.ipynb\)|together) \|[^|]*\| (\d+) \| (\d+) \| (\w+) \|$", re.M
    )
    return {stem or "together": (ran, read, write) for stem, read, write, ran in row.findall(page)}


def test_every_page_and_notebook_tells_the_same_minutes_and_they_add_up():
    """`ivt build guide` writes the pages, and `ivt build notebooks` the notebooks."""
    readme, guide, start = ((ROOT / name).read_text() for name in ("README.md", "docs/instructor.md", "docs/index.md"))
    notebooks, *sections = re.split(r"^\*\*(\w+)\*\*$", guide.split("<!-- minutes -->")[1], flags=re.M)
    sections = dict(zip(sections[::2], sections[1::2], strict=True))
    told = {
        name: (ran, read, write)
        for name, ran, read, write in re.findall(r"^\| (\w+) \| (\w+) \| (\d+) \| (\d+) \|$", notebooks, re.M)
    }
    assert told_minutes(readme) == told_minutes(start) == told and len(told) == 7
    for page in (readme, start):
        assert f"run for {told['together'][0]} on {pace.machine()}.\n<!-- /minutes -->" in page
    whole = [0, 0, 0]
    for stem, parts in pace.section_seconds("micro").items():
        rows = re.findall(r"^\| (.+?) \| (\w+) \| (\d+) \| ([\d-]+) \| .+ \|$", sections[stem], re.M)
        minutes = {title: (int(read), int(write.replace("-", "0"))) for title, _, read, write in rows}
        assert {title: ran for title, ran, *_ in rows} == {title: pace.clock(value) for title, value in parts.items()}
        ran, read, write = sum(parts.values()), *map(sum, zip(*minutes.values(), strict=True))
        assert told[stem] == (pace.clock(ran), str(read), str(write)), stem
        first, *others = ["".join(cell["source"]) for cell in read_json(ROOT / "notebooks" / f"{stem}.ipynb")["cells"]]
        assert (
            f"*About {read} minutes to read and {write} for the exercises. The cells run for {pace.clock(ran)} on "
            in first
        )
        assert f" on {pace.machine()} (profile micro)" in first
        lines = re.findall(r"^## (.+)\n\n\*(\d+) minutes?\*$", "\n\n".join(others), re.M)
        assert {title: int(value) for title, value in lines} == {
            title: sum(value) for title, value in minutes.items() if title != pace.START
        }, stem
        whole = [sum(pair) for pair in zip(whole, (ran, read, write), strict=True)]
    assert told["together"] == (pace.clock(whole[0]), str(whole[1]), str(whole[2]))

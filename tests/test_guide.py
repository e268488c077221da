"""The instructor's guide: plans that add up, names that exist, and the minutes that the present notebooks have."""

import ast
import importlib
import json
import re
import shlex

import pytest

from ivt_utils import cli, exercises
from ivt_utils.course import guide
from ivt_utils.profiles import get_profile
from ivt_utils.runtime import pace
from ivt_utils.runtime.files import ROOT, ArtefactError

PAGE = guide.GUIDE.read_text(encoding="utf-8")
HOW = {"talk", "all together", "alone", "pairs", "break"}
ON_THEIR_OWN = {"alone", "pairs"}  # there the learners read and write themselves
STEMS = {stem[1]: stem for stem in exercises.LESSONS}  # by the number of the notebook
SLACK = 0.5  # minutes; tables show whole ones


def cells(stem: str) -> list[dict]:
    return guide.read_cells(ROOT / "notebooks" / f"{stem}.ipynb")


SECTIONS = {stem: {part["title"]: part for part in guide.sections(cells(stem))} for stem in exercises.LESSONS}
CODE = {stem: "\n".join("".join(c["source"]) for c in cells(stem) if c["cell_type"] == "code") for stem in SECTIONS}


def plans(page: str) -> dict[str, list[dict]]:
    """The plans of the page by their marks: rows of {"from", "min", "what", "how", "say"}."""
    found = {}
    for name, table in re.findall(r"<!-- plan ([\w ]+) -->\n(.*?)<!-- /plan \1 -->", page, re.DOTALL):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
        found[name] = [dict(zip(("from", "min", "what", "how", "say"), row, strict=True)) for row in rows]
    return found


def named(what: str) -> list[tuple[str, str, list[str], list[str]]]:
    """What a cell names, by notebook: (stem, the text about it, sections, exercises)."""
    parts = re.split(r"Notebook (\d): ", what)[1:]
    return [
        (STEMS[number], text, re.findall(r"\*(.+?)\*", text), re.findall(r"`(my_\w+)`", text))
        for number, text in zip(parts[::2], parts[1::2], strict=True)
    ]


PLANS = plans(PAGE)
ROWS = [pytest.param(row, id=f"{name} {row['from']}") for name, rows in PLANS.items() for row in rows]


# ------------------------------------------------------------------------------------------------ the plans
def test_the_page_has_the_four_plans():
    assert list(PLANS) == ["20", "90", "210", "420 first", "420 second"]


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_adds_up_to_its_length(name):
    clock = 0
    for row in PLANS[name]:
        assert row["from"] == f"{clock // 60}:{clock % 60:02d}", row
        clock += int(row["min"])
    assert clock == int(name.split()[0])


@pytest.mark.parametrize("row", ROWS)
def test_a_row_says_how_and_names_what_exists(row):
    assert row["how"] in HOW
    assert row["say"] and (row["say"] != "-" or row["how"] == "break")
    for stem, text, titles, names in named(row["what"]):
        assert titles, "a notebook without a section"
        assert set(titles) <= set(SECTIONS[stem]), set(titles) - set(SECTIONS[stem])
        there = {name for title in titles for name in SECTIONS[stem][title]["exercises"]}
        assert set(names) <= there, f"{set(names) - there} is not in these sections"
        for widget in re.findall(r"Widgets? `(\w+)`", text):
            assert f"{widget}(" in CODE[stem], widget


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_long_enough_for_what_stands_in_it(row):
    needed = 0.0
    for stem, _, titles, names in named(row["what"]):
        needed += sum(exercises.find(name).minutes for name in names)
        needed += sum(SECTIONS[stem][title]["read"] for title in titles) * (row["how"] in ON_THEIR_OWN)
        assert not names or row["how"] in ON_THEIR_OWN, "nobody writes while somebody talks"
    assert int(row["min"]) + SLACK >= needed


@pytest.mark.parametrize("row", ROWS)
def test_a_break_is_long_enough_for_its_training(row):
    command = re.search(r"`ivt run ([^`]+)`", row["what"])
    if command and row["how"] == "break":
        only = cli.parser().parse_args(["run", *shlex.split(command[1])]).only
        seconds = pace.section_seconds("micro")
        assert int(row["min"]) * 60 >= sum(sum(seconds[STEMS[str(int(name))]].values()) for name in only)


def test_nothing_is_trained_in_ninety_minutes():
    assert not any("ivt run" in row["what"] for row in PLANS["90"])


def test_every_exercise_is_done_in_two_days_and_once():
    rows = PLANS["420 first"] + PLANS["420 second"]
    done = [name for row in rows for *_, names in named(row["what"]) for name in names]
    everything = [found.name for stem in exercises.LESSONS for found in exercises.lesson(stem)]
    assert sorted(done) == sorted(everything)


# ------------------------------------------------------------------------------------------------ the page
def test_every_command_of_the_page_is_one():
    said = re.findall(r"`(ivt [^`]+)`", PAGE)
    assert len(said) > 8
    for command in said:
        words = shlex.split(command)[1:]
        if len(words) > 1:
            cli.parser().parse_args(words)
        else:
            with pytest.raises(SystemExit) as done:
                cli.parser().parse_args([*words, "--help"])
            assert done.value.code == 0, command


def test_every_target_of_make_is_one():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make (\w+)", PAGE)) <= set(targets)


def test_every_link_and_file_is_there():
    anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.+)", PAGE, re.M)}
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        path, _, anchor = target.partition("#")
        assert path == "" or (guide.GUIDE.parent / path).exists(), target
        assert path or anchor in anchors, target
    for name in re.findall(r"data/reference/?[\w./]*", PAGE):
        assert (ROOT / name).exists(), name


def test_every_picture_for_the_projector_is_drawn_by_its_notebook():
    table = PAGE.split("## Pictures for the projector")[1].split("\n## ")[0]
    rows = [line.split("|") for line in table.splitlines() if ".png" in line]
    assert len(rows) >= 6
    for row in rows:
        for picture in re.findall(r"`(\w+\.png)`", row[2]):
            assert f'"{picture}"' in CODE[STEMS[row[3].strip()]], picture


def messages() -> str:
    """Every text of the package, a value in it written "...", and the Makefile."""
    texts = [(ROOT / "Makefile").read_text()]
    for path in ROOT.glob("ivt_utils/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


@pytest.mark.slow
def test_quoted_messages_are_those_of_the_project():
    part = PAGE.split("## What goes wrong")[1].split("\n## ")[0]
    symptoms = [line.split("|")[1] for line in part.splitlines() if line.startswith("|")]
    quoted = {sentence for text in symptoms for sentence in re.findall(r'"([^"]+)"', text)} - {"Kernel Restarting"}
    assert len(quoted) >= 7
    said = messages()
    for sentence in quoted:  # "Kernel Restarting" is Jupyter's
        for piece in sentence.split("..."):
            assert piece.strip() in said, piece


def test_learners_questions_are_many_and_short():
    part = PAGE.split("## Questions that learners ask")[1].split("\n## ")[0]
    answers = re.findall(r'^\*\*"[^"]+"\*\* (.+?)(?=\n\n|\Z)', part, re.MULTILINE | re.DOTALL)
    assert len(answers) >= 15
    assert len(re.findall(r"^### Notebook \d$", part, re.MULTILINE)) == len(exercises.LESSONS)
    for answer in answers:
        assert 2 <= len(re.findall(r"[.?](?=\s|$)", answer)) <= 5, answer


def test_code_of_the_page_is_code_and_imports_what_there_is():
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for name in (alias.name for alias in node.names):
                    assert hasattr(module, name) or importlib.import_module(f"{node.module}.{name}")


def test_no_prompt_comes_twice_in_grpo_as_the_page_says():
    profile = get_profile("micro")
    assert profile.grpo_steps * profile.grpo_prompts < profile.train


# ------------------------------------------------------------------------------------------------ the minutes
def test_the_table_of_minutes_is_that_of_the_present_notebooks():
    shown = PAGE.split("<!-- minutes -->\n")[1].split("<!-- /minutes -->")[0]
    assert shown == guide.tables(), "stale: ivt build guide --from runs/micro"


@pytest.mark.parametrize("stem", exercises.LESSONS)
def test_every_heading_of_a_notebook_opens_a_section(stem):
    """A heading in the middle of a cell would be no section, and its minutes would go to the one before."""
    text = "\n".join("".join(cell["source"]) for cell in cells(stem) if cell["cell_type"] == "markdown")
    assert re.findall(r"^## (.+)", text, re.MULTILINE) == [title for title in SECTIONS[stem] if title != pace.START]


def markdown(text, **metadata):
    return {"cell_type": "markdown", "source": text, "metadata": metadata}


def code(text, **metadata):
    return {"cell_type": "code", "source": text, "metadata": metadata}


EXERCISE = exercises.find("my_iou")
MADE_UP = [
    markdown("# Title\n\n" + "word " * (guide.WORDS_A_MINUTE - 2)),
    code("x = 1\n" * 40, tags=["setup"], papermill={"duration": 2.0}),
    code("PROFILE = 1", tags=["parameters"]),
    markdown("## First"),
    code("show(figure)\n" + "x = 1\n" * (guide.LINES_A_MINUTE - 1), papermill={"duration": 1.25}),
    code("x = 1", papermill={"duration": None}),
    markdown("word " * 500, exercise=EXERCISE.name),
    code("stub", exercise=EXERCISE.name, papermill={"duration": 0.5}),
    markdown("word " * 500, exercise=EXERCISE.name),
    markdown("### Not a section"),
    markdown("## Second\n\nText."),
]


def test_sections_count_prose_code_figures_and_exercises_once():
    start, first, second = guide.sections(MADE_UP)
    assert [part["title"] for part in (start, first, second)] == [pace.START, "First", "Second"]
    assert start["read"] == 1 and start["write"] == 0
    assert first["read"] == round(1 + 1 / guide.LINES_A_MINUTE + guide.FIGURE_MINUTES) == 2
    assert first["write"] == EXERCISE.minutes and first["exercises"] == [EXERCISE.name]
    assert second["exercises"] == [] and second["write"] == 0 and second["read"] == 1


def test_a_task_without_a_gap_counts_its_own_minutes_and_no_text_twice():
    long = "word " * 5 * guide.WORDS_A_MINUTE
    asked = [
        markdown(f"### Predict, run, explain: another overlay (about 4 minutes)\n\n{long}"),
        code("x = 1\n" * 100),
        markdown(f"<details>\n<summary>Explanation</summary>\n\n{long}\n</details>"),
    ]
    (_, found, _) = guide.sections(
        [markdown("Title"), markdown("## First"), *asked, markdown(long), markdown("## Next")]
    )
    assert (found["read"], found["write"], found["exercises"]) == (5, 4, ["Predict, run, explain: another overlay"])


def test_measured_adds_the_seconds_of_each_section():
    assert pace.measured(MADE_UP) == {pace.START: 2.0, "First": 1.8, "Second": 0.0}


@pytest.fixture
def finished_run(tmp_path, monkeypatch):
    """A run whose six notebooks are made up, and a place for the timings that is not the project's."""
    (tmp_path / "notebooks").mkdir()
    for stem in exercises.LESSONS:
        (tmp_path / "notebooks" / f"{stem}.ipynb").write_text(json.dumps({"cells": MADE_UP}))
    (tmp_path / "stages.json").write_text(json.dumps({"adapters/sft": {"sha256": "x", "seconds": 9}}))
    monkeypatch.setattr(pace, "TIMINGS", tmp_path / "data" / "timings.json")
    return tmp_path


def test_timings_are_kept_by_notebook_and_section(finished_run):
    kept = json.loads(guide.keep_timings(finished_run).read_text())
    assert kept["seconds"] == {stem: pace.measured(MADE_UP) for stem in exercises.LESSONS}
    assert kept["machine"]["cores"] >= 1 and kept["machine"]["processor"]
    rows = guide.tables(finished_run / "notebooks")
    assert f"| First | 0m02s | 2 | {EXERCISE.minutes} | `my_iou` |" in rows
    assert f"| together | 0m24s | 24 | {6 * EXERCISE.minutes} |" in rows  # sums of what the sections show


def test_the_closer_look_is_timed_where_the_run_holds_it_and_else_kept(finished_run, monkeypatch):
    names = [
        f"{kind}/closer_{name}"
        for kind, name in (
            ("rollouts", "test_untrained"),
            ("adapters", "seed0"),
            ("rollouts", "test_seed0"),
            ("adapters", "first0"),
            ("adapters", "seed1"),
        )
    ]
    stages = {name: {"seconds": 60.0} for name in names} | {"adapters/sft": {"seconds": 9.0}}
    (finished_run / "stages.json").write_text(json.dumps(stages))
    assert json.loads(guide.keep_timings(finished_run).read_text())["closer"] == 150.0
    alone = finished_run / "closer"  # on its own, with the notebooks' seconds from before
    alone.mkdir()
    stages = {name: {"seconds": 30.0} for name in names}
    (alone / "stages.json").write_text(json.dumps(stages))
    kept = json.loads(guide.keep_timings(alone).read_text())
    assert kept["closer"] == 75.0 and set(kept["seconds"]) == set(exercises.LESSONS)
    monkeypatch.setattr(guide.hardware, "processor", lambda: "another")
    with pytest.raises(ArtefactError, match="does not hold every executed notebook"):
        guide.keep_timings(alone)
    monkeypatch.undo()
    monkeypatch.setattr(pace, "TIMINGS", finished_run / "data" / "timings.json")
    (finished_run / "stages.json").write_text(json.dumps({"adapters/sft": {"seconds": 9.0}}))
    assert json.loads(guide.keep_timings(finished_run).read_text())["closer"] == 75.0


def test_an_unfinished_run_is_refused_in_one_sentence(finished_run):
    last = finished_run / "notebooks" / f"{list(exercises.LESSONS)[-1]}.ipynb"
    last.rename(last.with_name(f"{last.stem}.partial.ipynb"))
    (finished_run / "notebooks" / "01_self_correction_gap-Copy1.ipynb").write_text("{}")
    with pytest.raises(ArtefactError, match="does not hold every executed notebook: finish it with `ivt run` first"):
        guide.keep_timings(finished_run)
    assert not pace.TIMINGS.exists()


def test_a_run_that_began_with_the_reference_is_refused(finished_run):
    (finished_run / "stages.json").write_text(json.dumps({"adapters/sft": {"sha256": "x"}}))
    with pytest.raises(ArtefactError, match="its trainings were not timed"):
        guide.keep_timings(finished_run)


def test_a_run_that_was_interrupted_is_refused(finished_run):
    (finished_run / "stages.json").write_text(json.dumps({"adapters/sft": {"sha256": "x", "seconds": 900.0}}))
    with pytest.raises(ArtefactError, match="was interrupted and went on later"):
        guide.keep_timings(finished_run)


def test_missing_timings_are_an_error_that_says_what_to_do(finished_run):
    with pytest.raises(ArtefactError, match="timings.json cannot be checked; restore it"):
        guide.tables()


def test_the_page_is_written_between_its_marks_only(finished_run, monkeypatch):
    page = finished_run / "instructor.md"
    old = "Before\n<!-- minutes -->\nold\n<!-- /minutes -->\nAfter\n"
    page.write_text(old)
    parts = "".join(f"<!-- {mark} -->\nold\n<!-- /{mark} -->\n" for mark in guide.SHARED if mark != "minutes")
    (finished_run / "README.md").write_text(f"{old}{parts}End\n")
    (finished_run / "docs").mkdir()
    start = finished_run / "docs" / "index.md"
    start.write_text(f"{parts}{old}")
    monkeypatch.setattr(guide, "GUIDE", page)
    monkeypatch.setattr(guide, "ROOT", finished_run)
    guide.keep_timings(finished_run)
    assert guide.write_guide().read_text() == f"Before\n<!-- minutes -->\n{guide.tables()}<!-- /minutes -->\nAfter\n"
    readme = (finished_run / "README.md").read_text()
    table = parts.replace("notebooks -->\nold", f"notebooks -->\n{guide.notebooks_table().rstrip()}")
    said = f"Before\n<!-- minutes -->\n{guide.course_sentence()}<!-- /minutes -->\nAfter\n"
    assert readme == f"{said}{table}End\n"
    assert start.read_text() == table.replace("](notebooks/", "](../notebooks/") + said

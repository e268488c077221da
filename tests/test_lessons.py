"""The notebooks as they are committed: made parts, outputs, links, pictures, and the rules of reading."""

import copy
import json
import re
from dataclasses import replace

import nbformat
import pytest
from conftest import numbers

from ivt_utils import exercises
from ivt_utils.course import execute, guide, lessons
from ivt_utils.course.execute import MARK, PROJECT, find_notebooks
from ivt_utils.course.setting_up import badge_links, repository
from ivt_utils.profiles import get_profile
from ivt_utils.records import first, load_split
from ivt_utils.runtime.files import ROOT, ArtefactError, read_json
from ivt_utils.show.tables import paper_results

NOTEBOOKS = find_notebooks(lessons.NOTEBOOKS)
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
MACHINE = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|usr|opt|var|Users|mnt|content)/|[A-Z]:\\\\")
# Where each term of the course is to be explained when it is first used, in the order of the notebooks.
TERMS = """vision-language model; referring expression; self-correction gap; record; ground truth; IoU; Acc@0.5;
feedback; overlay; step 0; rollout; control; bootstrap; format shock; oracle; sandbagging; another object; trace;
teacher; supervised fine-tuning; loss; labels; LoRA; rank; adapter; NF4; degradation; reinforcement learning; reward;
policy; GRPO; group; advantage; temperature; KL divergence; entropy; ablation; rule; consensus; verification;
discordant; AUROC""".replace("\n", " ").split("; ")
LONGEST, AVERAGE = 45, 18  # words in a sentence


def read(path):
    return nbformat.read(path, as_version=4)


def prose(notebook) -> list[str]:
    """The Markdown cells of a notebook."""
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


def unfolded(text: str) -> str:
    """What a reader sees of a Markdown cell: without what is folded away, comments, code, pictures and addresses."""
    text = re.sub(r"<details>.*?</details>|<!--.*?-->", " ", text, flags=re.DOTALL)
    return re.sub(r"!\[[^\]]*\]\([^)]*\)|(?<=\])\([^)]*\)|`[^`]*`|\[!\[.*", " ", text)


def sentences(text: str) -> list[str]:
    blocks = re.split(r"\n\s*\n|\n(?=\s*[-|#*] )", re.sub(r"^#+ .*", "", unfolded(text), flags=re.MULTILINE))
    found = [s for block in blocks for s in re.split(r"(?<=[.!?:;])[*_\"”)]*\s+", block.strip())]
    return [s for s in found if len(s.split()) > 2]


@each
def test_made_parts_are_those_of_today(path):
    """`ivt build notebooks` writes them."""
    notebook = read(path)
    again = lessons.with_made_cells(copy.deepcopy(notebook), path.stem)
    assert nbformat.writes(again) == nbformat.writes(notebook)


@each
def test_badges_come_with_an_address_on_github(path, monkeypatch):
    for address in ("https://github.com/someone/course", "https://example.org/course"):
        monkeypatch.setattr(lessons, "repository", lambda address=address: address)
        title = lessons.with_made_cells(copy.deepcopy(read(path)), path.stem).cells[0].source
        assert title.count("docs/badges/") == len(badge_links(path.stem, address)) == 3 * ("github" in address)


def test_the_stamp_rests_on_the_code_that_is_reached_and_not_on_what_is_said_of_it(tmp_path):
    module = tmp_path / "module.py"
    module.write_text('"""Says."""\n\n\ndef f(x):\n    """Says\n\n    more."""\n    return "# x" + x  # why\n')
    assert execute.code_of(module) == 'def f(x):\n    return "# x" + x'
    names = {path.stem for path in execute.reached(["from ivt_utils.boxes import iou\nimport numpy"])}
    assert names == {"boxes"}
    names = {path.stem for path in execute.reached(["def f():\n    from ivt_utils import loop"])}
    assert {"loop", "protocol", "student", "files"} <= names and not names & {"book", "lessons", "widgets", "plan"}


@each
def test_outputs_belong_to_the_present_code(path):
    """`ivt build notebooks` makes them anew, in a minute: the cells, the package and the reference must be the same."""
    assert read(path).metadata[MARK]["made_from"] == lessons.stamp(path)


@pytest.mark.slow
def test_the_stamp_changes_with_cells_and_code_but_not_with_outputs(tmp_path, monkeypatch):
    path = tmp_path / NOTEBOOKS[0].name
    notebook = read(NOTEBOOKS[0])
    lessons.write_notebook(path, notebook)
    before = lessons.stamp(path)
    notebook.cells[1].outputs, notebook.cells[1].execution_count = [], None
    lessons.write_notebook(path, notebook)
    assert lessons.stamp(path) == before
    monkeypatch.setattr("ivt_utils.course.execute.code_of", lambda path: f"changed {path.name == 'boxes.py'}")
    assert lessons.stamp(path) != before
    monkeypatch.undo()
    notebook.cells[1].source += "\n"
    lessons.write_notebook(path, notebook)
    assert lessons.stamp(path) != before


@each
def test_a_notebook_is_whole_and_small(path):
    notebook, raw = read(path), path.read_text(encoding="utf-8")
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert len(raw.encode()) < 2_000_000
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(
        o.get("execution_count", cell.execution_count) == cell.execution_count for cell in code for o in cell.outputs
    )
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert "widgets" not in notebook.metadata and "widget-view" not in raw and "widget-state" not in raw
    assert set(notebook.metadata) == {"kernelspec", "language_info", MARK}
    assert not [cell for cell in notebook.cells if "papermill" in cell.metadata]


@each
def test_no_path_of_a_machine(path):
    for cell in read(path).cells:
        data = [{k: v for k, v in o.get("data", {}).items() if k != "image/png"} for o in cell.get("outputs", [])]
        shown = [json.dumps(data), *(o.get("text", "") for o in cell.get("outputs", []))]
        for text in [cell.source, *shown]:
            assert not MACHINE.search(text) and str(PROJECT) not in text, text


@each
def test_every_picture_has_alt_text(path):
    notebook = read(path)
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) >= 3
    for picture in pictures:
        assert len(picture.metadata["image/png"]["alt"].split()) >= 4
    for alt in re.findall(r"!\[([^\]]*)\]", "\n".join(prose(notebook))):
        assert alt.strip()


@each
def test_links_and_badges_resolve_inside_the_repository(path):
    text = "\n".join(prose(read(path)))
    links = set(re.findall(r"\]\(([^)\s]+)\)", text))
    badges = badge_links(path.stem, repository())
    assert set(badges.values()) <= links and ("docs/badges/colab.svg" in text) == ("colab" in badges)
    for link in links - set(badges.values()):
        assert not link.startswith("http") or "arxiv.org" in link, link
        if not link.startswith("http"):
            assert (path.parent / link.split("#")[0]).resolve().is_relative_to(ROOT), link
            assert (path.parent / link.split("#")[0]).exists(), link
    for link in badges.values():
        assert path.relative_to(ROOT).as_posix() in link.replace("%2F", "/")


@each
def test_cells_fit_on_a_screen(path):
    for cell in read(path).cells:
        lines = unfolded(cell.source).strip().splitlines() if cell.cell_type == "markdown" else cell.source.splitlines()
        assert len(lines) <= 30, cell.source
        assert cell.cell_type == "markdown" or max(map(len, lines)) <= 140, cell.source


@each
def test_sentences_are_short(path):
    found = [s for text in prose(read(path)) for s in sentences(text)]
    lengths = [len(s.split()) for s in found]
    assert max(lengths) <= LONGEST, found[lengths.index(max(lengths))]
    assert sum(lengths) / len(lengths) <= AVERAGE


@each
def test_plain_words(path):
    text = " ".join(unfolded(t) for t in prose(read(path))).lower()
    for word in ("simply", "obviously", "of course", "trivial", "just ", "clearly", "leverage", "utilize", "!"):
        assert word not in text, word


@each
def test_no_result_is_written_by_hand(path):
    """Numbers with a decimal point or a percent sign in prose are the paper's, or values of a profile."""
    paper = numbers(paper_results()) | {0.029, 0.14}
    profile = numbers(list(vars(get_profile("micro")).values())) | {0.5, 0.05, 0.95, 1.96}
    for text in [c.source for c in read(path).cells if c.cell_type == "markdown" and not c.metadata.get("exercise")]:
        seen = re.sub(r"arXiv \d+\.\d+|\[[^\]]*\]|0\.\.1000|\d+\.\d+ x ", " ", unfolded(text))
        for digits, percent in re.findall(r"(?<![\w.])(\d+\.\d+|\d+(?= ?%))(?:st|nd|rd|th)?( ?%)?", seen):
            value = round(float(digits) / (100 if percent else 1), 6)
            known = {round(v, 6) for v in paper | profile} | {round(v / 100, 6) for v in paper}
            assert value in known or float(digits) in known or value in (0.05, 0.95, 1.0), (digits, text)


@each
def test_the_story_is_led(path):
    """A title with the time it takes, words before what runs, three questions, and where to go next."""
    notebook = read(path)
    title, *_, questions, last = prose(notebook)
    assert title.startswith("# ") and "minutes to read" in title and "**Here**" in title
    assert [cell.id for cell in notebook.cells if cell.cell_type == "code"][0] == lessons.SETUP
    assert "parameters" in notebook.cells[2].metadata.tags and notebook.cells[2].source.startswith("PROFILE")
    assert questions.startswith("## Check yourself") and questions.count("<summary>Answer</summary>") == 3
    assert last.startswith("**Where to go next.**") and re.search(r"\]\([\w./]+\)", last)
    run = "".join("c" if cell.cell_type == "code" else "m" for cell in notebook.cells[4:])
    assert "cccc" not in run
    titles = [text.splitlines()[0] for text in prose(notebook) if text.startswith("## ")]
    assert len(titles) == len(set(titles))


def test_notebook_1_begins_with_an_answer_and_shows_the_fall_within_ten_minutes():
    """Prose and pictures at the guide's reading speed; code is run at once, and may be read later."""
    cells = [cell for cell in guide.read_cells(NOTEBOOKS[0]) if cell["id"] != lessons.SETUP]
    sources = ["".join(cell["source"]) for cell in cells]

    def place(text):
        return next(i for i, source in enumerate(sources) if text in source and cells[i]["cell_type"] == "code")

    def minutes(stop):
        pictures = re.findall(r"^show\(", "\n".join(sources[:stop]), re.MULTILINE)
        told = [
            guide.without_made(source)
            for source, cell in zip(sources[:stop], cells, strict=False)
            if cell["cell_type"] == "markdown" and not cell["metadata"].get("exercise")
        ]
        return guide.FIGURE_MINUTES * len(pictures) + len(" ".join(told).split()) / guide.WORDS_A_MINUTE

    answer, fall = place('"01_first_answer.png"'), place('"01_gap.png"')
    assert minutes(answer) <= 1.5 and minutes(fall + 1) <= 10
    story = """generate( "01_first_answer.png" "01_look_again.png" MY_VOTE= be_the_model( my_iou( "01_task.png"
    "01_gap.png" my_overlays( EXPECTED= {MY_VOTE my_from_pixels("""
    places = [place(text.replace("=", " =")) for text in story.split()]
    assert places == sorted(places)


@each
def test_a_prediction_is_written_down_before_it_is_measured(path):
    cells = read(path).cells
    for i, cell in enumerate(cells):
        if "### Predict, run, explain" in cell.source:
            assert re.match(r"### Predict, run, explain: .+ \(about \d+ minutes?\)\n", cell.source)
            assert re.search(r'^EXPECTED = ""  # ', cells[i + 1].source, re.MULTILINE)
            assert "You expected: {EXPECTED or" in cells[i + 1].source
            assert cells[i + 2].source.startswith("<details>\n<summary>Explanation</summary>")
    assert any(cell.source.startswith(("### Predict, run, explain: ", "### Investigation: ")) for cell in cells)


def test_the_first_pictures_of_the_test_set_are_three_kinds_of_questions_about_three_images():
    profile = get_profile("micro")
    names = {"first": first, "profile": profile, "test": load_split(profile, "test")}
    cell = next(cell for cell in read(NOTEBOOKS[0]).cells if '"01_task.png"' in cell.source)
    exec(cell.source.split("figure, axes")[0], names)
    assert set(names["kinds"]) == set(names["test"].unique("subset")) and len(names["kinds"]) == 3
    assert len({record["image_id"] for record in names["kinds"].values()}) == 3


def test_terms_are_explained_where_they_first_appear():
    cells = [re.sub(r"\s+", " ", unfolded(text)) for path in NOTEBOOKS for text in prose(read(path))]
    for term in TERMS:
        uses = [text for text in cells if re.search(rf"(?<![\w@-]){re.escape(term)}", text, re.IGNORECASE)]
        assert uses, term
        assert re.search(rf"\*[^*]*{re.escape(term)}[^*]*\*", uses[0], re.IGNORECASE), (term, uses[0])


@each
def test_there_is_something_to_do_and_each_exercise_says_that_it_waits(path):
    notebook = read(path)
    code = [cell for cell in notebook.cells if cell.metadata.get("exercise") and cell.cell_type == "code"]
    assert [cell.metadata.exercise for cell in code] == [found.name for found in exercises.lesson(path.stem)]
    assert len(code) + sum("### Predict, run, explain: " in text for text in prose(notebook)) >= 2
    for cell in code:
        assert f"[to do] {cell.metadata.exercise}" in "".join(o.get("text", "") for o in cell.outputs)


def test_the_last_notebook_takes_25_minutes_and_shows_four_tables_at_most():
    path = lessons.NOTEBOOKS / "06_mirage.ipynb"
    parts = guide.sections(guide.read_cells(path))
    assert sum(part["read"] + part["write"] for part in parts) <= 25
    outputs = [o for cell in read(path).cells if cell.cell_type == "code" for o in cell.outputs]
    assert sum("".join(o.get("data", {}).get("text/markdown", "")).count("| --- |") > 0 for o in outputs) <= 4


def test_a_seeded_run_is_the_reference(tmp_path):
    run = lessons.seed_run(get_profile("micro"), 0, tmp_path / "seeded")
    made = run.rollouts("base_ivt", lambda: pytest.fail("it is finished"))
    assert len(made) == get_profile("micro").test
    assert run.seed == read_json(lessons.REFERENCE / "run.json")["seed"]
    assert run.took("rollouts/base_ivt") == "(this training comes with the course)"


def test_the_reference_never_overwrites_a_run(tmp_path):
    root = tmp_path / "seeded"
    micro = get_profile("micro")
    lessons.seed_run(micro, 0, root)
    (root / "mark").write_text("mine")
    lessons.seed_run(micro, 0, root).rows("more", lambda: [1])  # the same command goes on
    assert (root / "mark").exists()
    stages = read_json(root / "stages.json")
    stages["rollouts/base_ivt"]["sha256"] = "another"
    (root / "stages.json").write_text(json.dumps(stages))
    with pytest.raises(ArtefactError, match="nothing in it is overwritten"):
        lessons.seed_run(micro, 0, root)
    assert read_json(root / "stages.json") == stages
    for profile, seed, said in (
        (get_profile("smoke"), 0, "not of smoke and 0"),
        (micro, 1, "not of micro and 1"),
        (replace(micro, sft_epochs=9), 0, "another sft_epochs"),
    ):
        with pytest.raises(ArtefactError, match=said):
            lessons.seed_run(profile, seed, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_answer_in_the_notebooks_is_not_lost():
    notebook = read(NOTEBOOKS[0])
    cell = next(cell for cell in notebook.cells if cell.id == "my_iou")
    cell.source = cell.source.replace(exercises.GAP, "return 0.5")
    with pytest.raises(ArtefactError, match="my_iou holds an answer"):
        lessons.with_made_cells(notebook, NOTEBOOKS[0].stem)

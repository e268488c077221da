"""The README and the pages of `docs/`: commands, files and links exist, what is made there is that of today."""

import re
import shlex
from xml.etree import ElementTree

import pytest
from conftest import numbers
from PIL import Image

from ivt_utils import cli
from ivt_utils.course import book, guide, lessons
from ivt_utils.course.setting_up import badge_links, readme_badges, repository
from ivt_utils.paper_scale.plan import plan_text
from ivt_utils.profiles import get_profile
from ivt_utils.runtime.files import ROOT, read_json
from ivt_utils.runtime.store import REFERENCE
from ivt_utils.runtime.text import between
from ivt_utils.show.diagrams import write_svg
from ivt_utils.show.report import write_tables
from ivt_utils.show.tables import paper_results

# Each with the least number of commands that it names.
PAGES = {
    ROOT / "README.md": 0,  # none once its badges stand there
    ROOT / "docs" / "index.md": 5,
    ROOT / "docs" / "results.md": 4,
    ROOT / "docs" / "instructor.md": 9,
    ROOT / "docs" / "researcher.md": 9,
    ROOT / "CONTRIBUTING.md": 9,
}
RESEARCHER = ROOT / "docs" / "researcher.md"
README = (ROOT / "README.md").read_text()
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_one(page):
    text = page.read_text()
    said = re.findall(r"`((?:ivt|accelerate) [^`]+)`|^((?:ivt|accelerate) [^#\n]+)", text, re.MULTILINE)
    commands = [shlex.split((inline or line).split("#")[0]) for inline, line in said]
    assert len(commands) >= PAGES[page]
    for words in commands:
        at = words.index("-m") + 2 if words[0] == "accelerate" and "-m" in words else 1
        if words[0] == "accelerate" and at == 1:
            continue  # `accelerate launch` alone
        if len(words[at:]) == 1:  # the mention of a command
            with pytest.raises(SystemExit) as done:
                cli.parser().parse_args([*words[at:], "--help"])
            assert done.value.code == 0, words
            continue
        arguments = cli.parser().parse_args(words[at:])
        if hasattr(arguments, "profile") and arguments.profile != "mine":
            get_profile(arguments.profile)


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda page: page.name)
def test_every_file_and_link_is_there(page):
    text = page.read_text()
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    for name, anchor in re.findall(r"\]\((?!http)([^)#]*\.md|)#([^)]+)\)", text):
        target = (page.parent / name).read_text() if name else text
        headings = re.findall(r"^#+ (.+)", target, re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in anchors | {*re.findall(r"^\((.+)\)=$", target, re.MULTILINE)}, (name, anchor)
    files = re.findall(r"`((?:configs|data|docs|ivt_utils|tests)/[\w./]+)`", text)
    made = {"data/hub/paper/manifest.json"}
    assert links or files
    for name in links:
        assert (page.parent / name).exists(), name
    for name in set(files) - made:
        assert (ROOT / name).exists(), name


# ------------------------------------------------------------------------------------------------ one screen
def test_the_readme_is_one_screen():
    lines = README.splitlines()
    assert len(lines) <= 100 and README.count("![") == 1 + 3 * bool(badge_links("01", repository()))
    code = README.split("```")[1]
    assert max(len(line) for line in lines if not line.startswith(("|", "[![")) and line not in code) <= 130
    assert [line.split("#")[0].strip() for line in code.splitlines()[1:]] == ["make course", "make test"]


def test_what_is_made_for_the_readme_is_that_of_today():
    """`ivt build docs`, `ivt build guide` and `ivt build notebooks` write these parts."""
    assert between(README, "claims") == book.reproduced(read_json(REFERENCE / "results.json"), paper_results())
    assert between(README, "notebooks") == guide.notebooks_table()
    assert between(README, "badges") == readme_badges(lessons.README_OPENS, repository())
    for mark in re.findall(r"<!-- (\w+) -->", README):
        assert between(README, mark).strip(), mark


def test_the_books_first_page_is_as_strong_as_the_readme():
    """`ivt build docs` and `ivt build guide` copy these parts of the README; links are those from `docs/`."""
    start = (ROOT / "docs" / "index.md").read_text()
    for mark in guide.SHARED:
        part = between(start, mark)
        links = r"\]\((?!http)([^)]+)\)"
        assert re.sub(links, "", part) == re.sub(links, "", between(README, mark)) != "", mark
        there = [(ROOT / "docs" / name).resolve() for name in re.findall(links, part)]
        assert there == [(ROOT / name).resolve() for name in re.findall(links, between(README, mark))], mark


@pytest.mark.parametrize("page", book.DRAWN)
def test_the_drawings_of_a_page_are_those_of_today_and_say_what_they_show(page, tmp_path):
    """`ivt build docs` draws them. Their words are letters, not curves, and none is wider than its panel."""
    text = (ROOT / page).read_text()
    for name in book.DRAWN[page]:
        alt = write_svg(name, tmp_path)
        ((said, path),) = re.findall(r"!\[([^]]+)\]\((.+?)\)", between(text, name))
        assert said.replace("\n", " ") == alt
        committed = ElementTree.parse((ROOT / page).parent / path).getroot()
        drawn = ElementTree.parse(tmp_path / f"{name}.svg").getroot()
        words = [["".join(part.itertext()) for part in root.iter(f"{SVG}text")] for root in (committed, drawn)]
        assert words[0] == words[1] and len(words[0]) >= 5
        title, words = (committed.find(f"{SVG}{tag}").text for tag in ("title", "desc"))
        assert f"{title}. {words}" == alt and "#fbfaf5" in ElementTree.tostring(committed, "unicode")  # its light panel


def test_the_readmes_picture_is_that_of_the_reference():
    """`ivt build docs` draws it; what its alt text says is also its description."""
    figure = book.picture(read_json(REFERENCE / "results.json"), paper_results())
    with Image.open(ROOT / book.PICTURE) as picture:
        assert picture.info["Description"] == figure.get_label()
        assert picture.width >= 2 * 390  # sharp on a phone
    (alt,) = re.findall(rf"!\[([^]]+)\]\({book.PICTURE}\)", README)
    assert alt.replace("\n", " ") == figure.get_label()


def test_every_claim_stands_once_in_the_readme():
    results, paper = read_json(REFERENCE / "results.json"), paper_results()
    told = dict(re.findall(r"- \[(.+?)\]\(.+?\): (.+)\.$", re.sub(r"\n  ", " ", book.reproduced(results, paper)), re.M))
    verdicts = [row[3] for row in book.claims(results, paper)[1:]]
    heads = {"Reproduced": book.SEEN, "Not reproduced": book.NOT_SEEN, "Left open by our intervals": book.OPEN}
    for head, verdict in heads.items():
        assert len(told.get(head, "").split("; ")) - (head not in told) == verdicts.count(verdict), head
    assert len(verdicts) > 10


def test_the_verdict_in_the_readme_follows_the_interval():
    results = read_json(REFERENCE / "results.json")
    for row in results["differences"]:
        if row["name"] == "base_ivt final - base_single" and row["metric"] == "acc50":
            row |= {"low": 0.1, "high": 0.2}
    _, rest = book.reproduced(results, paper_results()).split("- [Not reproduced]")
    assert "looking again without training does harm" in rest.split("- [Left")[0].replace("\n  ", " ")


def test_the_tables_of_the_results_are_those_of_the_reference(tmp_path, monkeypatch):
    page, committed = tmp_path / "results.md", (ROOT / book.RESULTS).read_text()
    page.write_text(committed)
    write_tables(page, read_json(REFERENCE / "results.json"), paper_results())
    assert between(page.read_text(), "tables") == between(committed, "tables")
    folded = re.findall(r"<details>.*?</details>", committed, re.DOTALL)
    assert len(folded) == 2 and "| SFT + IVT | ours | 3 |" in folded[0]
    assert not re.search(r"\| [0-4] \| - \|", re.sub(r"<details>.*?</details>", "", committed, flags=re.DOTALL))
    assert "not run" not in between(committed, "tables")
    if "Nobody has run" in between(committed, "scale"):
        assert "|" not in between(committed, "scale") and "ivt run --profile paper" in between(committed, "scale")


def test_no_sentence_stands_twice():
    """The README and the pages that took over what it said."""
    found = []
    for page in (
        README,
        *((ROOT / "docs" / f"{name}.md").read_text() for name in ("index", "results", "paper_and_us")),
    ):
        text = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->|```.*?```|^\|.*?$", "", page, flags=re.DOTALL | re.MULTILINE)
        text = re.sub(r"\]\([^)]*\)", "]", text)
        found += [" ".join(s.split()) for s in re.split(r"(?<=[.:;])\s+|\n\n", text) if len(s.split()) > 6]
    assert len(found) > 100 and not {sentence for sentence in found if found.count(sentence) > 1}


# ------------------------------------------------------------------------------------------------ the researcher's page
def test_the_researchers_values_are_the_profiles():
    rows = re.findall(r"`(\w+)` = (\S+?),?(?= |$)", RESEARCHER.read_text(), re.MULTILINE)
    assert len(rows) >= 10
    for name, value in rows:
        assert str(getattr(get_profile("paper"), name)) == value.strip('"'), name


def test_what_the_paper_is_said_to_report_is_what_is_known_of_it():
    known = numbers(paper_results())
    cells = re.findall(r"\| the paper: ([^|]+) \|", RESEARCHER.read_text())
    said = [number for cell in cells for number in re.findall(r"(\d*\.\d+)( %)?", cell)]
    assert len(said) >= 7
    for number, percent in said:
        assert round(float(number) / (100 if percent else 1), 4) in known, number


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper", "colab"])
def test_the_costs_are_what_the_plan_prints(name):
    """`ivt build docs` writes them."""
    block = RESEARCHER.read_text().split(f"<!-- plan {name} -->\n")[1].split(f"<!-- /plan {name} -->")[0]
    assert block == f"```text\n{plan_text(get_profile(name), warn=False)}\n```\n"

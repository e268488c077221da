"""The README and the researcher's page: commands and files exist, values and costs are those of the code."""

import re
import shlex

import pytest
from conftest import numbers

from ivt_utils import cli
from ivt_utils.paper_scale.plan import plan_text
from ivt_utils.profiles import get_profile
from ivt_utils.runtime.files import ROOT
from ivt_utils.show.tables import paper_results

PAGES = [ROOT / "README.md", ROOT / "docs" / "researcher.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_one(page):
    text = page.read_text()
    said = re.findall(r"`((?:ivt|accelerate) [^`]+)`|^((?:ivt|accelerate) [^#\n]+)", text, re.MULTILINE)
    commands = [shlex.split((inline or line).split("#")[0]) for inline, line in said]
    assert len(commands) > 8
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
    files = re.findall(r"`((?:configs|data|docs|ivt_utils|tests)/[\w./]+)`", text)
    made = {"data/hub/paper/manifest.json"}
    assert links or files
    for name in links:
        assert (page.parent / name).exists(), name
    for name in set(files) - made:
        assert (ROOT / name).exists(), name


def test_the_researchers_values_are_the_profiles():
    rows = re.findall(r"`(\w+)` = (\S+?),?(?= |$)", PAGES[1].read_text(), re.MULTILINE)
    assert len(rows) >= 10
    for name, value in rows:
        assert str(getattr(get_profile("paper"), name)) == value.strip('"'), name


def test_what_the_paper_is_said_to_report_is_what_is_known_of_it():
    known = numbers(paper_results())
    cells = re.findall(r"\| the paper: ([^|]+) \|", PAGES[1].read_text())
    said = [number for cell in cells for number in re.findall(r"(\d*\.\d+)( %)?", cell)]
    assert len(said) >= 7
    for number, percent in said:
        assert round(float(number) / (100 if percent else 1), 4) in known, number


@pytest.mark.slow
@pytest.mark.parametrize("name", ["paper", "colab"])
def test_the_costs_are_what_the_plan_prints(name):
    """`ivt build docs` writes them."""
    block = PAGES[1].read_text().split(f"<!-- plan {name} -->\n")[1].split(f"<!-- /plan {name} -->")[0]
    assert block == f"```text\n{plan_text(get_profile(name), warn=False)}\n```\n"

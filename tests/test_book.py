"""The book: it builds offline and without a warning, its links, images and search work, also in a browser."""

import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from conftest import chromium

from ivt_utils import closer
from ivt_utils.controls import TRUTH
from ivt_utils.course import book
from ivt_utils.course.execute import find_notebooks
from ivt_utils.runtime.files import ROOT, read_json
from ivt_utils.runtime.store import REFERENCE
from ivt_utils.selection import ORACLE
from ivt_utils.show.results import CONSENSUS
from ivt_utils.show.tables import paper_results

NOTEBOOKS = [path.stem for path in find_notebooks(ROOT / "notebooks")]
START, EXPLORE, GLOSSARY = "docs/index.html", "docs/explore.html", "docs/glossary.html"
SHOTS = ROOT / "build" / "screenshots"
DARK_BELOW = 100  # of 255


class Page(HTMLParser):
    """The links, images, loaded files and ids of a page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.images, self.loaded, self.ids, self.path = [], [], [], set(), path
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"])
        if tag == "img":
            self.images.append(found)
        if tag == "link" and found.get("rel") not in ("canonical", "next", "prev", "search", "index"):
            self.loaded.append(found["href"])
        self.loaded += [found["src"]] if found.get("src") else []


@pytest.fixture(scope="module")
def built(slow, tmp_path_factory):
    """The folder of the book, built once, and the seconds it took."""
    folder = tmp_path_factory.mktemp("book")
    words = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-d", folder / "cache", "-c", "docs", "."]
    started = time.time()
    done = subprocess.run([*words, folder / "book"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "book", time.time() - started


@pytest.fixture(scope="module")
def pages(built):
    folder, _ = built
    return {str(path.relative_to(folder)): Page(path) for path in folder.rglob("*.html") if "_static" not in path.parts}


def test_the_book_is_built_in_time_and_without_a_warning(built):
    folder, seconds = built
    assert seconds < 180
    assert f'url={START}"' in (folder / "index.html").read_text()


def test_every_internal_link_and_anchor_resolves(built, pages):
    links = 0
    for page in pages.values():
        for link in page.links:
            assert not link.startswith("mailto:"), link  # Acc@0.5 is no address
            if re.match(r"https?:", link):
                continue
            name, _, anchor = unquote(link).partition("#")
            target = (page.path.parent / name).resolve() if name else page.path
            assert target.is_file() and target.is_relative_to(built[0]), (page.path.name, link)
            if anchor and target.suffix == ".html":
                assert anchor in pages[str(target.relative_to(built[0]))].ids, (page.path.name, link)
            links += 1
    assert links > 500


def test_every_image_has_alt_text(pages):
    images = [(name, image) for name, page in pages.items() for image in page.images]
    assert len(images) > 5
    for name, image in images:
        assert len(image.get("alt") or "") > 5 or "logo" in image.get("class", ""), (name, image)


def test_the_alt_text_of_an_output_is_kept(tmp_path):
    """The one the notebook carries, not a file name: MyST-NB alone drops it."""
    from docutils import nodes
    from myst_nb.core.render import MimeData

    space = {}
    exec((ROOT / "docs" / "conf.py").read_text(), space)
    data = MimeData("image/png", "", output_metadata={"image/png": {"alt": "Two boxes.", "width": 80}})
    assert space["alt_kept"](lambda self, data: [nodes.image()])(None, data)[0]["alt"] == "Two boxes."


def test_nothing_is_loaded_from_another_host(built, pages):
    for page in pages.values():
        for loaded in page.loaded:
            assert not re.match(r"(https?:)?//", loaded), (page.path.name, loaded)
            name = unquote(loaded).split("?")[0]
            assert loaded.startswith("data:") or (page.path.parent / name).resolve().is_file(), (page.path.name, loaded)
    for sheet in built[0].rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_everything_stands_in_the_contents(pages):
    links = {link.split("#")[0] for link in pages[START].links}
    wanted = [f"../notebooks/{name}.html" for name in NOTEBOOKS]
    wanted += [f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md") if path.stem != "index"]
    assert len(NOTEBOOKS) == 6 and {"glossary.html", "instructor.html"} < set(wanted)
    assert set(wanted) | {"../README.html"} <= links


def test_the_search_index_holds_the_terms(built):
    text = (built[0] / "searchindex.js").read_text()
    index = json.loads(text[text.index("{") : text.rindex("}") + 1])
    names = index["docnames"]
    words = [index[kind].get("advantag") for kind in ("terms", "titleterms")]  # the stem, in text and in headings
    found = {names[i] for word in words for i in _places(word)}
    assert {"docs/glossary", "notebooks/04_grpo"} <= found


def _places(entry):
    return [] if entry is None else [entry] if isinstance(entry, int) else entry


def test_the_glossary_links_to_notebooks_and_can_be_linked_to(pages):
    ids = pages[GLOSSARY].ids
    assert {f"term-{name}" for name in ("advantage", "IoU", "oracle-best-step", "mirage")} <= ids
    assert len([name for name in ids if name.startswith("term-")]) >= 50


def test_the_claims_are_those_of_the_results():
    """`ivt build docs` writes them."""
    head, *rows = book.claims(read_json(REFERENCE / "results.json"), paper_results())
    text = (ROOT / "docs" / "paper_and_us.md").read_text()
    block = text.split("<!-- claims -->\n")[1].split("<!-- /claims -->")[0]
    assert block == book.markdown_table(head, rows) + "\n" and len(rows) > 10


def test_where_the_fall_comes_from_is_what_the_reference_says():
    """The pages of claims and results and notebook 1 say in words what these six differences of Acc@0.5 are."""
    results = read_json(REFERENCE / "results.json")
    cost = {(row["words"], row["style"]): row["difference"] for row in results["second_turn"]}
    for words in ("feedback", "question"):
        bare, outlined, filled = (cost[words, style]["value"] for style in ("none", "outline", "filled"))
        assert bare > outlined > filled
    assert cost["feedback", "filled"]["high"] < -0.1
    assert abs(cost["feedback", "none"]["value"]) < -cost["feedback", "filled"]["value"] / 4
    assert cost["feedback", "filled"]["high"] < cost["question", "filled"]["low"]  # the words make a drawn box worse
    found = {(row["name"], row["metric"]): row for row in results["differences"]}
    assert found["base_ivt_bare final - base_single", "acc50"]["high"] < 0  # at step 2 the bare image loses as well


def test_what_the_results_page_says_of_sft_and_grpo_is_what_the_trainings_say():
    results = read_json(REFERENCE / "results.json")
    found = {(row["name"], row["metric"]): row for row in results["seeds"]}
    assert all(len(row["seeds"]) == 5 for row in found.values())
    final = found["sft_ivt final - sft_ivt step 0", "acc50"]
    assert final["low"] < 0 < final["high"]  # the final step cannot be told from step 0
    assert found["sft_ivt final - sft_ivt step 0", "miou"]["low"] > 0  # and mean IoU rises
    assert found["sft_ivt oracle best step - base_single", "oracle_acc50"]["low"] > 0
    rule, oracle = f"sft_ivt {CONSENSUS} - sft_ivt step 0", "sft_ivt oracle best step - sft_ivt step 0"
    assert 0 < found[rule, "acc50"]["low"] < found[rule, "acc50"]["value"] < found[oracle, "oracle_acc50"]["value"]
    assert 0 < found[f"sft_ivt {CONSENSUS} - base_single", "acc50"]["low"] < 0.005  # just above the single shot
    taught = f"sft_ivt final - {closer.TAUGHT}"
    assert found[taught, "acc50"]["high"] < 0 and found[taught, "miou"]["high"] < 0  # a single answer does better
    assert (
        found[rule.replace("_ivt", "_ivt_long"), "acc50"]["low"]
        < 0
        < found[oracle.replace("_ivt", "_ivt_long"), "oracle_acc50"]["low"]
    )  # not so in the loop of five
    assert found["sft_ivt_long final - sft_ivt_long step 0", "acc50"]["high"] < -0.2
    lost = {name: found[name, "degradation_per_step"] for name in ("sft_ivt", "sft_ivt_long", "sft_keep_ivt_long")}
    assert lost["sft_ivt"]["high"] < 0 < min(lost[name]["low"] for name in ("sft_ivt_long", "sft_keep_ivt_long"))
    mended = "sft_grpo_ivt_long degradation - sft_ivt_long degradation"
    for name in (mended, mended.replace("sft_", "sft_keep_")):  # a step loses less after GRPO in the long loop
        assert found[name, "degradation_per_step"]["high"] < 0
    loss = {
        name: found[f"{name}_ivt_long", "degradation_per_step"]["value"]
        for name in ("sft", "sft_grpo", "sft_keep", "sft_keep_grpo")
    }
    assert 0.4 < loss["sft_grpo"] / loss["sft"] < 0.6  # about half of the loss goes
    assert loss["sft_keep_grpo"] / loss["sft_keep"] < 0.25  # and here most of it
    part = "sft_grpo_ivt_long degradation - a fifth of sft_ivt_long degradation"
    assert found[part, "degradation_per_step"]["low"] > 0  # more than the paper's fifth is left
    assert found["sft_grpo_ivt", "share_stay"]["high"] < 0.5  # nor do most samples stay
    assert found["sft_keep_grpo_ivt_long", "share_stay"]["low"] > 0.5
    for metric in ("acc50", "miou"):  # in the loop of two it ends a little worse
        assert found["sft_grpo_ivt final - sft_ivt final", metric]["high"] < 0
    rules = [row for row in results["methods"]["sft_ivt"]["rules"] if row["rule"] not in (ORACLE, "step 0")]
    assert all(row["difference"]["low"] <= 0 for row in rules)
    assert results["learning_curve"]["grpo"]["difference"]["low"] > 0
    looks = {row["name"]: row["acc50"]["low"] for row in results["closer"] if row["seed"] == "mean"}
    assert all(looks[name] > 0 for name in closer.GAINS) and looks[f"{closer.CLOSER} - {closer.TAUGHT}"] < 0
    assert looks[f"{closer.SEEN} - {closer.FIRST}"] > 0
    gains = {row["name"]: row for row in results["closer"] if row["seed"] == "mean"}
    pixels, first = gains[f"{closer.CLOSER} - {closer.SEEN}"], gains[f"{closer.FIRST} - {closer.BASE}"]
    assert -0.01 < pixels["acc50"]["low"] < 0 < pixels["acc50"]["high"] < 0.01  # "within one point"
    assert 0 < pixels["miou"]["low"] < pixels["miou"]["high"] < 0.01  # "a little more exact"
    assert first["acc50"]["high"] < 0  # its own first answer is a little worse than the base student's


@pytest.mark.parametrize(("low", "high", "said"), [(0.1, 0.2, "seen"), (-0.2, -0.1, "not seen"), (-0.1, 0.1, "open")])
def test_a_claim_is_judged_by_its_interval(low, high, said):
    results = read_json(REFERENCE / "results.json")
    for row in (*results["differences"], *results["seeds"]):
        if row["name"] == "grpo_single - base_single" and row["metric"] == "acc50":
            row |= {"low": low, "high": high}
    rows = {row[0]: row[3] for row in book.claims(results, paper_results())}
    assert rows["GRPO without the loop ends above a single shot"] == said


@pytest.mark.parametrize(
    ("presence", "quality", "said"),
    [
        ((-0.2, -0.1), (-0.01, 0.01), "seen"),
        ((-0.2, -0.1), (-0.1, 0.1), "open"),
        ((-0.1, 0.1), (-0.01, 0.01), "open"),
        ((-0.2, -0.1), (0.1, 0.2), "not seen"),
        ((-0.1, 0.1), (-0.2, -0.1), "not seen"),
    ],
)
def test_presence_not_quality_is_judged_by_paired_differences(presence, quality, said):
    results = read_json(REFERENCE / "results.json")
    limits = {"no box": presence, "random box": (-0.01, 0.01), TRUTH: quality}
    for row in results["methods"]["sft_ivt"]["controls"]:
        low, high = limits.get(row["control"], (0, 0))
        row["difference"] = {"value": (low + high) / 2, "low": low, "high": high, "n": 505}
    *_, (claim, _, measured, judged, _) = book.claims(results, paper_results())
    assert claim.startswith("The loop reacts to the presence") and judged == said and "no box" in measured


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-0.03, 0.01, "seen"),
        (-0.03, 0.03, "open"),
        (0.01, 0.03, "not seen"),
    ],
)
def test_that_no_rule_beats_step_0_wants_every_rule_below_a_margin(low, high, said):
    results = read_json(REFERENCE / "results.json")
    for row in results["methods"]["sft_ivt"]["rules"]:
        row["difference"] = {"value": -0.01, "low": -0.02, "high": -0.0, "n": 505}
    row["difference"] = {"value": 0.2, "low": 0.1, "high": 0.3, "n": 505}  # the oracle's, which does not count
    results["methods"]["sft_ivt"]["rules"][1]["difference"] |= {"low": low, "high": high}
    for row in results["seeds"]:
        if row["name"] == f"sft_ivt {CONSENSUS} - sft_ivt step 0":
            assert row["low"] > 0  # so the page of results says that a rule beats step 0 over the trainings
            row |= {"low": -0.02, "high": 0.0}
    (judged,) = [line[3] for line in book.claims(results, paper_results()) if line[0].startswith("No rule")]
    assert judged == said


def test_the_explorer_is_small_and_its_ious_are_right(built):
    from ivt_utils.boxes import iou

    script = (built[0] / "_static" / "explorer_samples.js").read_text()
    assert len(script) < 1_500_000
    found = json.loads(script.removeprefix("window.IVT_EXPLORER = ").rstrip(";\n"))
    assert len(found["samples"]) >= 24
    for sample in found["samples"][::8]:
        for answers in sample["answers"].values():
            for step in answers:
                assert step["iou"] == pytest.approx(iou(step["box"], sample["truth"]), abs=0.011)


# ------------------------------------------------------------------------------------------------ in a browser
@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def opened(browser, built):
    """Open a page of the book as a file: `opened(name, width)`; whatever goes wrong in it is kept in `.wrong`."""
    made = []

    def open_page(name, width=1440, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        made.append(context)
        page = context.new_page()
        page.wrong = []
        page.on("console", lambda said: page.wrong.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.on("request", lambda sent: page.wrong.append(sent.url) if sent.url.startswith("http") else None)
        name, mark, query = name.partition("?")
        page.goto((built[0] / name).as_uri() + mark + query)
        return page

    yield open_page
    for context in made:
        context.close()


def brightness(page) -> float:
    return page.evaluate("""() => {
      const found = getComputedStyle(document.body).backgroundColor.match(/[\\d.]+/g).slice(0, 3).map(Number);
      return found.reduce((a, b) => a + b) / 3; }""")


def test_no_page_has_an_error_or_is_wider_than_a_phone(opened, pages):
    page = opened(START, width=390)
    for name in pages.keys() - {"index.html"}:  # it leads elsewhere at once
        page.goto(pages[name].path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
        assert not page.wrong, (name, page.wrong)


def test_the_root_leads_to_the_start_page(opened):
    page = opened("index.html")
    page.wait_for_url(f"**/{START}")
    assert page.locator("article h1").inner_text().startswith("Iterative Visual Thinking")


def test_the_search_finds_pages_without_a_server(opened):
    page = opened("search.html?q=advantage")
    page.wait_for_selector("#search-results ul.search li")
    found = page.locator("#search-results ul.search li a").all_inner_texts()
    assert any("GRPO" in text for text in found) and not page.wrong


def test_the_dark_mode_is_dark_and_figures_stay_on_white(opened):
    page = opened(START, color_scheme="light")
    assert brightness(page) > 200
    page.locator(".theme-switch-button:visible").click()
    page.locator(".theme-change-button[data-mode=dark]:visible").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark" and brightness(page) < DARK_BELOW
    figure = page.locator("article img").first
    assert figure.evaluate("image => getComputedStyle(image).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.wrong


def test_the_menu_opens_on_a_phone(opened):
    page = opened(START, width=390)
    link = page.locator("dialog[open] a", has_text="The mirage")
    assert not link.count()
    page.locator(".primary-toggle:visible").click()
    link.click()
    page.wait_for_url("**/06_mirage.html")


def test_hints_unfold_and_code_can_be_copied(opened):
    page = opened(f"notebooks/{NOTEBOOKS[0]}.html", permissions=["clipboard-read", "clipboard-write"])
    hint = page.locator("article details:not(.code-fold)").first
    inside = hint.locator("p").first
    assert not inside.is_visible()
    hint.locator("summary").click()
    assert inside.is_visible()
    page.locator("[open] .copy-code").first.click()
    page.wait_for_function("document.querySelector('[open] .copy-code').textContent == 'Copied'")
    assert len(page.evaluate("navigator.clipboard.readText()")) > 10 and not page.wrong


def test_the_set_up_is_folded_and_every_code_cell_can_be(opened):
    """Without a script each alone, and with it all at once."""
    page = opened(f"notebooks/{NOTEBOOKS[0]}.html", java_script_enabled=False)
    folds = page.locator(".cell > .code-fold")
    assert folds.count() == page.locator(".cell_input").count() > 10
    assert (
        page.locator(".code-fold:not([open])").count() == page.locator(".tag_setup .code-fold:not([open])").count() == 1
    )
    folds.nth(0).locator("summary").click()
    folds.nth(1).locator("summary").click()
    assert page.locator(".code-fold:not([open])").count() == 1
    assert folds.nth(0).locator(".cell_input").is_visible() and not folds.nth(1).locator(".cell_input").is_visible()
    page = opened(f"notebooks/{NOTEBOOKS[0]}.html")
    page.locator(".fold-all").click()
    assert not page.locator(".code-fold[open]").count() and page.locator(".cell_output").first.is_visible()
    page.locator(".fold-all", has_text="Show the code").click()
    assert page.locator(".code-fold:not([open])").count() == 1 and not page.wrong


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_figures_words_stay_legible_on_a_phone(opened, name):
    """A figure is hardly made smaller: what is too wide scrolls in its own box, and says so, and takes the focus."""
    page = opened(f"notebooks/{name}.html", width=390)
    page.wait_for_load_state("load")
    shown = page.locator(".cell_output img").evaluate_all(
        """images => images.map(image => {
          const box = image.closest('.cell_output'), wide = image.getBoundingClientRect().width;
          return [wide, image.naturalWidth, box.clientWidth, box.getAttribute('role'), box.tabIndex];
        })"""
    )
    assert shown
    for wide, natural, box, role, index in shown:
        assert wide >= min(0.8 * natural * 85 / 120, 800), (wide, natural)  # as wide as `show` wants it
        assert wide <= box or (role == "region" and index == 0)


def test_the_explorer_works_with_the_keyboard_and_its_alt_text_follows(opened):
    page = opened(EXPLORE, width=390)
    alt = page.locator(".explorer-picture img")
    told = [alt.get_attribute("alt")]
    page.locator("#ex-step").focus()
    page.keyboard.press("ArrowRight")
    told.append(alt.get_attribute("alt"))
    page.locator("#ex-on").focus()
    page.keyboard.press("Enter")
    told.append(alt.get_attribute("alt"))
    page.locator("#ex-method").select_option("base_ivt")
    page.locator("#ex-order").select_option("most degraded first")
    told.append(alt.get_attribute("alt"))
    assert len(set(told)) == 4 and "step 1" in told[1] and all("true box" in text for text in told)
    ious = page.locator(".explorer-steps li").all_inner_texts()
    assert len(ious) == 3 and not page.wrong


@pytest.mark.parametrize(("width", "theme"), [(390, "light"), (1440, "dark")])
def test_screenshots_for_the_eye(opened, width, theme):
    SHOTS.mkdir(parents=True, exist_ok=True)
    names = {"start": START, "explore": EXPLORE, "notebook": f"notebooks/{NOTEBOOKS[0]}.html"}
    for word, name in names.items():
        page = opened(name, width=width, color_scheme=theme)
        page.wait_for_load_state("load")
        assert (brightness(page) < DARK_BELOW) == (theme == "dark")
        path = SHOTS / f"book_{word}_{width}_{theme}.png"
        page.screenshot(path=path, full_page=word in ("start", "explore"))
        assert path.stat().st_size > 5_000

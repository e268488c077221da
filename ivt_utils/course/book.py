"""What the pages show of the reference results (`ivt build docs`), and the explorer's samples (`make book`).

The rest of the book is Markdown in `docs/`, the notebooks and `docs/conf.py`.
"""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from ivt_utils.controls import TRUTH
from ivt_utils.course.guide import write_start_page
from ivt_utils.exercises import LESSONS
from ivt_utils.methods import method_label
from ivt_utils.metrics import exact_limits, iou_matrix, side
from ivt_utils.overlay import load_image
from ivt_utils.records import BENCHMARK
from ivt_utils.runtime.files import ROOT, read_json
from ivt_utils.runtime.store import REFERENCE
from ivt_utils.runtime.text import markdown_table, number, write_between
from ivt_utils.selection import ORACLE, best_rule
from ivt_utils.show.diagrams import write_svg
from ivt_utils.show.figures import course_in_one_picture, save_figure
from ivt_utils.show.reading import read_rollouts
from ivt_utils.show.report import write_tables
from ivt_utils.show.results import CONSENSUS
from ivt_utils.show.tables import paper_results
from ivt_utils.show.targets import by_name

CLAIMS, RESULTS, PICTURE = "docs/paper_and_us.md", "docs/results.md", "docs/course_in_one_picture.png"
DRAWN = {"docs/index.md": ("loop", "trained", "group"), "docs/explore.md": ("oracle",)}  # the diagrams of the pages
EXPLORED = ("base_ivt", "sft_ivt", "sft_grpo_ivt")
SEEN, NOT_SEEN, OPEN = "seen", "not seen", "open"
WEAK = 0.5  # a correlation below it
MARGIN = 0.02  # of Acc@0.5: two answers are called equal only where the whole interval of their difference lies within
HEAD = ["claim of the paper", "the paper", "measured here", "seen here?", "notebook"]


def claims(results: dict, paper: dict) -> list[list[str]]:
    """Return the table of claims as a grid of text, its head first: the paper's number, ours, whether ours show it."""
    folder = {stem[:2]: f"{stem}.ipynb" for stem in LESSONS}
    rows = _judged(results, paper)
    return [HEAD, *([*row[1:5], f"[{row[5]}](../notebooks/{folder[f'0{row[5]}']})"] for row in rows)]


def reproduced(results: dict, paper: dict) -> str:
    """Return the result in short, and which claims of the paper are seen here, not seen or open, for the README."""
    levels = by_name(results["seeds"])  # means of several trainings, where there are several
    ours = {name: method["metrics"] for name, method in results["methods"].items()}
    first, second, *_, last = (100 * step["acc50"]["value"] for step in ours["base_ivt"]["per_step"])
    sft, grpo = (
        100 * levels.get((name, "acc50"), ours[name]["final"]["acc50"])["value"] for name in ("sft_ivt", "sft_grpo_ivt")
    )
    short = (
        f"At first sight the untrained student finds {first:.1f} % of the objects. Shown its own box and asked again, "
        f"it finds {second:.1f} %, and {last:.1f} % when it is asked once more. After SFT its last answer is right in "
        f"{sft:.1f} % of the cases, and after SFT and GRPO in {grpo:.1f} %, in the mean of the trainings. What does "
        "that say of the paper's claims? Each is judged by the interval of our own result:"
    )
    lines, rows = [fill(short, 120, break_on_hyphens=False), ""], _judged(results, paper)
    for head, verdict in (("Reproduced", SEEN), ("Not reproduced", NOT_SEEN), ("Left open by our intervals", OPEN)):
        if found := "; that ".join(claim for claim, *_, judged, _ in rows if judged == verdict):
            lines.append(
                fill(f"- [{head}]({CLAIMS}): that {found}.", 120, subsequent_indent="  ", break_on_hyphens=False)
            )
    return "\n".join(lines) + "\n"


def _judged(results: dict, paper: dict) -> list[tuple]:
    """Return of each claim: the claim in a few words, in full, the paper's number, ours, the verdict, the notebook."""
    theirs, ours = paper["methods"], {name: method["metrics"] for name, method in results["methods"].items()}
    compared = by_name((*results["differences"], *results["seeds"]))  # of several trainings, where there are several
    slices, sft, grpo = paper["slices"], ours["sft_ivt"], ours["sft_grpo_ivt"]
    rules = [row for row in results["methods"]["sft_ivt"]["rules"] if row["rule"] not in (ORACLE, "step 0")]
    consensus = compared.get((f"sft_ivt {CONSENSUS} - sft_ivt step 0", "acc50"))  # a rule, over several trainings
    control_differences = {row["control"]: row["difference"] for row in results["methods"]["sft_ivt"]["controls"]}
    r = results["methods"]["sft_ivt"]["calibration"][0]["fits"]["r"]
    presence, quality = (
        control_differences["no box"],
        {"a true box (oracle)": control_differences[TRUTH], "a random box": control_differences["random box"]},
    )

    def points(name, metric="acc50"):
        return compared[name, metric]

    def level(name, metric):
        return compared.get((name, metric)) or ours[name][metric]

    def said(*names):
        return " and ".join(f"{method_label(n)} {_cell(theirs[n]['acc50'], 'share')}" for n in names)

    harm = points("base_ivt final - base_single")
    gain = points("sft_ivt oracle best step - base_single", "oracle_acc50")
    final, alone = points("sft_grpo_ivt final - base_single"), points("grpo_single - base_single")
    loss, stay = level("sft_ivt", "degradation_per_step"), level("sft_grpo_ivt", "share_stay")
    mended = points("sft_grpo_ivt_long degradation - sft_ivt_long degradation", "degradation_per_step")
    rule, equal = best_rule(rules), _none(quality.values())
    oracle = f"{_cell(theirs['sft_ivt']['oracle_acc50'], 'share')} (oracle) and {said('base_single')}"
    steps = [theirs[name]["degradation_per_step"] for name in ("sft_ivt", "sft_grpo_ivt")]
    return [
        (
            "looking again without training does harm",
            "Looking again without training does harm (Acc@0.5)",
            said("base_single", "base_ivt"),
            _cell(harm, "points"),
            _sign(harm, -1),
            1,
        ),
        (
            "after SFT an oracle, which chooses the best step by the truth, gains over a single answer",
            "After SFT the best of the steps, chosen with the truth, lies above a single shot: an oracle's gain",
            oracle,
            _cell(gain, "points"),
            _sign(gain),
            3,
        ),
        (
            "after SFT a step of the loop loses IoU",
            "After SFT a step of the loop loses IoU, on average",
            _cell(steps[0], "IoU"),
            _cell(loss, "IoU"),
            _sign(loss),
            3,
        ),
        (
            "after SFT most samples end worse than they began",
            "After SFT most samples end worse than they began",
            _cell(theirs["sft_ivt"]["share_degrade"], "share"),
            _cell(sft["share_degrade"], "share"),
            _sign(sft["share_degrade"], zero=0.5),
            3,
        ),
        (
            "over five refinements GRPO makes the loss per step smaller",
            "GRPO makes the loss per step smaller: GRPO's minus SFT's (here: over five refinements)",
            f"{_cell(steps[1], 'IoU')} minus {_cell(steps[0], 'IoU')}",
            _cell(mended, "IoU"),
            _sign(mended, -1),
            4,
        ),
        (
            "after GRPO most samples keep the IoU of their first answer",
            "After GRPO most samples keep the IoU of step 0",
            _cell(theirs["sft_grpo_ivt"]["share_stay"], "share"),
            _cell(stay, "share"),
            _sign(stay, zero=0.5),
            4,
        ),
        (
            "after GRPO the loop ends above a single answer of the untrained student",
            "After GRPO the loop ends above a single shot",
            said("base_single", "sft_grpo_ivt"),
            _cell(final, "points"),
            _sign(final),
            4,
        ),
        (
            "a single answer after GRPO without a loop beats one of the untrained student",
            "GRPO without the loop ends above a single shot",
            said("base_single", "grpo_single"),
            _cell(alone, "points"),
            _sign(alone),
            4,
        ),
        (
            "samples with a bad first answer gain IoU in the loop",
            "Hard samples gain IoU from step 0 to the final step (here: SFT + GRPO)",
            _way(slices["hard"]),
            _cell(grpo["hard"]["difference"], "IoU"),
            _sign(grpo["hard"]["difference"]),
            4,
        ),
        (
            "samples with a good first answer lose IoU in the loop",
            "Easy samples lose IoU from step 0 to the final step (here: SFT + GRPO)",
            _way(slices["easy"]),
            _cell(grpo["easy"]["difference"], "IoU"),
            _sign(grpo["easy"]["difference"], -1),
            4,
        ),
        (
            "no rule for choosing a step beats the first answer, unless it knows the truth",
            "No rule without labels beats step 0 at Acc@0.5 (here: after SFT, the best rule against step 0)",
            f"best rule {_cell(theirs['sft_ivt']['best_rule_acc50'], 'share')} and {said('base_single')}",
            _cell(rule["difference"], "points") + (f"; {CONSENSUS} {_cell(consensus, 'points')}" if consensus else ""),
            _none([*(row["difference"] for row in rules), *filter(None, [consensus])], both=False),
            6,
        ),
        (
            "the model, asked whether its box fits, hardly tells right from wrong",
            "The model's own verification hardly tells right from wrong: its correlation with correctness",
            _cell(paper["self_verification"]["correlation_with_correctness"], "r"),
            _cell(r, "r"),
            SEEN if r["high"] < WEAK else NOT_SEEN,
            6,
        ),
        (
            "the loop reacts to the presence of a box and not to how good it is",
            "The loop reacts to the presence of a box, not to how good it is (here: next Acc@0.5 after no box, a true "
            "and a random one, each against the own box)",
            "in words only",
            "; ".join(f"{name} {_cell(cell, 'points')}" for name, cell in {"no box": presence, **quality}.items()),
            OPEN if side(presence) == "open" and equal == SEEN else equal,
            6,
        ),
    ]


def _cell(cell: Mapping[str, Any], kind: str) -> str:
    scale, digits, unit = {"share": (100, 1, " %"), "points": (100, 1, " points")}.get(kind, (1, 3, ""))
    unit = f" {kind}" if kind == "IoU" else unit
    trainings = f" ({len(cell['seeds'])} trainings)" if "seeds" in cell else ""
    return number(cell, scale, digits) + unit + trainings + ("\u2020" if cell.get("step") == "not stated" else "")


def _way(cells: dict) -> str:
    return f"{_cell(cells['first'], 'IoU')} to {_cell(cells['final'], 'IoU')}"


def _sign(cell: Mapping[str, Any], sign: int = 1, zero: float = 0) -> str:
    """Return whether the interval lies on the claimed side of `zero`, on the other one, or on both (or is missing)."""
    return {"open": OPEN, "above" if sign > 0 else "below": SEEN}.get(side(cell, zero), NOT_SEEN)


def _none(cells, both: bool = True) -> str:
    """Return whether no difference lies above 0 (`both`: or below): seen where all are less than `MARGIN` by interval.

    These are one-sided tests at 2.5 %, two of them a difference where both sides count. Where no sample differs, the
    limit is that of a share of none.
    """
    sides = []
    for cell in cells:
        if cell["low"] == cell["high"] == 0:
            _, most = exact_limits(0, cell["n"], cell["n"])
            cell = cell | {"low": -most, "high": most}
        sides.append((side(cell), side(cell, MARGIN), side(cell, -MARGIN)))
    if any(zero == "above" or both and zero == "below" for zero, _, _ in sides):
        return NOT_SEEN
    return SEEN if all(top == "below" and (bottom == "above" or not both) for _, top, bottom in sides) else OPEN


def write_pages(root: Path = ROOT) -> Path:
    """Return the page of results, after writing all that the project's pages show of the reference results.

    These are the tables of that page, the table of claims, and the README's picture and claims, which the book's first
    page has as well. The drawn diagrams are written anew with them.
    """
    results, paper, readme = read_json(REFERENCE / "results.json"), paper_results(), root / "README.md"
    head, *rows = claims(results, paper)
    write_between(root / CLAIMS, "claims", f"{markdown_table(head, rows)}\n")
    write_tables(root / RESULTS, results, paper)
    write_between(readme, "claims", reproduced(results, paper))
    figure = picture(results, paper)
    save_figure(figure, root / PICTURE)
    write_between(readme, "picture", _image(figure.get_label(), PICTURE))
    write_start_page(root)
    for page, names in DRAWN.items():
        for name in names:
            alt = write_svg(name, root / "docs" / "diagrams")
            write_between(root / page, name, _image(alt, f"diagrams/{name}.svg"))
    return root / RESULTS


def _image(alt: str, path: str) -> str:
    return fill(f"![{alt}]({path})", 120, break_on_hyphens=False) + "\n"


def picture(results: dict, paper: dict):
    """Return the README's figure, about the test sample on which the reference shows the story most clearly.

    The untrained student is right at step 0 and wrong later, the SFT student right at every step, and the least of
    these IoUs lies as far as possible above that of the untrained student's second answer. So the truth chooses it.
    """
    from pyarrow import parquet

    untrained, trained = (read_rollouts(REFERENCE / "rollouts" / f"{name}.jsonl") for name in ("base_ivt", "sft_ivt"))
    before, after = iou_matrix(untrained), iou_matrix(trained)
    right = np.minimum(before[:, 0], after.min(axis=1))
    i = int(np.where(before[:, 1:].max(axis=1) < 0.5, right - before[:, 1], -1).argmax())
    row = parquet.read_table(BENCHMARK / "test.parquet", columns=["id", "image"]).slice(i, 1).to_pylist()[0]
    return course_in_one_picture(results, paper, load_image(row["image"]["bytes"]), untrained[i], trained[i])


def explorer_samples(each: int = 6) -> dict:
    """Return {"samples", "methods", "of"}: what the book's explorer shows of the reference's test answers.

    Of every method the samples that the loop improves most, harms most and leaves worst, `each` of them (chosen with
    the truth, as its page says), and as many as they come. An image is a data URI; boxes are 0..1000.
    """
    from pyarrow import parquet

    rollouts = {name: read_rollouts(REFERENCE / "rollouts" / f"{name}.jsonl") for name in EXPLORED}
    ious = {name: iou_matrix(answered) for name, answered in rollouts.items()}
    picked = dict.fromkeys(range(each))
    for method_ious in ious.values():
        change = (method_ious[:, -1] - method_ious[:, 0]).argsort(kind="stable").tolist()
        picked |= dict.fromkeys(
            change[:each] + change[-each:] + method_ious[:, -1].argsort(kind="stable").tolist()[:each]
        )
    table = parquet.read_table(BENCHMARK / "test.parquet", columns=["id", "image"]).to_pylist()
    images = {row["id"]: "data:image/jpeg;base64," + base64.b64encode(row["image"]["bytes"]).decode() for row in table}
    samples = []
    for i in sorted(picked):
        record = rollouts[EXPLORED[0]][i]
        answers = {
            name: [
                {**step, "iou": round(float(value), 2)}
                for step, value in zip(answered[i]["steps"], ious[name][i], strict=True)
            ]
            for name, answered in rollouts.items()
        }
        samples.append(
            {
                "expression": record["expression"],
                "truth": [round(v) for v in record["truth"]],
                "image": images[record["id"]],
                "answers": answers,
            }
        )
    return {"samples": samples, "methods": {name: method_label(name) for name in EXPLORED}, "of": len(table)}


def write_explorer(path: Path) -> None:
    """Write the explorer's samples as a script, for a page opened from a file may not read JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"window.IVT_EXPLORER = {json.dumps(explorer_samples(), ensure_ascii=False)};\n", encoding="utf-8")

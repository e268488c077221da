"""The report: our numbers beside the paper's, as text, Markdown and figures (issue part 6).

A method that was not run says "not run"; a number of the paper that is not known here says "not known".
"""

import json
import os
from pathlib import Path

from ivt_utils.methods import METHODS, method_label
from ivt_utils.runtime import files, store
from ivt_utils.runtime.text import aligned, markdown_table, number, write_between
from ivt_utils.show.figures import iou_per_step, paper_and_ours, save_figure
from ivt_utils.show.reading import results_from
from ivt_utils.show.results import build_results, changed
from ivt_utils.show.tables import (
    CLOSER_NOTE,
    SCALE_TITLE,
    SECOND_TURN_TITLE,
    UNITS,
    _goals,
    closer_table,
    mirage_tables,
    notes,
    paper_results,
    scale_table,
    second_turn_table,
    seconds_table,
    seeds_tables,
    table,
    titled_tables,
    to_markdown,
    to_text,
)
from ivt_utils.show.targets import targets

__all__ = [
    "build_results",
    "iou_per_step",
    "paper_and_ours",
    "paper_results",
    "report_from",
    "summary",
    "table",
    "targets",
    "to_markdown",
    "to_text",
]


def summary(results: dict, paper: dict) -> str:
    """Return the whole report as text: tables, paired differences, targets."""
    differences = [["paired difference", "score", "value", "samples"]]
    for d in results["differences"]:
        scale, digits, unit = UNITS["difference" if d["metric"].endswith("acc50") else "ratio"]
        differences.append([d["name"], d["metric"], number(d, scale, digits) + unit, str(d["n"])])
    for name, curve in results.get("learning_curve", {}).items():
        gain, label = curve["difference"], f"{name}: learning curve, last quarter - first"
        differences.append([label, "miou", number(gain, 1, 3), str(gain["n"])])
    head = f"Profile {results['profile']}, seed {results['seed']}, {results['n_test']} test samples"
    if engine := results.get("engine"):
        head += f", {engine}"
    seeds = [f"{title}\n{aligned(grid)}" for title, grid in seeds_tables(results["seeds"]).items()]
    if sizes := results.get("batch_sizes"):
        told = "; ".join(f"{size}: {', '.join(names)}" for size, names in sizes.items())
        head += (
            f"\nThe stages were answered in batches of several sizes ({told}). In 16 bits that alone changes texts: "
            "compare stages of one batch_size only, or delete the others' files in rollouts/ and run them again."
        )
    parts = [head, *seeds, to_text(table(results, paper)), aligned(differences), aligned(_goals(results))]
    for name, method in results["methods"].items():
        for grid in mirage_tables(method):
            parts.append(f"{method_label(name)}\n{aligned(grid)}")
    parts += [f"{SECOND_TURN_TITLE}\n{aligned(second_turn_table(results.get('second_turn', [])))}"]
    parts += [aligned(closer_table(results["closer"])), CLOSER_NOTE]
    if results["profile"] != "paper":
        parts.append(f"{SCALE_TITLE}\n{aligned(scale_table())}")
    return "\n\n".join(parts)


def report_from(root: Path, *, names=tuple(METHODS), versions=None, commit=None, paper=None) -> dict:
    """Return the results of a run, recomputed from its raw predictions, after printing the report.

    Writes <root>/results.json and two figures in <root>/figures/, unless the folder may only be read or is the
    reference. `names`: the methods to look for in <root>/rollouts/. Raised as in `results_from`.
    """
    root = Path(root)
    if versions is None:
        versions, commit = store.versions(), store.commit()
    results = results_from(root, versions=versions, commit=commit, names=names)
    paper = paper or paper_results()
    print(summary(results, paper))
    if spent := seconds_table(store.finished_stages(root)):
        print(f"\nWhere the time went\n{aligned(spent)}")
    if root == store.REFERENCE or not os.access(root, os.W_OK):
        print(f"\nRecomputed from {root}; nothing was written there. {_compared(root, results)}")
        return results
    print(f"\n{_compared(root, results)}")
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    files.write_text(root / "results.json", text + "\n")
    os.environ.setdefault("MPLBACKEND", "Agg")  # no display needed; a notebook has set its own
    figures = {"iou_per_step": iou_per_step(results), "paper_and_ours": paper_and_ours(results, paper)}
    for name, figure in figures.items():
        save_figure(figure, root / "figures" / f"{name}.png")
    print(f"\nResults: {root / 'results.json'}\nFigures: {root / 'figures'}")
    return results


def _compared(root: Path, results: dict) -> str:
    """Return how many values of the results.json in a run differ from those computed anew, and some of them."""
    path = root / "results.json"
    if not path.exists():
        return "There was no results.json to compare with."
    differing = changed(files.read_json(path), json.loads(json.dumps(results)))
    lines = [line[:200] for line in differing[:10]]
    return "\n".join([f"{len(differing)} values differ from its results.json.", *lines])


def write_tables(page: Path, results: dict, paper: dict) -> None:
    """Write the tables of `results` and of the paper's scale between their marks of a Markdown page.

    Those of single trainings are folded away.
    """
    parts = {"Targets of the course": _goals(results), **seeds_tables(results["seeds"])}
    blocks = [f"### {title}\n\n{markdown_table(head, rows)}" for title, (head, *rows) in parts.items()]
    alone = "\n\n".join(titled_tables(table(results, paper)))
    blocks += [notes(), _folded(f"One training of each method, with seed {results['seed']}", alone)]
    head, *turns = second_turn_table(results.get("second_turn", []))
    blocks.append(f"### {SECOND_TURN_TITLE}\n\n{markdown_table(head, turns)}")
    head, *looks = closer_table(results["closer"])
    single = [row for row in looks if row[1].isdigit()]
    means = [row for row in looks if row not in single]
    blocks.append(f"### A closer look: ours, not the paper's\n\n{markdown_table(head, means)}")
    blocks += [_folded("Each training by itself", markdown_table(head, single))] * bool(single)
    blocks.append(f"- {CLOSER_NOTE}")
    write_between(page, "tables", "\n\n".join(blocks) + "\n")
    head, *rows = scale_table()
    nobody = (
        "Nobody has run the course at the paper's own scale yet. `ivt run --profile paper` does so, and\n"
        "[For the researcher](researcher.md) says what that needs and costs. Its results will stand here."
    )
    found = f"### {SCALE_TITLE}\n\n{markdown_table(head, rows)}"
    write_between(page, "scale", (nobody if rows[0][0].startswith("not run") else found) + "\n")


def _folded(summary: str, content: str) -> str:
    """Return Markdown that a reader unfolds by a click on its summary."""
    return f"<details>\n<summary>{summary}</summary>\n\n{content}\n\n</details>"

"""Our numbers beside the paper's, as grids of text.

A method that was not run says "not run"; a number of the paper that is not known here says "not known"."""

from pathlib import Path

from ivt_utils.closer import GAINS
from ivt_utils.methods import ASKED, METHODS, SINGLE, longer, method_label
from ivt_utils.runtime import files
from ivt_utils.runtime.text import aligned, markdown_table, number
from ivt_utils.selection import ORACLE, best_rule
from ivt_utils.show.targets import by_name, targets

PAPER = files.DATA / "paper_results.json"
SCALE = files.ROOT / "runs" / "paper" / "results.json"
SCALE_TITLE = "The paper's own scale: profile `paper`, Qwen3-VL-4B on the real sets"
RESULT_COLUMNS = (
    ("acc50", "Acc@0.5 %", 100, 1),
    ("acc70", "Acc@0.7 %", 100, 1),
    ("acc90", "Acc@0.9 %", 100, 1),
    ("miou", "mean IoU", 1, 3),
)
LOOP_COLUMNS = (
    ("step0", "step 0 Acc@0.5 %", 100, 1),
    ("best_rule_acc50", "best rule Acc@0.5 %", 100, 1),
    ("oracle_acc50", "oracle Acc@0.5 %", 100, 1),
    ("degradation_per_step", "IoU lost per step", 1, 3),
    ("share_degrade", "degrade %", 100, 1),
    ("share_stay", "IoU kept %", 100, 1),
)
STEP_COLUMNS = tuple((f"step{t}", f"step {t}", 100, 1) for t in range(6))
TABLES = (
    ("Result: the final step", RESULT_COLUMNS),
    ("What the loop did", LOOP_COLUMNS),
    ("Acc@0.5 % at each step", STEP_COLUMNS),
)
UNITS = {
    "share": (100, 1, " %"),
    "difference": (100, 1, " points"),
    "ratio": (1, 3, ""),
    "IoU": (1, 3, " IoU"),
}
NOT_RUN = {"value": None}
SECOND_TURN_TITLE = "The second turn of the untrained student: what its words cost, and what the drawn box costs"
STYLES = {"none": "bare image", "outline": "box outlined", "filled": "box filled"}
CLOSER_NOTE = (
    "A closer look: first answer, sampled answers and closer look are those of one trained student, each seed's own; "
    "the one trained on the truth at first sight is another. The intervals of one seed are over test images, for that "
    "training; those of the mean of several seeds hold new images and new trainings."
)
SEEDS_TITLE = "Several trainings: mean [95% interval for new images and new trainings], lowest to highest seed"
SEEDS_DIFFERENCES = "The same trainings: differences, a - b, paired by image and by seed"
SEEDS_COLUMNS = (
    ("step0_acc50", "step 0 Acc@0.5 %", 100, 1),
    ("acc50", "final Acc@0.5 %", 100, 1),
    ("oracle_acc50", "oracle Acc@0.5 %", 100, 1),
    ("miou", "final mean IoU", 1, 3),
    ("degradation_per_step", "IoU lost per step", 1, 3),
    ("share_stay", "IoU kept %", 100, 1),
)
NOTES = (
    "[low, high]: 95% bootstrap interval, resampled by image. -: does not apply.",
    "(keep): SFT on trajectories in which a box that fits stays, not the paper's line. Long: five refinements.",
    "degrade, IoU kept: samples whose final IoU is below step 0's; whose final IoU is still step 0's.",
    "best rule: the label-free rule with the highest Acc@0.5 on validation samples, scored on test (notebook 6).",
    "oracle: the best step, chosen with the ground truth; what choosing could give at most, not a result.",
    "\u2020 The paper's v1, as far as it is known here, does not say which step it scored.",
)


def paper_results(path: Path = PAPER) -> dict:
    """Return the paper's numbers, each with its version and source; null where a number is not known."""
    remedy = f"{files.restoring(path)} (after a change of your own: ivt build docs)"
    return files.read_json(files.intact(path, remedy))


def table(results: dict, paper: dict) -> list[dict]:
    """Return the rows of the table: for each method the paper's (where it has one), then ours.

    A row is {"method", "label", "source": "paper" or "ours", "run": bool, "answers": int or None, "cells":
    {column: cell}}. Paper cells have no interval but a "step", and value None where a number is not known.
    """
    rows = []
    for name in [*_listed(results["methods"]), *(name for name in results["methods"] if name not in METHODS)]:
        row = {"method": name, "label": method_label(name)}
        if name in paper["methods"]:
            answers = 1 if name in SINGLE else paper["refinements"] + 1
            paper_row = {"source": "paper", "run": True, "answers": answers, "cells": paper["methods"][name]}
            rows.append(row | paper_row)
        rows.append(row | _our_row(name, results["methods"]))
    return rows


def _listed(methods: dict) -> list[str]:
    """Return the names that a table lists: a long loop only where it was run, for not every profile has one."""
    return [name for name in METHODS if name in methods or not METHODS[name].long]


def _our_row(name: str, methods: dict) -> dict:
    ours = methods.get(name)
    return {
        "source": "ours",
        "run": ours is not None,
        "answers": ours and ours["answers_per_sample"],
        "cells": _our_cells(name, ours) if ours else {},
    }


def scale_table(path: Path = SCALE) -> list[list[str]]:
    """Return the results of the profile `paper` as a grid of text, its head first: "not run" until somebody runs it."""
    results = files.read_json(path) if path.exists() else {}
    methods = results["methods"] if results.get("profile") == "paper" else {}
    rows = [{"method": name, "label": method_label(name)} | _our_row(name, methods) for name in _listed(methods)]
    grid = _grid(rows, RESULT_COLUMNS)
    return grid if methods else [grid[0], ["not run: ivt run --profile paper", *["-"] * (len(grid[0]) - 1)]]


def _our_cells(name: str, method: dict) -> dict:
    metrics = method["metrics"]
    cells = dict(metrics["final"])
    if len(metrics["per_step"]) > 1:
        cells |= {f"step{t}": step["acc50"] for t, step in enumerate(metrics["per_step"])}
        cells["oracle_acc50"] = metrics["oracle_best_step"]["acc50"]
        if name in ASKED or method.get("rules"):  # a method that notebook 6 asks
            cells["best_rule_acc50"] = best_rule(method["rules"])["acc50"] if method.get("rules") else NOT_RUN
        cells |= {key: metrics[key] for key in ("degradation_per_step", "share_degrade", "share_stay")}
    return cells


def _grid(rows, columns) -> list[list[str]]:
    if columns is not RESULT_COLUMNS:
        rows = [row for row in rows if row["method"] not in SINGLE]
    if columns is STEP_COLUMNS:  # a short loop is the beginning of the long one
        names = {row["method"] for row in rows}
        rows = [row for row in rows if row["source"] == "ours" and longer(row["method"]) not in names]
        columns = [column for column in columns if any(column[0] in row["cells"] for row in rows)]
    lines = [["method", "whose", "answers", *(column[1] for column in columns)]]
    for row in rows:
        line = [row["label"], row["source"], str(row["answers"] or "-")]
        for key, _, scale, digits in columns:
            cell = row["cells"].get(key)
            if not row["run"] or cell is NOT_RUN:
                line.append("not run")
            elif row["source"] == "paper" and (cell is None or cell["value"] is None):
                line.append("not known")
            elif cell is None:
                line.append("-")
            else:
                line.append(number(cell, scale, digits) + ("\u2020" if cell.get("step") == "not stated" else ""))
        lines.append(line)
    return lines


def to_text(rows) -> str:
    """Return the rows for a terminal: results at the final step, what the loop did, its steps, notes."""
    parts = [f"{title}\n{aligned(_grid(rows, columns))}" for title, columns in TABLES]
    return "\n\n".join([*parts, "\n".join(NOTES)])


def to_markdown(rows) -> str:
    """Return the same as Markdown: three tables and the notes."""
    return "\n\n".join([*titled_tables(rows), notes()]) + "\n"


def titled_tables(rows) -> list[str]:
    """Return the three tables as Markdown, each below its title."""
    grids = {title: _grid(rows, columns) for title, columns in TABLES}
    return [f"**{title}**\n\n{markdown_table(head, body)}" for title, (head, *body) in grids.items()]


def notes() -> str:
    """Return what the columns of the tables mean, as a Markdown list."""
    return "\n".join(f"- {note}" for note in NOTES)


def mirage_tables(method: dict) -> list[list[list[str]]]:
    """Return what notebook 6 tells of a method as grids of text, each with its head first; [] where it was not run."""
    if not method.get("rules"):
        return []
    rest = [[f"{name} (%)", number(cell, 100, 1), cell["n"]] for name, cell in method["refinement"].items()]
    grids = (
        rules_table(method["rules"]),
        controls_table(method["controls"]),
        calibration_table(method["calibration"]),
        [["measure", "value", "n"], *rest],
    )
    return [[[str(v) for v in line] for line in grid] for grid in grids if grid[1:]]


def rules_table(rows: list[dict]) -> list[list]:
    """Return `selection.rule_rows` as a grid, its head first."""
    head = ["rule", "threshold (val)", "answers", "Acc@0.5 (%)", "minus step 0 (points)", "won, lost", "p"]
    return [
        head,
        *(
            [
                r["rule"],
                r["threshold"] or "-",
                r["answers"],
                number(r["acc50"], 100, 1),
                number(r["difference"], 100, 1),
                f"+{r['gained']} -{r['lost']}",
                "-" if r["rule"] == ORACLE else f"{r['p']:.3f}".replace("0.000", "< 0.001"),
            ]
            for r in rows
        ),
    ]


def calibration_table(rows: list[dict]) -> list[list]:
    """Return `confidence.calibration` as a grid, its head first: one row a step."""
    signals = {"fits": "verification", "likelihood": "likelihood"}
    head = ["step", "right (%)", *(f"{label}: {name}" for label in signals.values() for name in ("AUROC", "r"))]
    return [
        head,
        *(
            [
                row["step"],
                number(row["right"], 100, 1),
                *(number(row[signal][name], 1, 3) for signal in signals for name in ("auroc", "r")),
            ]
            for row in rows
        ),
    ]


def controls_table(rows: list[dict]) -> list[list]:
    """Return `controls.control_rows` as a grid, its head first."""
    head = [
        "box shown",
        "its IoU with the truth",
        "next answer: Acc@0.5 (%)",
        "minus own box (points)",
        "mean IoU",
        "IoU of next answer and box shown",
    ]
    return [
        head,
        *(
            [
                r["control"],
                number(r["shown"], 1, 3),
                number(r["acc50"], 100, 1),
                number(r["difference"], 100, 1),
                number(r["miou"], 1, 3),
                number(r["follow"], 1, 3),
            ]
            for r in rows
        ),
    ]


def seconds_table(stages: dict[str, dict]) -> list[list[str]]:
    """Return where the time of a run went, from its stages.json, as a grid of text: the longest stages come first.

    Stages of less than a fiftieth of all are one row. A table is made of other stages, so it is left out. [] where
    nothing was timed, as in the reference.
    """
    timed = {name: noted.get("seconds") for name, noted in stages.items() if not name.startswith("tables/")}
    seconds = {name: s for name, s in timed.items() if isinstance(s, int | float) and s > 0}
    whole = sum(seconds.values())
    longest = {name: s for name, s in sorted(seconds.items(), key=lambda item: -item[1]) if s >= whole / 50}
    shorter = {f"{len(seconds) - len(longest)} shorter ones": whole - sum(longest.values())}
    rows = longest | (shorter if len(seconds) > len(longest) else {}) | {"all stages": whole}
    grid = [[name, f"{s:,.0f}", f"{100 * s / whole:.0f}"] for name, s in rows.items() if whole]
    return [["stage", "seconds", "% of all"], *grid] if grid else []


def second_turn_table(rows: list[dict]) -> list[list[str]]:
    """Return `controls.second_turn_rows` as a grid of text, its head first: for each wording Acc@0.5, then its loss."""
    grid = [["after the first answer", *STYLES.values()]]
    cells = {(row["words"], row["style"]): row for row in rows}
    for words, label in (("feedback", "the feedback"), ("question", "the question again")) if rows else ():
        for key, what in (("acc50", "Acc@0.5 %"), ("difference", "minus step 0, points")):
            grid.append([f"{label}: {what}", *(number(cells[words, style][key], 100, 1) for style in STYLES)])
    return grid if rows else [*grid, ["not run: notebook 1", *["-"] * len(STYLES)]]


def closer_table(rows: list[dict]) -> list[list[str]]:
    """Return `closer.closer_rows` as a grid of text, its head first: the mean of the seeds, then `GAINS` of each."""
    grid = [["a closer look (ours)", "seed", "answers", "Acc@0.5: % or points", "mean IoU", "n"]]
    for row in sorted(rows, key=lambda row: row["seed"] != "mean"):
        if row["seed"] == "mean" or row["name"] in GAINS:
            cells = number(row["acc50"], 100, 1), number(row["miou"], 1, 3), row["acc50"]["n"]
            grid.append([str(v) for v in (row["name"], row["seed"], row["answers"] or "-", *cells)])
    return grid if rows else [*grid, ["not run: ivt closer", *["-"] * 5]]


def seeds_tables(rows: list[dict]) -> dict[str, list[list[str]]]:
    """Return `results.seed_rows` as two grids of text, heads first, by their titles: methods, differences; {} without.

    Each cell: the mean over the seeds, its interval, and the lowest and highest seed.
    """
    if not rows:
        return {}

    def told(row, scale, digits):
        if row is None:
            return "-"
        low, high = (limit(row["seeds"].values()) * scale for limit in (min, max))
        return f"{number(row, scale, digits)}, {low:.{digits}f} to {high:.{digits}f}"

    levels = by_name(row for row in rows if row["b"] is None)
    methods = [["method", "seeds", *(column[1] for column in SEEDS_COLUMNS)]]
    for name in dict.fromkeys(name for name, _ in levels):
        seeds = str(len(levels[name, "acc50"]["seeds"]))
        cells = [told(levels.get((name, key)), scale, digits) for key, _, scale, digits in SEEDS_COLUMNS]
        methods.append([method_label(name), seeds, *cells])
    differences = [["paired difference", "score", "value", "seeds", "samples"]]
    for row in rows:
        if row["b"] is not None:
            scale, digits, unit = UNITS["difference" if row["metric"].endswith("acc50") else "ratio"]
            value = told(row, scale, digits) + unit
            differences.append([row["name"], row["metric"], value, str(len(row["seeds"])), str(row["n"])])
    return {SEEDS_TITLE: methods, SEEDS_DIFFERENCES: differences}


def _goals(results: dict) -> list[list[str]]:
    grid = [["target", "", "measured", "n", "seeds", "claim"]]
    for goal in targets(results):
        scale, digits, unit = UNITS[goal["unit"]]
        measured = "-" if goal["value"] is None else number(goal, scale, digits) + unit
        counts = (str(goal[name] or "-") for name in ("n", "trainings"))
        grid.append([goal["key"], goal["verdict"] or "not run", measured, *counts, goal["claim"]])
    return grid

"""What a notebook shows: a figure with alt text, saved beside the results; lines with bands; a Markdown table."""

import os
from pathlib import Path

import numpy as np

from ivt_utils.boxes import iou, to_pixels
from ivt_utils.methods import longer, method_label
from ivt_utils.metrics import Resampling, intervals
from ivt_utils.overlay import COLORS, OVERLAY, draw_box
from ivt_utils.runtime.text import markdown_table, number
from ivt_utils.schema import Cell, Rollout
from ivt_utils.show.tables import table
from ivt_utils.show.targets import by_name

BLUE, ORANGE, GRAY, AMBER, GREEN = "#0072B2", "#D55E00", "#999999", "#E69F00", "#009E73"
PALETTE = (BLUE, ORANGE, GRAY, AMBER, GREEN, "#CC79A7", "#56B4E9")  # Okabe and Ito

__all__ = ["cell_text", "curves_figure", "lines_figure", "log_figure", "markdown_table", "show"]

MARKERS = "os^Dv<>"


def show(figure, path: Path, alt: str) -> None:
    """Save a Matplotlib figure as PNG and display it with alt text; without a front end the file remains."""
    import matplotlib.pyplot as plt
    from IPython.display import Image, display

    figure.set_label(alt)
    save_figure(figure, path)
    plt.close(figure)
    # As metadata, for Colab's IPython knows no `alt`.
    display(Image(filename=str(path), metadata={"alt": alt}, width=int(figure.get_figwidth() * 85)))


def lines_figure(lines: dict[str, list[dict]], xlabel: str, ylabel: str, scale: int = 1):
    """Return a figure: one line a name through cells {"value", "low", "high"}, with 95% bands; its label: alt text.

    Shares are shown in percent with `scale` 100.
    """
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
    sentences = []
    for (name, cells), color, marker in zip(lines.items(), PALETTE, MARKERS, strict=False):
        at = range(len(cells))
        values, low, high = (scale * np.array([c[key] for c in cells], float) for key in ("value", "low", "high"))
        ax.plot(at, values, color=color, marker=marker, label=name)
        ax.fill_between(at, low, high, color=color, alpha=0.2, lw=0)
        sentences.append(f"{name} " + ", ".join(f"{value:.{1 if scale == 100 else 3}f}" for value in values))
    ax.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, scale), xticks=range(max(map(len, lines.values()))))
    ax.grid(axis="y", alpha=0.3)
    ax.legend(frameon=False)
    figure.set_label(f"{ylabel} over {xlabel}. " + "; ".join(sentences) + ".")
    return figure


def curves_figure(curves: dict[str, dict], resampling: Resampling):
    """Return a figure: one panel for each of `curves` (`grpo.read_probe`), mean IoU over the steps of a training.

    Each has a line for the first answer and one for the final answer. A band is the 95% interval of the change since
    the line's first point, paired by prompt: so it has no width there. The figure's label is its alt text.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(8, 3), sharey=True, squeeze=False, layout="constrained")
    looks, sentences = {"first answer": (0, GRAY, "s"), "final answer": (-1, BLUE, "o")}, []
    for ax, (name, curve) in zip(axes[0], curves.items(), strict=True):
        at = [row["step"] for row in curve["rows"]]
        for label, (answer, color, marker) in looks.items():
            ious = np.array([[answers[answer] for answers in row["ious"]] for row in curve["rows"]])
            changes, start = ious - ious[0], ious[0].mean()
            cells = intervals(changes, np.ones_like(changes), curve["image_ids"], resampling)
            ax.plot(at, ious.mean(axis=1), color=color, marker=marker, markersize=4, label=label)
            if all(cell["low"] is not None for cell in cells):
                low, high = ([start + cell[limit] for cell in cells] for limit in ("low", "high"))
                ax.fill_between(at, low, high, color=color, alpha=0.2, lw=0)
            sentences.append(f"{name}, {label}: from {start:.3f} to {ious[-1].mean():.3f}")
        ax.set(xlabel="GRPO step", title=name)
        ax.grid(axis="y", alpha=0.3)
    axes[0, 0].set_ylabel("mean IoU of the probes (0 to 1)")
    axes[0, 0].legend(frameon=False)
    figure.set_label("Mean IoU of greedy answers to the same prompts over GRPO steps. " + "; ".join(sentences) + ".")
    return figure


def log_figure(log: list[dict], turns: int, window: int = 15):
    """Return a figure of GRPO's log, with its label as alt text: rewards, IoU by step, groups, KL and entropy.

    Thin lines are single steps, thick ones the running mean over `window` of them. A rollout's first, middle and last
    answer have a line each.
    """
    import matplotlib.pyplot as plt
    from scipy.ndimage import uniform_filter1d

    steps = {f"iou_step_{t}": f"step {t}" for t in (0, *([turns // 2] if turns > 1 else []), turns)}
    panels = {
        "reward": {"reward": "final IoU + bonus"},
        "mean IoU of rollouts": steps,
        "share": {"failed_rollouts": "failed rollouts", "equal_groups": "groups without variance"},
        "nats": {"kl": "KL to SFT", "entropy": "entropy (nats a token)"},
    }
    figure, axes = plt.subplots(2, 2, figsize=(9, 5), layout="constrained", sharex=True)
    for ax, (ylabel, lines) in zip(axes.flat, panels.items(), strict=True):
        for (key, label), color in zip(lines.items(), PALETTE, strict=False):
            values = np.array([row[key] for row in log], dtype=float)
            ax.plot([row["step"] for row in log], values, color=color, alpha=0.3, lw=0.7)
            thick = uniform_filter1d(values, window, mode="nearest")
            ax.plot([row["step"] for row in log], thick, color=color, label=label)
        ax.set(ylabel=ylabel, xlabel="GRPO step" if ax in axes[1] else None)
        ax.legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    figure.set_label(
        "Four panels over GRPO steps: reward, IoU per step; failed rollouts and groups without variance; "
        "KL and entropy."
    )
    return figure


def cell_text(cell: Cell, scale: float = 1) -> str:
    """Return "value [low, high]" of a cell; shares are shown in percent with `scale` 100."""
    return number(cell, scale, 1 if scale == 100 else 3)


def trajectory_strip(records, rollouts, title: str = "", style: str = "none"):
    """Return a Matplotlib figure: one row a rollout, one picture a step, with the answer and the truth drawn on it.

    `style` is how the loop draws boxes. Each picture is then what the student was shown before this answer: the image
    with the answer of the step before in red. With `none` it is the bare image.
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    from ivt_utils.metrics import iou_matrix

    by_id = {record["id"]: record for record in records}
    scores = iou_matrix(rollouts)
    columns = len(rollouts[0]["steps"])
    figure, axes = plt.subplots(len(rollouts), columns, figsize=(2.7 * columns, 3.0 * len(rollouts)), squeeze=False)
    for row, rollout in enumerate(rollouts):
        record, last = by_id[rollout["id"]], None
        image = record["image"]
        for column, step in enumerate(rollout["steps"]):
            ax = axes[row][column]
            ax.imshow(draw_box(image, last, style))
            for box, name in ((step["box"], "answer"), (rollout["truth"], "truth")):
                if box is not None:
                    ax.add_patch(_edges(*to_pixels(box, *image.size), name))
            state = f"IoU {scores[row, column]:.2f}" if step["box"] is not None else "no box in the answer"
            ax.set_title(f"step {column}: {state}", fontsize=9)
            ax.set_xticks([])
            ax.set_yticks([])
            last = step["box"]
        axes[row][0].set_xlabel("“" + record["expression"] + "”", fontsize=9, loc="left")
    keys = {"ground truth": _edges(0, 0, 1, 1, "truth"), "answer": _edges(0, 0, 1, 1, "answer")}
    if style != "none":
        red = [value / 255 for value in OVERLAY]
        keys["shown: the last answer"] = Rectangle((0, 0), 1, 1, fc=(*red, 0.3 * style.startswith("filled")), ec=red)
    figure.legend(keys.values(), keys, loc="upper right", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(title, x=0.02, ha="left", fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.1 / len(rollouts)), h_pad=2.5)  # room for title and legend
    return figure


def _edges(x1, y1, x2, y2, name):
    """Return the edges of a box in pixels, in the line and color of the "truth" or of an "answer"."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    line = "--" if name == "truth" else "-"
    halo = [withStroke(linewidth=4, foreground="white")]  # so that it is seen on red, too
    return Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, path_effects=halo, color=COLORS[name], ls=line, lw=2.2)


def course_in_one_picture(results: dict, paper: dict, image, untrained: Rollout, trained: Rollout):
    """Return a matplotlib Figure: a sample in four panels, above four bars of Acc@0.5; its label: alt text.

    `untrained`, `trained`: the rollouts of the base student and of the SFT student on the sample of this `image`. The
    bars are those of the last step, as in `paper_and_ours`. A phone shows the picture 390 pixels wide, and its text
    is still 9 pixels high there.
    """
    import matplotlib.pyplot as plt
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with plt.rc_context({"font.size": 11}):
        figure = plt.figure(figsize=(6.5, 5.2), layout=ConstrainedLayoutEngine(h_pad=0.07))
        plt.close(figure)
        grid = figure.add_gridspec(2, 1, height_ratios=(10, 12))
        panels, chart = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
        said = _four_panels(panels, image, untrained, trained)
        figure.set_label(f"{said} {_four_bars(chart, results, paper)}")
    return figure


def _four_panels(figure, image, untrained: Rollout, trained: Rollout) -> str:
    """Draw a first answer, what the student is shown, its next answer, and that of the trained one; return that."""
    truth, (first, second), after = untrained["truth"], untrained["steps"][:2], trained["steps"][1]

    def told(step):
        value = iou(step["box"], truth)
        return ("\u2713 right" if value >= 0.5 else "\u2717 wrong") + f", IoU {value:.2f}"

    panels = (
        (f"First answer\n{told(first)}", image, first),
        ("Drawn and shown:\nits own box", draw_box(image, first["box"]), None),
        (f"Second answer\n{told(second)}", image, second),
        (f"The same after SFT\n{told(after)}", image, after),
    )
    for ax, (title, picture, step) in zip(figure.subplots(1, 4), panels, strict=True):
        ax.imshow(picture)
        for box, name in ((step["box"], "answer"), (truth, "truth")) if step else ():
            ax.add_patch(_edges(*to_pixels(box, *image.size), name))
        ax.set_title(title, fontsize=11)
        ax.set(xticks=[], yticks=[])
    keys = {name: _edges(0, 0, 1, 1, name) for name in ("answer", "truth")}
    figure.legend(keys.values(), keys, loc="upper right", ncols=2, frameon=False, borderaxespad=0)
    figure.suptitle(f"Where is \u201c{untrained['expression']}\u201d?", x=0.01, ha="left", fontsize=12)
    return (
        f"Four panels show one test image, and the question is where '{untrained['expression']}' is. The untrained "
        f"student's first answer: {told(first)[2:]}. The image with this box drawn on it in red, as the student is "
        f"shown it. Its second answer: {told(second)[2:]}. The second answer after SFT: {told(after)[2:]}."
    )


def _four_bars(figure, results: dict, paper: dict) -> str:
    """Draw Acc@0.5 of the first answer and of the last ones, without training and after each; return the values."""
    ax, sentences, seeded = figure.subplots(), [], by_name(results["seeds"])
    bars = {
        "base_single": "untrained, first answer",
        "base_ivt": "untrained, last answer",
        "sft_ivt": "after SFT, last answer",
        "sft_grpo_ivt": "SFT + GRPO, last answer",
    }
    for place, name in enumerate(bars):
        ours = seeded.get((name, "acc50"), results["methods"][name]["metrics"]["final"]["acc50"])
        theirs = paper["methods"][name]["acc50"]
        ax.barh(place, 100 * ours["value"], 0.42, color=BLUE, label="here, 95% interval")
        if ours["low"] is not None:
            ax.plot([100 * ours["low"], 100 * ours["high"]], [place, place], color="black", linewidth=3)
        ax.text(1, place, f"{100 * ours['value']:.1f}", color="white", va="center", fontweight="bold")
        said, end = "the paper: not known", 0
        if theirs["value"] is not None:
            vague, end = theirs["step"] == "not stated", 100 * theirs["value"]
            look = {"color": "white", "edgecolor": "black", "hatch": "//" if vague else ""}
            ax.barh(place + 0.36, end, 0.3, label="the paper" + ", step not stated" * vague, **look)
            said = f"{end:.1f}"
        ax.text(end + 1, place + 0.37, said, va="center")
        sentences.append(f"{bars[name]} {100 * ours['value']:.1f} (the paper: {said.removeprefix('the paper: ')})")
    ax.set_yticks([place + 0.15 for place in range(len(bars))], bars.values())
    ax.invert_yaxis()
    ax.set(xlabel="Acc@0.5 (% of test samples)", xlim=(0, 100), xticks=range(0, 101, 20))
    ax.spines[["top", "right"]].set_visible(False)
    handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3, frameon=False)
    return f"Bars below it show Acc@0.5 in percent: {'; '.join(sentences)}."


def iou_per_step(results: dict):
    """Return a matplotlib Figure: mean IoU at each step of the base, SFT and SFT + GRPO; its label: alt text.

    The long loop where there is one, which begins as the short one does. The bands are 95% intervals. Of several
    trainings it is their mean, and each is a dot.
    """
    figure, axes = _axes()
    methods, seeded, sentences = results["methods"], by_name(results["seeds"]), []
    drawn_methods = ("base_ivt", "sft_ivt", "sft_grpo_ivt")
    names = [longer(name) if longer(name) in methods else name for name in drawn_methods]
    for name, color, marker in zip(names, (BLUE, ORANGE, GREEN), "os^", strict=True):
        if name not in methods:
            continue
        per_step = enumerate(methods[name]["metrics"]["per_step"])
        cells = [seeded.get((name, f"step{t}_miou"), step["miou"]) for t, step in per_step]
        values, steps = [cell["value"] for cell in cells], range(len(cells))
        sentences.append(f"{method_label(name)} " + ", ".join(f"{value:.3f}" for value in values))
        look = {"color": color, "label": method_label(name)}
        axes.plot(steps, values, marker=marker, **look)
        for step, cell in enumerate(cells):
            _dots(axes, step, cell, 1, color)
        if all(cell["low"] is not None for cell in cells):
            low, high = ([cell[limit] for cell in cells] for limit in ("low", "high"))
            axes.fill_between(steps, low, high, color=look["color"], alpha=0.2, linewidth=0)
    axes.set(xlabel="step (0: first answer)", ylabel="mean IoU (0 to 1)", ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes)
    figure.set_label("Mean IoU at each step. " + "; ".join(sentences) + ".")
    return figure


def paper_and_ours(results: dict, paper: dict):
    """Return a matplotlib Figure: Acc@0.5 of the paper's methods, there and here; its label: alt text.

    Bars are results, ours with 95% intervals, the paper's hatched where the scored step is not stated.
    Diamonds are the best step of an oracle. Of several trainings it is their mean, and each is a dot.
    """
    figure, axes = _axes()
    seeded = by_name(results["seeds"])
    rows = [row for row in table(results, paper) if row["method"] in paper["methods"]]
    names, sentences = list(dict.fromkeys(row["method"] for row in rows)), []
    for row in rows:
        ours = row["source"] == "ours"
        place = names.index(row["method"]) + (0.2 if ours else -0.2)
        for key in ("acc50", "oracle_acc50"):
            cell = row["cells"].get(key)
            if ours:
                cell = seeded.get((row["method"], key), cell)
            if cell is None or cell["value"] is None:
                if key == "acc50":
                    words = "not known" if not ours else "not run" if not row["run"] else ""
                    axes.text(place, 2, words, rotation=90, ha="center", va="bottom", fontsize="small")
                continue
            value = 100 * cell["value"]
            sentences.append(f"{row['label']}, {row['source']}{' oracle' * (key != 'acc50')} {value:.1f}")
            if key == "oracle_acc50":
                axes.plot(place, value, "D", color="black", markerfacecolor="white", label="oracle best step")
                continue
            vague = cell.get("step") == "not stated"
            look = {"color": PALETTE[0 if ours else 6], "edgecolor": "black", "hatch": "//" if vague else ""}
            axes.bar(place, value, 0.38, label=row["source"] + (", step not stated" if vague else ""), **look)
            if cell.get("low") is not None:
                limits = [100 * cell["low"], 100 * cell["high"]]
                axes.plot([place, place], limits, color="black", linewidth=3, label="95% interval")
            _dots(axes, place + 0.1, cell, 100, "black")
    axes.set_xticks(range(len(names)), [method_label(name) for name in names], rotation=20, ha="right")
    axes.set(ylabel="Acc@0.5 (% of test samples)", ylim=(0, 105))
    _legend(figure, axes)
    figure.set_label("Acc@0.5 in percent. " + "; ".join(sentences) + ".")
    return figure


def _dots(axes, place: float, cell: Cell, scale: float, color: str) -> None:
    """Draw each seed of a cell over several trainings as a dot."""
    for value in cell.get("seeds", {}).values():
        axes.plot(place, scale * value, "o", color=color, markersize=3, markerfacecolor="white", label="one training")


def _legend(figure, axes) -> None:
    """Name each kind of mark once, beside the axes."""
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize="small")


def _axes():
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    plt.close(figure)  # a notebook shows the returned figure once, and none is kept open
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def save_figure(figure, path: Path) -> None:
    """Save a figure as PNG, whole or not at all; its label becomes the file's description."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png", dpi=120, metadata={"Description": figure.get_label()})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

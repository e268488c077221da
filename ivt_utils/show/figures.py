"""What a notebook shows: a figure with alt text, saved beside the results; lines with bands; a Markdown table."""

from pathlib import Path

import numpy as np

from ivt_utils.metrics import intervals
from ivt_utils.show.report import COLOURS, markdown_table, number, save_figure

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
    told = []
    for (name, cells), color, marker in zip(lines.items(), COLOURS, MARKERS, strict=False):
        at = range(len(cells))
        values, low, high = (scale * np.array([c[key] for c in cells], float) for key in ("value", "low", "high"))
        ax.plot(at, values, color=color, marker=marker, label=name)
        ax.fill_between(at, low, high, color=color, alpha=0.2, lw=0)
        told.append(f"{name} " + ", ".join(f"{value:.{1 if scale == 100 else 3}f}" for value in values))
    ax.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, scale), xticks=range(max(map(len, lines.values()))))
    ax.grid(axis="y", alpha=0.3)
    ax.legend(frameon=False)
    figure.set_label(f"{ylabel} over {xlabel}. " + "; ".join(told) + ".")
    return figure


def curves_figure(curves: dict[str, dict], *, seed: int, n_resamples: int):
    """Return a figure: one panel for each of `curves` (`grpo.read_probe`), mean IoU over the steps of a training.

    Each has a line for the first answer and one for the final answer. A band is the 95% interval of the change since
    the line's first point, paired by prompt: so it has no width there. The figure's label is its alt text.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(8, 3), sharey=True, squeeze=False, layout="constrained")
    looks, told = {"first answer": (0, COLOURS[2], "s"), "final answer": (-1, COLOURS[0], "o")}, []
    for ax, (name, curve) in zip(axes[0], curves.items(), strict=True):
        at = [row["step"] for row in curve["rows"]]
        for label, (answer, color, marker) in looks.items():
            ious = np.array([[answers[answer] for answers in row["ious"]] for row in curve["rows"]])
            changes, start = ious - ious[0], ious[0].mean()
            cells = intervals(changes, np.ones_like(changes), curve["image_ids"], seed=seed, n_resamples=n_resamples)
            ax.plot(at, ious.mean(axis=1), color=color, marker=marker, markersize=4, label=label)
            if all(cell["low"] is not None for cell in cells):
                low, high = ([start + cell[limit] for cell in cells] for limit in ("low", "high"))
                ax.fill_between(at, low, high, color=color, alpha=0.2, lw=0)
            told.append(f"{name}, {label}: from {start:.3f} to {ious[-1].mean():.3f}")
        ax.set(xlabel="GRPO step", title=name)
        ax.grid(axis="y", alpha=0.3)
    axes[0, 0].set_ylabel("mean IoU of the probes (0 to 1)")
    axes[0, 0].legend(frameon=False)
    figure.set_label("Mean IoU of greedy answers to the same prompts over GRPO steps. " + "; ".join(told) + ".")
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
        for (key, label), color in zip(lines.items(), COLOURS, strict=False):
            values = np.array([row[key] for row in log], dtype=float)
            ax.plot([row["step"] for row in log], values, color=color, alpha=0.3, lw=0.7)
            thick = uniform_filter1d(values, window, mode="nearest")
            ax.plot([row["step"] for row in log], thick, color=color, label=label)
        ax.set(ylabel=ylabel, xlabel="GRPO step" if ax in axes[1] else None)
        ax.legend(frameon=False, fontsize=8, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
    figure.set_label("Four panels over GRPO steps: reward, IoU per step; failed rollouts and groups without variance; "
                     "KL and entropy.")  # fmt: skip
    return figure


def cell_text(cell: dict, scale: float = 1) -> str:
    """Return "value [low, high]" of a cell; shares are shown in percent with `scale` 100."""
    return number(cell, scale, 1 if scale == 100 else 3)

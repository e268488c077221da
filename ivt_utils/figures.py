"""What a notebook shows: a figure with alt text, saved beside the results; lines with bands; a Markdown table."""

from pathlib import Path

from ivt_utils.report import COLOURS, markdown_table, number, save_figure

__all__ = ["cell_text", "lines_figure", "markdown_table", "show"]

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


def lines_figure(lines: dict[str, list[dict]], xlabel: str, ylabel: str):
    """Return a figure: one line a name through cells {"value", "low", "high"}, with 95% bands; its label: alt text."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
    for (name, cells), color, marker in zip(lines.items(), COLOURS, MARKERS, strict=False):
        at, values = range(len(cells)), [cell["value"] for cell in cells]
        ax.plot(at, values, color=color, marker=marker, label=name)
        ax.fill_between(at, [c["low"] for c in cells], [c["high"] for c in cells], color=color, alpha=0.2, lw=0)
    ax.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 1), xticks=range(max(map(len, lines.values()))))
    ax.grid(axis="y", alpha=0.3)
    ax.legend(frameon=False)
    told = [f"{name} " + ", ".join(f"{c['value']:.3f}" for c in cells) for name, cells in lines.items()]
    figure.set_label(f"{ylabel} over {xlabel}. " + "; ".join(told) + ".")
    return figure


def cell_text(cell: dict, scale: float = 1) -> str:
    """Return "value [low, high]" of a cell; shares are shown in percent with `scale` 100."""
    return number(cell, scale, 1 if scale == 100 else 3)

"""Numbers, tables and Markdown as text."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ivt_utils.runtime import files


def number(cell: Mapping[str, Any], scale: float, digits: int) -> str:
    """Return "value [low, high]" of a cell, times `scale`; "none" without a value, the value alone without limits."""
    if cell["value"] is None:
        return "none"
    text = f"{cell['value'] * scale:.{digits}f}"
    if cell.get("low") is not None:
        text += f" [{cell['low'] * scale:.{digits}f}, {cell['high'] * scale:.{digits}f}]"
    return text


def aligned(grid: list[list[str]]) -> str:
    """Return a grid of text, its head first, as lines for a terminal."""
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = ["  ".join(f"{v:<{w}}" for v, w in zip(line, widths, strict=True)).rstrip() for line in grid]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def markdown_table(head: list[str], rows: list[list]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(v).replace("|", "\\|") for v in line) + " |" for line in lines)


def between(text: str, mark: str) -> str:
    """Return the lines between the two marks `<!-- mark -->` and `<!-- /mark -->` of a Markdown page's text."""
    return text.split(f"<!-- {mark} -->\n")[1].split(f"<!-- /{mark} -->")[0]


def write_between(page: Path, mark: str, content: str) -> None:
    """Put `content`, whole lines, there."""
    before, rest = page.read_text(encoding="utf-8").split(f"<!-- {mark} -->")
    after = rest.split(f"<!-- /{mark} -->")[1]
    files.write_text(page, f"{before}<!-- {mark} -->\n{content}<!-- /{mark} -->{after}")

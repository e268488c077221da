"""Four drawn diagrams of the method, as figures with alt text: for the notebooks, and as SVG for the pages of `docs/`.

Each draws on a light panel of its own, so that it can be read in a dark theme, and fits the width of a phone. Lengths
are in units of which a diagram is 400 wide. Its numbers are made up, and its alt text says so.
"""

from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

from ivt_utils.runtime.files import write_text
from ivt_utils.show.figures import BLUE, GRAY, GREEN, ORANGE

WIDTH, INCHES = 400, 4.05  # the latter of a figure, which a notebook then shows 344 pixels wide
PANEL, INK, RED = "#fbfaf5", "#222222", "#d62728"
REWARDS = (0.92, 0.90, 0.35, 0.91, 0.10, 0.88)  # made up


def the_loop():
    """Return a matplotlib Figure: image and question, an answer, its box drawn, and the student asked again."""
    figure, ax = _panel(256)
    _scene(ax, 22, 40, 92)
    _text(ax, 68, 24, "image, question")
    _box(ax, 154, 56, 92, 60, "student", BLUE)
    _scene(ax, 286, 40, 92, ORANGE)
    _text(ax, 332, 24, "answer: a box")
    _scene(ax, 286, 152, 92, RED)
    _text(ax, 243, 186, "box drawn", RED)
    _text(ax, 96, 186, "look, and\nanswer again")
    _text(ax, 96, 228, "T times", BLUE, size=13)
    for way in ([(118, 86), (150, 86)], [(250, 86), (282, 86)], [(332, 134), (332, 150)]):
        _arrow(ax, way)
    _arrow(ax, [(282, 204), (200, 204), (200, 120)])
    figure.set_label(
        "The loop. An image and a question go to the student, and its answer is a box. The box is drawn on the image, "
        "and the student is shown this image and asked to look and to answer again. This is repeated T times."
    )
    return figure


def what_is_trained():
    """Return a matplotlib Figure: the parts that stay frozen, and the adapter that SFT and then GRPO train."""
    figure, ax = _panel(262)
    for x, name, adapter in (
        (12, "1. SFT", "adapter:\ntrained"),
        (212, "2. GRPO", "the same adapter:\ntrained further"),
    ):
        _text(ax, x + 88, 20, name, size=13)
        _box(ax, x, 38, 176, 44, "vision encoder: frozen", GRAY)
        _box(ax, x, 92, 176, 100, "", GRAY)
        _text(ax, x + 88, 110, "language model: frozen")
        _box(ax, x + 14, 128, 148, 52, adapter, ORANGE)
    _box(ax, 226, 208, 148, 44, "reference: a frozen\ncopy of the start", GRAY)
    _text(ax, 112, 230, "the reference keeps\nthe adapter near its start")
    _arrow(ax, [(300, 208), (300, 182)])
    figure.set_label(
        "What is trained where. The student's vision encoder and its language model stay frozen throughout. SFT trains "
        "an adapter (LoRA) inside the language model. GRPO goes on training this adapter, and a frozen copy of it, the "
        "reference, holds it near to where it began."
    )
    return figure


def a_group(rewards: Sequence[float] = REWARDS):
    """Return a matplotlib Figure: the rollouts of one sample, their rewards, and the advantages from their mean."""
    figure, ax = _panel(300)
    mean = sum(rewards) / len(rewards)
    base, scale, step = 178, 90, 64
    _text(ax, 200, 16, f"one sample, {len(rewards)} rollouts")
    for i, reward in enumerate(rewards):
        x, advantage = 12 + i * step, reward - mean
        _scene(ax, x, 28, 52, ORANGE, aside=0.4 * (1 - reward) * (-1) ** (i + 1))
        ax.bar(x + 26, -scale * reward, 34, base, color=GRAY)
        _text(ax, x + 26, base + 11, f"{reward:.2f}")
        color, start = (BLUE, 250) if advantage > 0 else (ORANGE, 218)
        if abs(advantage) > 1e-6:
            _arrow(ax, [(x + 26, start), (x + 26, 468 - start)], color, 3)
        _text(ax, x + 26, 266, f"{advantage:+.2f}")
    ax.plot([6, 394], [base - scale * mean] * 2, color=INK, ls="--", lw=1.2)
    _text(ax, 200, 206, f"rewards; dashed: their mean, {mean:.2f}")
    _text(ax, 200, 288, "advantages (numbers made up)")
    figure.set_label(
        f"A group and its advantages, with made-up numbers. {len(rewards)} rollouts of one sample get the rewards "
        f"{', '.join(f'{reward:.2f}' for reward in rewards)}, whose mean is {mean:.2f}. The advantage of each is its "
        f"reward minus the mean: {', '.join(f'{reward - mean:+.2f}' for reward in rewards)}. What lies above the mean "
        "becomes more likely (up), what lies below it less (down)."
    )
    return figure


def who_picks():
    """Return a matplotlib Figure: an oracle picks a step by the truth, a rule by the steps alone."""
    figure, ax = _panel(284)
    ious = (0.62, 0.81, 0.35)
    for t, (value, aside) in enumerate(zip(ious, (0.06, -0.02, 0.17), strict=True)):
        x = 62 + 104 * t
        _scene(ax, x, 92, 72, ORANGE, aside)
        _text(ax, x + 36, 176, f"step {t}")
        _text(ax, x + 36, 82, f"IoU {value:.2f}")
    _box(ax, 12, 10, 376, 40, "oracle: knows the truth, takes the best", GREEN)
    _arrow(ax, [(202, 52), (202, 72)], GREEN, 3)
    _box(ax, 12, 214, 376, 40, "a rule: sees the steps only, takes one", BLUE)
    _arrow(ax, [(306, 212), (306, 188)], BLUE, 3)
    _text(ax, 200, 269, "Above is a bound, below is a result. (IoU made up)")
    figure.set_label(
        "Oracle against deployable, with made-up numbers. Three steps of a rollout have the IoU "
        f"{', '.join(f'{value:.2f}' for value in ious)}. The oracle knows the truth and takes step 1, the best: that "
        "is a bound. A rule sees only the steps and takes one, here step 2: that is a result, and can be deployed."
    )
    return figure


DIAGRAMS = {"loop": the_loop, "trained": what_is_trained, "group": a_group, "oracle": who_picks}


def write_svg(name: str, folder: Path) -> str:
    """Write a diagram to `folder`/`name`.svg, its alt text as title and description in it, and return the alt text."""
    import io

    import matplotlib as mpl

    figure, file = DIAGRAMS[name](), io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):  # letters stay letters
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    _, head, rest = file.getvalue().partition("<svg")
    opening, end, rest = rest.partition(">")
    title, _, words = figure.get_label().partition(".")
    title, words = escape(title), escape(words.strip())
    named = f'<svg role="img"{opening}{end}\n <title>{title}</title>\n <desc>{words}</desc>'
    write_text(folder / f"{name}.svg", named + rest)
    return figure.get_label()


# ------------------------------------------------------------------------------------------------ the pieces
def _panel(height: int):
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(INCHES, INCHES * height / WIDTH), facecolor=PANEL)
    plt.close(figure)
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    ax.axis("off")
    return figure, ax


def _text(ax, x: float, y: float, words: str, color: str = INK, size: int = 10) -> None:
    ax.text(x, y, words, color=color, size=size, ha="center", va="center")


def _box(ax, x: float, y: float, width: float, height: float, words: str, color: str) -> None:
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((x, y), width, height, facecolor=(color, 0.15), edgecolor=color, lw=1.5))
    _text(ax, x + width / 2, y + height / 2, words)


def _scene(ax, x: float, y: float, side: float, color: str = "", aside: float = 0) -> None:
    """Draw a picture of two shapes and, in `color`, a box; `aside`: how far from its place, as a share of the side."""
    from matplotlib.patches import Circle, Polygon, Rectangle

    corners = [(x + a * side, y + b * side) for a, b in ((0.1, 0.9), (0.34, 0.9), (0.22, 0.66))]
    ax.add_patch(Rectangle((x, y), side, side, facecolor="white", edgecolor=INK, lw=1))
    ax.add_patch(Circle((x + 0.55 * side, y + 0.5 * side), 0.17 * side, color=BLUE))
    ax.add_patch(Polygon(corners, color=GREEN))
    if color:
        place, fill = (x + (0.36 + aside) * side, y + 0.3 * side), (color, 0.45) if color == RED else "none"
        ax.add_patch(Rectangle(place, 0.38 * side, 0.4 * side, facecolor=fill, edgecolor=color, lw=2))


def _arrow(ax, way: list, color: str = INK, width: float = 1.5) -> None:
    """Draw a line along the points of `way`, with a head at its end."""
    ax.plot(*zip(*way, strict=True), color=color, lw=width, solid_joinstyle="miter")
    look = {"arrowstyle": "-|>", "color": color, "lw": width, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", way[-1], way[-2], arrowprops=look)

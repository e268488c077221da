"""What the widgets show for a state of their controls: figures with alt text and a caption, and what they rest on.

Each `..._view` returns (figure, alt text, caption); a figure of None has nothing to show, and the caption says why.
Figures are 700 pixels wide at most, and never tell two things apart by color alone.
"""

from textwrap import fill

import numpy as np

from ivt_utils import metrics, selection
from ivt_utils.boxes import to_pixels
from ivt_utils.grpo import advantages, group_rewards
from ivt_utils.metrics import Resampling
from ivt_utils.overlay import COLORS, draw_box, load_image
from ivt_utils.records import numbered
from ivt_utils.schema import Rollout, Step
from ivt_utils.show.figures import MARKERS, PALETTE, cell_text

FILTERS = ("all", "most improved", "most degraded", "worst at the end")
SHADES = tuple(color for color in PALETTE if color != COLORS["truth"])
WITH_TRUTH = "chosen with the ground truth"


# ------------------------------------------------------------------------------------------------ what they rest on
def ordered(rollouts, kind: str) -> list[int]:
    """Return the indices of the rollouts that a filter of `FILTERS` keeps, in its order; all but "all" use the truth.

    "most improved" and "most degraded" keep those whose final IoU is above, or below, that of step 0.
    """
    if kind not in FILTERS:
        raise ValueError(f"There is no filter {kind!r}; choose one of {', '.join(FILTERS)}.")
    if kind == "all":
        return list(range(len(rollouts)))
    ious = metrics.iou_matrix(rollouts)
    gain = ious[:, -1] - ious[:, 0]
    key = {"most improved": -gain, "most degraded": gain, "worst at the end": ious[:, -1]}[kind]
    keep = np.full(len(key), True) if kind == "worst at the end" else key < -metrics.SAME
    return [int(i) for i in np.argsort(key, kind="stable") if keep[i]]


# ------------------------------------------------------------------------------------------------ what is shown
def question_view(image, expression: str):
    """Return the view of a question that nobody has answered yet."""
    figure = _figure(3.6, 3.8)
    ax = figure.subplots()
    ax.imshow(image)
    ax.set(xticks=[], yticks=[])
    ax.set_title(fill(f"“{expression}”", 45), fontsize=10)
    return figure, f"A picture and a referring expression: “{expression}”.", ""


def model_view(image, rollout: Rollout, first: str, style: str):
    """Return the view of a rollout: one picture a step, as the student saw it, with the truth; `first` names step 0."""
    figure = _figure(2.33 * len(rollout["steps"]), 3.25)
    axes = figure.subplots(1, len(rollout["steps"]), squeeze=False)[0]
    lines = step_texts(rollout, first)
    for ax, step, text in zip(axes, rollout["steps"], lines, strict=True):
        draw_answer(ax, image, step["box"], rollout["truth"], style)
        ax.set_title(text.replace(", ", "\n"), fontsize=9)
    words = fill(f"“{rollout['expression']}”", 90)
    figure.supxlabel(f"{words}\nred: the answer as it is drawn for the student; dashed: the truth", fontsize=9)
    return figure, f"“{rollout['expression']}”: {'; '.join(lines)}.", ""


def step_texts(rollout: Rollout, first: str = "") -> list[str]:
    """Return what to say of each step: its number, whose answer it is, its IoU."""
    whose = [f" ({first})" if first else "", *[""] * (len(rollout["steps"]) - 1)]
    each = enumerate(zip(rollout["steps"], whose, _ious(rollout), strict=True))
    return [f"step {t}{who}, {_state(step, value)}" for t, (step, who, value) in each]


def step_view(image, rollout: Rollout, number: int, style: str):
    """Return the view of one step as the student saw it, small, without words in it."""
    figure = _figure(2.1, 2.1)
    draw_answer(figure.subplots(), image, rollout["steps"][number]["box"], rollout["truth"], style)
    return figure, f"The picture with the box of {step_texts(rollout)[number]}; the truth is dashed.", ""


def trajectory_view(records, methods: dict, method: str, kind: str, sample: int, step: int):
    """Return the view of a step of the `sample`-th (from 1) rollout that the filter `kind` keeps of a method."""
    rollouts = methods[method]
    order = ordered(rollouts, kind)
    how = "" if kind == "all" else f" ({WITH_TRUTH})"
    if not order:
        return None, "", f"No sample of {method} is among the {kind}{how}."
    rollout = rollouts[order[min(sample, len(order)) - 1]]
    step = min(step, len(rollout["steps"]) - 1)
    answer, ious = rollout["steps"][step], _ious(rollout)
    figure = _figure(7, 3.3)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    draw_answer(left, image_of(records, rollout), answer["box"], rollout["truth"])
    left.set_title(f"step {step}: {_state(answer, ious[step])}", fontsize=10)
    left.legend(handles=_keys(), loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, frameon=False, fontsize=9)
    right.plot(ious, color=PALETTE[0], marker="o")
    right.plot(step, ious[step], "s", ms=13, mfc="none", mec=COLORS["answer"], mew=2)
    for t, value in enumerate(ious):
        right.annotate(
            f"{value:.2f}",
            (t, value),
            (0, 9 if value < 0.85 else -17),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    right.set(
        xlabel="step (square: the one on the left)",
        ylabel="IoU with the truth (0 to 1)",
        ylim=(-0.05, 1.05),
        xlim=(-0.3, len(ious) - 0.7),
        xticks=range(len(ious)),
    )
    right.grid(axis="y", alpha=0.3)
    alt = (
        f"{method}, {kind}{how}, sample {min(sample, len(order))} of {len(order)}: “{rollout['expression']}”. "
        f"At step {step}: {_state(answer, ious[step])}. IoU over the steps: "
        f"{', '.join(f'{value:.2f}' for value in ious)}."
    )
    caption = (
        f"“{rollout['expression']}”, sample {min(sample, len(order))} of {len(order)}{how}. "
        f"The student at step {step}: {answer['text'] or '(nothing)'}"
    )
    return figure, alt, caption


def group_view(records, groups, format_bonus: float, number: int, spread: str):
    """Return the view of the `number`-th (from 1) group: final boxes, IoU per step, rewards and advantages."""
    rewards = [group_rewards(group, format_bonus) for group in groups]
    group, reward, gain = groups[number - 1], rewards[number - 1], advantages(rewards, spread)[number - 1]
    image = image_of(records, group[0])
    rows = -(-len(group) // 3)
    figure = _figure(7, 2.4 + 1.6 * rows)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.6 * rows, 2.4))
    pictures, lines = top.subfigures(1, 2, width_ratios=(1.25, 1))
    axes = list(pictures.subplots(rows, 3, squeeze=False).flat)
    curve, bars = lines.subplots(), bottom.subplots()
    for ax in axes:
        ax.axis("off")
    for k, (ax, rollout) in enumerate(zip(axes, group, strict=False)):
        look = {"color": SHADES[k % len(SHADES)], "marker": MARKERS[k % len(MARKERS)]}
        draw_answer(ax, image, rollout["steps"][-1]["box"], rollout["truth"])
        ax.axis("on")
        ax.set_title(f"rollout {k + 1}: {_state(rollout['steps'][-1], _ious(rollout)[-1])}", fontsize=8)
        values = np.where(metrics.parsed_matrix([rollout])[0], _ious(rollout), np.nan)
        curve.plot(values, **look, ls=("-", "--", ":")[k % 3], label=str(k + 1), alpha=0.9)
        bars.bar(k, gain[k], color=look["color"], edgecolor="black", hatch="" if gain[k] >= 0 else "///", width=0.6)
        bars.annotate(
            f"{gain[k]:+.2f}",
            (k, gain[k]),
            (0, 4 if gain[k] >= 0 else -4),
            textcoords="offset points",
            ha="center",
            va="bottom" if gain[k] >= 0 else "top",
            fontsize=9,
        )
    pictures.legend(handles=_keys("final answer"), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    curve.set(
        xlabel="step (a gap: no box)", ylabel="IoU (0 to 1)", ylim=(-0.05, 1.05), xticks=range(len(group[0]["steps"]))
    )
    lines.legend(title="rollout", ncols=3, fontsize=8, title_fontsize=8, loc="outside upper center", frameon=False)
    bars.axhline(0, color="black", lw=0.8)
    bars.margins(y=0.22)
    bars.set_xticks(range(len(group)), [f"rollout {k + 1}\nreward {r:.2f}" for k, r in enumerate(reward)], fontsize=8)
    bars.set_ylabel("advantage")
    by = {
        "none": "not divided",
        "group": "divided by the spread of the group",
        "batch": f"divided by the spread of all {sum(map(len, groups))} rollouts",
    }[spread]
    sentence = "; ".join(
        f"rollout {k + 1}: reward {r:.2f}, advantage {g:+.2f}"
        for k, (r, g) in enumerate(zip(reward, gain, strict=True))
    )
    head = f"Group {number} of {len(groups)}, “{group[0]['expression']}”"
    caption = f"{head}. Reward: IoU of the final box, + {format_bonus:g} when every answer parses. Advantages: {by}."
    return figure, f"{head}. Advantages {by}. {sentence}.", caption


def rule_view(rollouts, name: str, curve: list[dict], threshold: float, resampling: Resampling, split: str = ""):
    """Return the view of a stopping rule at a threshold of its curve: Acc@0.5 over thresholds, and who stops where.

    `split`, where given, names the samples in the picture.
    """
    at = min(curve, key=lambda point: abs(point["threshold"] - threshold))
    score = metrics.step_score("final", "acc50")
    ious = metrics.iou_matrix(rollouts)
    levels = {
        "step 0": (ious[:, 0], "-", "#444444"),
        "final step": (ious[:, -1], "--", PALETTE[1]),
        f"oracle (best step, {WITH_TRUTH})": (ious.max(axis=1), "-.", PALETTE[5]),
    }
    stopped = selection.choose(rollouts, selection.STOPS[name](at["threshold"]))
    gain = metrics.paired_difference(stopped, metrics.first_steps(rollouts), score, resampling)
    figure = _figure(7, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
    accuracy = {}
    for label, (values, line, color) in levels.items():
        accuracy[label] = 100 * float(metrics.is_right(values).mean())
        left.axhline(accuracy[label], ls=line, color=color, label=f"{label}: {accuracy[label]:.1f}")
    left.plot(
        [p["threshold"] for p in curve],
        [100 * p["acc50"] for p in curve],
        color=PALETTE[0],
        marker=".",
        label=f"rule: {name}",
    )
    left.plot(
        at["threshold"],
        100 * at["acc50"],
        "D",
        ms=10,
        mfc="none",
        mec="black",
        mew=2,
        label=f"at {at['threshold']:.2f}: {100 * at['acc50']:.1f}",
    )
    left.set(xlabel="threshold (0 to 1)", ylabel=f"Acc@0.5 (%), {split}" if split else "Acc@0.5 (%)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    bars = right.bar(range(len(at["answers"])), at["answers"], color=PALETTE[0], edgecolor="black")
    right.bar_label(bars)
    right.margins(y=0.15)
    right.set(xlabel="step that is answered with", ylabel="samples", xticks=range(len(at["answers"])))
    caption = (
        f"“{name}” at {at['threshold']:.2f}: Acc@0.5 {100 * at['acc50']:.1f} %, "
        f"{cell_text(gain, 100)} points more than the first answers (paired, 95 % interval)."
    )
    levels_told = "; ".join(f"{label} {value:.1f} %" for label, value in accuracy.items())
    stops = ", ".join(f"step {t}: {count}" for t, count in enumerate(at["answers"]))
    return figure, f"{caption} {levels_told}. Samples answered with {stops}.", caption


def image_of(records, rollout: Rollout):
    """Return the image that a rollout is about; ValueError when it is about none of the records."""
    number = numbered(records).get(rollout["id"])
    if number is None:
        raise ValueError(f"The rollout {rollout['id']!r} is about none of the records; give those it was made from.")
    return load_image(records[number]["image"])


def draw_answer(ax, image, box, truth, style: str = "") -> None:
    """Draw an image with an answer and the dashed truth; `style`: the answer as the student is shown it."""
    from matplotlib.patches import Rectangle

    ax.imshow(draw_box(image, box, style) if style else image)
    lines = [(truth, COLORS["truth"], 2, "--")]
    if not style:
        below = [(edges, "white", 4, "-") for edges in (box, truth)]  # so that both are seen on any picture
        lines = [*below, (box, COLORS["answer"], 2.2, "-"), *lines]
    for edges, color, width, dashes in lines:
        if edges is not None:
            x1, y1, x2, y2 = to_pixels(edges, *image.size)
            ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=color, ls=dashes, lw=width))
    ax.set(xticks=[], yticks=[])


def _figure(width: float, height: float):
    """Return a figure that no pyplot keeps: widgets make many."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _keys(answer: str = "answer") -> list:
    from matplotlib.patches import Patch

    return [
        Patch(fill=False, edgecolor=COLORS["truth"], ls="--", lw=2, label="ground truth"),
        Patch(fill=False, edgecolor=COLORS["answer"], lw=2, label=answer),
    ]


def _ious(rollout: Rollout) -> list[float]:
    return metrics.iou_matrix([rollout])[0].tolist()


def _state(step: Step, value: float) -> str:
    return f"IoU {value:.2f}" if step["box"] else "no box in the answer"

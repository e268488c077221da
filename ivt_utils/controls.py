"""Controls: what the student does when the box it is shown is not its own (the paper's second version).

Its step-0 answer stays as it was; only the drawn box changes. If the next answer depends on how good the shown box is,
the loop sees quality; if every drawn box moves it alike, the loop only sees that there is one.
"""

import math
import random

import numpy as np

from ivt_utils import metrics
from ivt_utils.boxes import ious, snap
from ivt_utils.metrics import Resampling
from ivt_utils.schema import Rollout

OWN = "own box"  # what the loop shows
RANDOM = "random box"
TRUTH = "true box (oracle)"  # nobody could show it without knowing the answer


# The second turn of notebook 1: what is said, and how the student's own box is drawn on the image that comes with it.
SECOND_TURNS = [(words, style) for words in ("feedback", "question") for style in ("none", "outline", "filled")]


def second_turn_stage(words: str, style: str) -> str:
    """Return the name of the stage that holds the base student's answers to one of `SECOND_TURNS`."""
    return f"second_{words}_{style}"


def second_turn_rows(answers: dict[tuple[str, str], list[Rollout]], resampling: Resampling) -> list[dict]:
    """Return one row for each of `SECOND_TURNS`, from rollouts of two steps: step 0 and the answer to that turn.

    A row: {"words", "style", and cells of `metrics`: "acc50", "miou" and "parsed" of the answer, "same" (the share
    whose box is that of step 0), "difference" (Acc@0.5 of the answer minus that of step 0, paired)}.
    """
    rows = []
    for (words, style), rollouts in answers.items():
        images, ious = [r["image_id"] for r in rollouts], metrics.iou_matrix(rollouts)
        right = metrics.is_right(ious)
        same = [r["steps"][1]["box"] is not None and r["steps"][0]["box"] == r["steps"][1]["box"] for r in rollouts]
        parts = [
            right[:, 1],
            ious[:, 1],
            metrics.parsed_matrix(rollouts)[:, 1],
            np.array(same),
            right[:, 1].astype(float) - right[:, 0],
        ]
        everyone = [np.ones(len(rollouts), bool)] * len(parts)
        cells = metrics.intervals(parts, everyone, images, resampling)
        keys = ("acc50", "miou", "parsed", "same", "difference")
        rows.append({"words": words, "style": style, **dict(zip(keys, cells, strict=True))})
    return rows


def names(shifts) -> list[str]:
    """Return the names of the controls, in the order of `shown_boxes`."""
    moved = [f"own box, moved by {share:.0%}" for share in shifts]
    return [OWN, "no box", RANDOM, "another sample's box", TRUTH, *moved]


def stage(method: str, control: str) -> str:
    """Return the name of the stage that holds a method's answers under a control."""
    return f"control_{method}_" + "".join(c if c.isalnum() else "_" for c in control)


def shown_boxes(rollouts: list[Rollout], shifts, seed: int, grid: int = 1) -> dict[str, list]:
    """Return, for each control, the box (0..1000, or None for the bare image) to show after each rollout's step 0.

    `shifts`: by which shares of its width and height the own box is moved, each in a random direction. A random box
    has the own box's size. No box leaves the image: near its edge one is moved by less. A rollout whose step 0 has no
    box is shown none, whatever the control.
    """
    rng = random.Random(f"controls {seed}")
    own = [rollout["steps"][0]["box"] for rollout in rollouts]
    boxes = [
        own,
        [None] * len(own),
        [box and _anywhere(rng, box, grid) for box in own],
        [box and _another(rollouts, i) for i, box in enumerate(own)],
        [box and snap(rollout["truth"], grid) for box, rollout in zip(own, rollouts, strict=True)],
        *([box and _moved(rng, box, share, grid) for box in own] for share in shifts),
    ]
    return dict(zip(names(shifts), boxes, strict=True))


def control_rows(answers: dict[str, list[Rollout]], resampling: Resampling) -> list[dict]:
    """Return one row a control from its rollouts (`loop.answer_again`): what was shown, and the answer after it.

    A row: {"control", and cells of `metrics`: "shown" (IoU of the shown box with the truth), "acc50" and "miou" of the
    answer, "follow" (IoU of answer and shown box), "difference" (Acc@0.5 minus that after the own box, paired)}. The
    value of "shown" and "follow" is None without a shown box.
    """
    rows = []
    for name, rollouts in answers.items():
        images, answer_ious = [r["image_id"] for r in rollouts], metrics.iou_matrix(rollouts)[:, 1]
        boxes, truths = [r["steps"][1]["shown"] for r in rollouts], [r["truth"] for r in rollouts]
        has_box, everyone = np.array([box is not None for box in boxes]), np.ones(len(boxes), dtype=bool)
        follow = ious(boxes, [r["steps"][1]["box"] for r in rollouts])
        parts = [ious(boxes, truths), metrics.is_right(answer_ious), answer_ious, follow]
        cells = metrics.intervals(parts, [has_box, everyone, everyone, has_box], images, resampling)
        gain = metrics.paired_difference(rollouts, answers[OWN], metrics.step_score("final", "acc50"), resampling)
        rows.append(
            {"control": name, **dict(zip(("shown", "acc50", "miou", "follow"), cells, strict=True)), "difference": gain}
        )
    return rows


def _anywhere(rng, box, grid):
    width, height = box[2] - box[0], box[3] - box[1]
    x, y = rng.uniform(0, 1000 - width), rng.uniform(0, 1000 - height)
    return snap((x, y, x + width, y + height), grid)


def _moved(rng, box, share: float, grid):
    angle = rng.uniform(0, 2 * math.pi)
    x, y = share * (box[2] - box[0]) * math.cos(angle), share * (box[3] - box[1]) * math.sin(angle)
    x, y = max(-box[0], min(x, 1000 - box[2])), max(-box[1], min(y, 1000 - box[3]))
    return snap((box[0] + x, box[1] + y, box[2] + x, box[3] + y), grid)


def _another(rollouts, i: int):
    """Return the step-0 box of the next rollout about another image that has one."""
    for k in range(1, len(rollouts)):
        other = rollouts[(i + k) % len(rollouts)]
        if other["image_id"] != rollouts[i]["image_id"] and other["steps"][0]["box"]:
            return other["steps"][0]["box"]
    raise ValueError("Another sample's box needs rollouts about at least two images.")

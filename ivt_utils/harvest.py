"""Error harvesting (section 3 of the paper): corrective trajectories that start from the student's OWN errors."""

import random

import numpy as np

from ivt_utils import protocol
from ivt_utils.boxes import iou, snap
from ivt_utils.schema import Rollout
from ivt_utils.teacher import geometric_trace, within_tolerance


def keep_errors(rollouts: list[Rollout], max_iou: float) -> list[Rollout]:
    """Return the rollouts whose step-0 box has an IoU in [0, `max_iou`]; an answer without a box cannot start one."""
    first = ((rollout, rollout["steps"][0]["box"]) for rollout in rollouts)
    return [rollout for rollout, box in first if box is not None and iou(box, rollout["truth"]) <= max_iou]


def straight_line(start, truth, turns: int, grid: int = 1) -> list[tuple[int, int, int, int]]:
    """Return `turns` boxes on the straight line from `start` (exclusive) to `truth` (inclusive), 0..1000."""
    shares = [k / turns for k in range(1, turns + 1)]
    return [snap([a + (b - a) * share for a, b in zip(start, truth, strict=True)], grid) for share in shares]


def trajectory(rollout: Rollout, turns: int, grid: int = 1, trace=geometric_trace, keep: bool = False) -> Rollout:
    """Return the rollout with its steps replaced by: the student's own answer, then `turns` corrected answers.

    An own answer that writes its box in another form (as with a label behind it) is put into the protocol's, which is
    to be learned.

    The box goes straight to the truth (paper). `keep` makes it our variant: a box that already fits, by the teacher's
    tolerance, stays as it is. `trace(box, truth)` says what is wrong with the box of the step before; None leaves the
    reasons out. Where the box stays, the reason is always `protocol.TRACE_FITS`, and nowhere else. ValueError for an
    answer without a box; `keep_errors` leaves those out.
    """
    first, truth = rollout["steps"][0], _truth(rollout)
    if first["box"] is None:
        raise ValueError(f"The answer to {rollout['id']!r} holds no box, so no trajectory can start from it.")
    form = protocol.answer_text(first["box"])
    steps = [first if form in first["text"] else {**first, "text": form}]
    for box in straight_line(steps[0]["box"], truth, turns, grid):
        previous = steps[-1]["box"]
        box = previous if keep and within_tolerance(previous, truth) else box
        if trace is None:
            reason = ""
        else:
            reason = protocol.TRACE_FITS if box == tuple(previous) else trace(previous, truth)
        steps.append({"text": protocol.answer_text(box, reason), "box": box})
    return {**rollout, "steps": steps}


def perturbed(rollout: Rollout, seed: int, grid: int = 1) -> Rollout:
    """Return the rollout with step 0 replaced by a random distortion of the truth, of the same IoU (an ablation).

    The distortion shifts and scales the true box in a random direction, as far as the IoU of the student's own error.
    """
    rng = random.Random(f"perturb {seed} {rollout['id']}")
    truth, goal = _truth(rollout), iou(rollout["steps"][0]["box"], rollout["truth"])
    width, height = truth[2] - truth[0], truth[3] - truth[1]
    push = [rng.gauss(0, 1) * size for size in (width, height, width, height)]
    low, high = 0.0, 4.0
    for _ in range(25):  # bisection: the IoU falls with the size of the push
        middle = (low + high) / 2
        box = snap([v + middle * p for v, p in zip(truth, push, strict=True)], grid)
        low, high = (middle, high) if iou(box, truth) > goal else (low, middle)
    text = protocol.answer_text(box)
    return {**rollout, "steps": [{"text": text, "box": box}, *rollout["steps"][1:]]}


def _truth(rollout: Rollout) -> list[float]:
    """Return the truth with all its 32 bits, of which a rollout notes the shortest decimals: near ties hang on them."""
    return np.array(rollout["truth"], dtype=np.float32).tolist()

"""The exercise of notebook 6: a rule that chooses a step without the truth."""

from ivt_utils.boxes import iou
from ivt_utils.exercises import Exercise


def my_stop_rule(boxes, threshold):
    """Return the index of the step to answer with.

    boxes: the box of each step as (x1, y1, x2, y2), or None where the answer did not parse.
    threshold: the IoU, above 0 and up to 1, from which on two boxes agree.
    """
    for step in range(1, len(boxes)):
        if iou(boxes[step], boxes[step - 1]) >= threshold:
            return step
    return len(boxes) - 1


# ------------------------------------------------------------------------------------------------ random inputs
PLACES = ((0, 0, 100, 100), (400, 100, 600, 500), (300, 600, 900, 700))


def _steps(rng):
    """Return the boxes of one to five steps, often None, or with exactly the threshold as IoU to the one before."""
    threshold, boxes = rng.choice([0.25, 0.5, 0.8]), []
    for _ in range(rng.choice([1, 2, 3, 3, 4, 5])):
        x1, y1, x2, y2 = rng.choice([box for box in boxes[-1:] if box] or PLACES)
        part = (x1, y1, x1 + round((x2 - x1) * rng.choice([threshold, threshold, 0.9, 0.1])), y2)
        boxes.append(rng.choice([None, part, part, rng.choice(PLACES), rng.choice(boxes or PLACES)]))
    return boxes, threshold


# ------------------------------------------------------------------------------------------------ usual mistakes
def _agreements(boxes, threshold):
    return [step for step in range(1, len(boxes)) if iou(boxes[step], boxes[step - 1]) >= threshold]


def _first(steps, otherwise):
    return next(iter(steps), otherwise)


def _any_before(boxes, threshold):
    agree = (t for t in range(1, len(boxes)) if any(iou(boxes[t], box) >= threshold for box in boxes[:t]))
    return _first(agree, len(boxes) - 1)


def _closest_pair(boxes, threshold):
    pairs = [iou(box, before) for before, box in zip(boxes, boxes[1:], strict=False)]
    return 1 + pairs.index(max(pairs)) if pairs else 0


EXERCISES = (
    Exercise(
        title="stop when two boxes agree",
        minutes=5,
        task="""
            A stopping rule sees the steps of one rollout and never the truth. This one trusts a student that repeats
            itself: go through the steps in order and stop at the **first** step whose box has an IoU of at least
            `threshold` with the box of the step **before** it; answer with that step. When no two neighbors agree,
            answer with the last step. A step without a box is `None` and agrees with nothing. `iou(a, b)` is imported
            in the cell below: it gives 0.0 where either box is `None`.
        """,
        hints=(
            "Step 0 has no step before it: which is the first step that could agree with anything?",
            "A loop over the steps from 1 on that compares `boxes[step]` with `boxes[step - 1]` and returns at once. "
            "What stands after the loop is for the case that nothing agreed.",
            "`for step in range(1, len(boxes)):` with `if iou(boxes[step], boxes[step - 1]) >= threshold: return "
            "step`, and `return len(boxes) - 1` below the loop.",
        ),
        solution=my_stop_rule,
        inputs=_steps,
        imports="from ivt_utils.boxes import iou",
        mistakes={
            "You compare with the first box instead of the one before.": lambda boxes, threshold: _first(
                (t for t in range(1, len(boxes)) if iou(boxes[t], boxes[0]) >= threshold), len(boxes) - 1
            ),
            "You compare with every earlier box; only the one right before it counts.": _any_before,
            "You ask for more than the threshold: an IoU that equals it is enough.": lambda boxes, threshold: _first(
                (t for t in range(1, len(boxes)) if iou(boxes[t], boxes[t - 1]) > threshold), len(boxes) - 1
            ),
            "You answer with the earlier of the two boxes; the rule takes the one that confirms it.": lambda boxes, threshold: (
                _first((t - 1 for t in _agreements(boxes, threshold)), len(boxes) - 1)
            ),
            "You go on after an agreement and take the last one; stop at the first.": lambda boxes, threshold: _first(
                _agreements(boxes, threshold)[::-1], len(boxes) - 1
            ),
            "You answer with step 0 when nothing agrees; this rule then takes the last step.": lambda boxes, threshold: (
                _first(_agreements(boxes, threshold), 0)
            ),
            "You return nothing when no two boxes agree; add the last step below the loop.": lambda boxes, threshold: (
                _first(_agreements(boxes, threshold), None)
            ),
            "You return one step too many when nothing agrees: the last index is the length minus 1.": lambda boxes, threshold: (
                _first(_agreements(boxes, threshold), len(boxes))
            ),
            "You start at step 0, where `boxes[-1]` is the last box and not an earlier one.": lambda boxes, threshold: (
                _first((t for t in range(len(boxes)) if iou(boxes[t], boxes[t - 1]) >= threshold), len(boxes) - 1)
            ),
            "You take two missing boxes for an agreement.": lambda boxes, threshold: _first(
                (
                    t
                    for t in range(1, len(boxes))
                    if boxes[t] == boxes[t - 1] or iou(boxes[t], boxes[t - 1]) >= threshold
                ),
                len(boxes) - 1,
            ),
            "You look for the closest pair of all; stop at the first pair that is close enough.": _closest_pair,
        },
    ),
)

"""Controls: what the student does when the box it is shown is not its own (the paper's second version).

Its step-0 answer stays as it was; only the drawn box changes. If the next answer depends on how good the shown box is,
the loop sees quality; if every drawn box moves it alike, the loop only sees that there is one.
"""

import math
import random

from ivt_utils.boxes import snap

TRUTH = "true box (oracle)"  # nobody could show it without knowing the answer


def shown_boxes(rollouts: list[dict], shifts, seed: int, grid: int = 1) -> dict[str, list]:
    """Return, for each control, the box (0..1000, or None for the bare image) to show after each rollout's step 0.

    `shifts`: by which shares of its width and height the own box is moved, each in a random direction. A random box
    has the own box's size. No box leaves the image: near its edge one is moved by less. A rollout whose step 0 has no
    box is shown none, whatever the control.
    """
    rng = random.Random(f"controls {seed}")
    own = [rollout["steps"][0]["box"] for rollout in rollouts]
    boxes = {
        "own box": own,
        "no box": [None] * len(own),
        "random box": [box and _anywhere(rng, box, grid) for box in own],
        "another sample's box": [box and _another(rollouts, i) for i, box in enumerate(own)],
        TRUTH: [box and snap(rollout["truth"], grid) for box, rollout in zip(own, rollouts, strict=True)],
    }
    for share in shifts:
        boxes[f"own box, moved by {share:.0%}"] = [box and _moved(rng, box, share, grid) for box in own]
    return boxes


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

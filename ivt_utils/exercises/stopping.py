"""The exercises of notebook 6: rules that choose a step without the truth, a fair comparison, and a closer look."""

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


def my_consensus(ious):
    """Return the index of the step whose box has the highest mean IoU with the boxes of the other steps.

    ious: a square list of lists; ious[i][j] is the IoU of the boxes of steps i and j, so ious[i][i] is 1.
    """
    means = [(sum(row) - row[i]) / (len(row) - 1) for i, row in enumerate(ious)]
    return means.index(max(means))


def my_discordant(a, b):
    """Return (gained, lost): how many samples only method a gets right, and how many only method b does.

    a, b: lists of booleans as long as each other, True where the method gets this sample right (IoU >= 0.5).
    """
    gained = sum(right_a and not right_b for right_a, right_b in zip(a, b))
    lost = sum(right_b and not right_a for right_a, right_b in zip(a, b))
    return gained, lost


def my_back_to_image(box, part):
    """Return a box that was given relative to a part of the image as a box of the image, four numbers 0 to 1000.

    box: (x1, y1, x2, y2), 0 to 1000 of the part's own width and height.
    part: (x1, y1, x2, y2), the part as a box of the image, 0 to 1000.
    """
    left, top = part[0], part[1]
    width, height = part[2] - part[0], part[3] - part[1]
    x1, y1, x2, y2 = box
    return left + x1 * width / 1000, top + y1 * height / 1000, left + x2 * width / 1000, top + y2 * height / 1000


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


def _overlaps(rng):
    """Return a symmetric matrix of IoUs with a diagonal of 1; their sums are exact, and often equal."""
    count, parts = rng.randint(2, 5), rng.choice([4, 64])
    rows = [[1.0] * count for _ in range(count)]
    for i in range(count):
        for j in range(i):
            rows[i][j] = rows[j][i] = rng.randint(0, parts) / parts
    return (rows,)


def _right(rng):
    count = rng.randint(1, 9)
    a, b = (rng.choices([True, False], weights=(3, 2), k=count) for _ in range(2))
    return rng.choice([(a, b), (a, b), (a, b), (a, list(a))])


def _box(rng):
    (x1, x2), (y1, y2) = (sorted(rng.sample(range(0, 1001, 10), 2)) for _ in range(2))
    return x1, y1, x2, y2


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


def _others(ious):
    return [[value for j, value in enumerate(row) if j != i] for i, row in enumerate(ious)]


def _highest(values):
    return values.index(max(values))


def _counts(a, b):
    pairs = [*zip(a, b)]
    return {kind: pairs.count(kind) for kind in ((True, True), (True, False), (False, True), (False, False))}


def _net(a, b):
    return max(0, sum(a) - sum(b)), max(0, sum(b) - sum(a))


def _into_part(box, part):
    sides = (part[2] - part[0], part[3] - part[1]) * 2
    return tuple((v - low) * 1000 / side for v, low, side in zip(box, part[:2] * 2, sides))


def _placed(box, corners, sides):
    return tuple(low + v * side / 1000 for v, low, side in zip(box, corners, sides))


def _sides(part):
    return (part[2] - part[0], part[3] - part[1]) * 2


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
    Exercise(
        title="the consensus of the steps",
        minutes=5,
        task="""
            Another rule without the truth: answer with the box on which the steps agree most. You get the IoU of
            every pair of steps as a square matrix (a list of rows). Return the index of the step with the highest
            mean IoU with the **other** steps; if several tie, return the first. There are at least two steps, and each
            has a box.
        """,
        hints=(
            "Row i holds everything about step i. One item in it is the step's IoU with itself, always 1.",
            "For each row: the sum without its own item on the diagonal, divided by the number of the other steps. "
            "Then the position of the largest mean.",
            "`means = [(sum(row) - row[i]) / (len(row) - 1) for i, row in enumerate(ious)]`; `means.index(...)` "
            "finds the first position of a value.",
        ),
        solution=my_consensus,
        inputs=_overlaps,
        mistakes={
            "You take the step with the closest single neighbor; the mean over all others counts.": lambda ious: (
                _highest([max(row) for row in _others(ious)])
            ),
            "You take the last of equals; take the first.": lambda ious: (
                len(ious) - 1 - _highest([sum(row) for row in _others(ious)][::-1])
            ),
            "You take the lowest mean: that is the step that the others contradict.": lambda ious: _highest(
                [-sum(row) for row in _others(ious)]
            ),
            "You look for the largest item of all, which is a box with itself: you answer with step 0 every time.": lambda ious: (
                0
            ),
            "You compare a step with the earlier ones only; the later ones count as well.": lambda ious: _highest(
                [sum(row[:i]) / max(1, i) for i, row in enumerate(ious)]
            ),
            "You compare a step with its neighbors in time only; all other steps count.": lambda ious: _highest(
                [sum(row[max(0, i - 1) : i + 2]) for i, row in enumerate(ious)]
            ),
            "You ask for the largest smallest IoU; take the mean over the others.": lambda ious: _highest(
                [min(row) for row in _others(ious)]
            ),
            "You give the mean IoU itself; return the index of its step.": lambda ious: max(
                sum(row) / len(row) for row in _others(ious)
            ),
        },
    ),
    Exercise(
        title="discordant samples",
        minutes=3,
        task="""
            Samples that both methods get right, or both wrong, say nothing about which one is better. **McNemar's
            test** looks at the others, the *discordant* ones. Count them by kind: **gained** are the samples that
            only `a` gets right, **lost** those that only `b` gets right. If the methods were equally good, each
            discordant sample would fall on either side like a fair coin; the test asks how likely a coin is to fall
            as unevenly as your two counts.
        """,
        hints=(
            "A sample is one of four kinds (a right or wrong, b right or wrong). Which two are asked for?",
            "Count the samples with a right and b wrong, then those with b right and a wrong. `zip` walks along both "
            "lists.",
            "`sum(right_a and not right_b for right_a, right_b in zip(a, b))` is the number of gained samples; the "
            "lost ones go the other way round.",
        ),
        solution=my_discordant,
        inputs=_right,
        mistakes={
            "You have gained and lost the wrong way round: gained is what only a gets right.": lambda a, b: (
                my_discordant(b, a)
            ),
            "You count all that each method gets right; leave out what both get right.": lambda a, b: (sum(a), sum(b)),
            "You give the net difference: gains and losses cancel in it, and the test needs both.": _net,
            "You count the samples on which both agree (both right, both wrong); the others are discordant.": lambda a, b: (
                _counts(a, b)[True, True],
                _counts(a, b)[False, False],
            ),
            "You give shares; the test needs counts.": lambda a, b: tuple(
                count / len(a) for count in my_discordant(a, b)
            ),
            "You give the number of all discordant samples second; give the lost ones.": lambda a, b: (
                my_discordant(a, b)[0],
                sum(my_discordant(a, b)),
            ),
            "You return one number, the discordant samples of both kinds; return the two kinds apart.": lambda a, b: (
                sum(my_discordant(a, b))
            ),
        },
    ),
    Exercise(
        title="from the closer look back to the image",
        minutes=5,
        task="""
            In a closer look the student sees a part of the image, enlarged, and answers in 0 to 1000 **of that
            part**. To score the answer it must be put back in its place. `part` is the part as a box of the image: it
            starts at (x1, y1) and is x2 - x1 wide and y2 - y1 high. Return the four numbers of the answer as a box of
            the image, in the order x1, y1, x2, y2, as floats: do not round. The part need not be square.
        """,
        hints=(
            "Try it in your head: (0, 0, 1000, 1000) must come out as `part` itself.",
            "Each coordinate: the share of the part (number / 1000) times the part's width or height, plus where the "
            "part begins. x goes with the width and the left edge, y with the height and the top edge.",
            "x: `part[0] + x * (part[2] - part[0]) / 1000`; y: `part[1] + y * (part[3] - part[1]) / 1000`; the same "
            "for both corners.",
        ),
        solution=my_back_to_image,
        inputs=lambda rng: (_box(rng), rng.choice([_box(rng), _box(rng), _box(rng), (0, 0, 1000, 1000)])),
        mistakes={
            "You scale the box but leave it at the image's corner: add where the part begins.": lambda box, part: (
                _placed(box, (0, 0) * 2, _sides(part))
            ),
            "You move the box but do not scale it: 1000 of the part is only the part's width in the image.": lambda box, part: (
                _placed(box, part[:2] * 2, (1000,) * 4)
            ),
            "You scale by the part's right and lower edge; scale by its width and height.": lambda box, part: _placed(
                box, part[:2] * 2, part[2:] * 2
            ),
            "You scale x and y by the width: the part need not be square.": lambda box, part: _placed(
                box, part[:2] * 2, _sides(part)[:1] * 4
            ),
            "You take x for y: x goes with the width and the left edge, y with the height and the top edge.": lambda box, part: (
                _placed(box, part[1::-1] * 2, _sides(part)[1::-1] * 2)
            ),
            "You move only the first corner; both corners begin at the part's corner.": lambda box, part: _placed(
                box, (*part[:2], 0, 0), _sides(part)
            ),
            "You begin at the part's far corner for x2 and y2; both corners begin at its first one.": lambda box, part: (
                _placed(box, part, _sides(part))
            ),
            "You go the other way, from the image into the part.": _into_part,
            "You round to integers; return the floats as they are.": lambda box, part: tuple(
                map(round, my_back_to_image(box, part))
            ),
            "You add the part's corner before you scale: scale first, then add.": lambda box, part: tuple(
                (v + low) * side / 1000 for v, low, side in zip(box, part[:2] * 2, _sides(part))
            ),
        },
    ),
)

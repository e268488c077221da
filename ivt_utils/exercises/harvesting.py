"""The exercises of notebook 2: the way from an error to the truth, and what a trace says."""

from ivt_utils.exercises import Exercise
from ivt_utils.exercises.gap import random_box
from ivt_utils.protocol import PROBLEMS


def my_straight_line(start, truth, turns):
    """Return `turns` boxes (x1, y1, x2, y2), 0..1000, in equal steps from `start` (left out) to `truth` (included)."""
    boxes = []
    for k in range(1, turns + 1):
        boxes.append([a + (b - a) * k / turns for a, b in zip(start, truth)])
    return boxes


def my_trace(box, truth):
    """Return what is wrong with where a box lies, such as "It is too high: move down."; both boxes are 0..1000."""
    x = (truth[0] + truth[2] - box[0] - box[2]) / 2 / (truth[2] - truth[0])
    y = (truth[1] + truth[3] - box[1] - box[3]) / 2 / (truth[3] - truth[1])
    if max(abs(x), abs(y)) <= 0.1:
        return "It fits: keep it."
    if abs(x) > abs(y):
        words = "too far left" if x > 0 else "too far right"
    else:
        words = "too high" if y > 0 else "too low"
    return f"It is {words}: {PROBLEMS[words]}."


# ------------------------------------------------------------------------------------------------ random arguments
def _way(rng):
    start, truth = random_box(rng), random_box(rng)
    return rng.choice([start, start, start, truth]), list(truth), rng.randint(1, 4)


def _error(rng):
    """Return a box and a truth: the center a little off, exactly a tenth off, far off; sizes differ, both even."""
    while True:
        width, height = (2 * rng.choice([10, 25, 30, 50, 75]) for _ in range(2))
        x, y = rng.randint(300, 700), rng.randint(300, 700)
        truth = x - width // 2, y - height // 2, x + width // 2, y + height // 2
        far = [rng.choices(range(-size, size + 1), k=3) for size in (width, height)]
        dx, dy = (rng.choice([0, s // 10, -s // 10, *more]) for s, more in zip((width, height), far))
        half_width, half_height = rng.choice([(width // 2, height // 2), (rng.randint(5, 90), rng.randint(5, 90))])
        box = x + dx - half_width, y + dy - half_height, x + dx + half_width, y + dy + half_height
        if abs(dx) * height != abs(dy) * width or abs(dx) * 10 <= width:  # no tie between two errors
            return box, truth


# ------------------------------------------------------------------------------------------------ known mistakes
def _half_of_the_rest(start, truth, turns):
    boxes = [start]
    for _ in range(turns):
        boxes.append([(a + b) / 2 for a, b in zip(boxes[-1], truth)])
    return boxes[1:]


def _said(x, y, limit=0.1):
    if max(abs(x), abs(y)) <= limit:
        return "It fits: keep it."
    words = ("too far left" if x > 0 else "too far right") if abs(x) > abs(y) else "too high" if y > 0 else "too low"
    return f"It is {words}: {PROBLEMS[words]}."


def _offsets(box, truth):
    """Return how far the truth's center lies right of the box's, and below it, 0..1000."""
    return (truth[0] + truth[2] - box[0] - box[2]) / 2, (truth[1] + truth[3] - box[1] - box[3]) / 2


def _larger_x(x, y):
    return (x, 0) if abs(x) > 0.1 else (x, y)


def _shares(box, truth, of=None):
    (x, y), of = _offsets(box, truth), of or truth
    return x / (of[2] - of[0]), y / (of[3] - of[1])


def _by_corners(box, truth):
    return _said((truth[0] - box[0]) / (truth[2] - truth[0]), (truth[1] - box[1]) / (truth[3] - truth[1]))


def _by_length(box, truth):
    x, y = _offsets(box, truth)
    share = max(map(abs, _shares(box, truth)))
    return _said(x, y, limit=0) if share > 0.1 else _said(0, 0)


def _a_tenth_is_wrong(box, truth):
    return _said(*_shares(box, truth), limit=0.1 - 1e-9)


EXERCISES = (
    Exercise(
        title="from the error to the truth",
        minutes=5,
        task="""
            A trajectory starts at the student's own box and moves to the truth in a straight line, in equal steps.
            Return the list of the `turns` boxes that come after `start`. The last one is the truth; `start` itself is
            not in the list. With `turns = 2` the first box lies half way; with `turns = 1` there is only the truth. All
            boxes are `(x1, y1, x2, y2)`, 0..1000. Do not round.
        """,
        hints=(
            "Which share of the way is behind you after k of `turns` equal steps?",
            """Every coordinate moves by itself. After k steps it stands at start + (truth - start) * k / turns, and k
            runs from 1 (not 0) up to and including `turns`.""",
            """For each `k in range(1, turns + 1)` make one box:
            `[a + (b - a) * k / turns for a, b in zip(start, truth)]`. Collect the boxes in a list and return it.""",
        ),
        solution=my_straight_line,
        inputs=_way,
        mistakes={
            "You begin with the start and stop before the truth; count the steps from 1 to `turns`.": lambda start, truth, turns: [
                start,
                *my_straight_line(start, truth, turns)[:-1],
            ],
            "You have the start in your list; it is the student's own answer, the list begins after it.": lambda start, truth, turns: [
                start,
                *my_straight_line(start, truth, turns),
            ],
            "You stop before the truth: divide the way by `turns`, not by `turns + 1`.": lambda start, truth, turns: (
                my_straight_line(start, truth, turns + 1)[:-1]
            ),
            "You go half of what is left each time, and so you never arrive.": _half_of_the_rest,
            "You are at the truth at once; the paper moves there in equal steps.": lambda start, truth, turns: (
                [truth] * turns
            ),
            "You add a share of the truth; add a share of the way, truth minus start.": lambda start, truth, turns: [
                [a + b * k / turns for a, b in zip(start, truth)] for k in range(1, turns + 1)
            ],
            "You round to whole numbers; do not round.": lambda start, truth, turns: [
                [round(v) for v in box] for box in my_straight_line(start, truth, turns)
            ],
            "You go from the truth to the start.": lambda start, truth, turns: my_straight_line(truth, start, turns),
        },
    ),
    Exercise(
        title="say what is wrong",
        minutes=8,
        task="""
            Before each corrected box stands a trace. Write a small teacher that looks at **where the box lies** only.
            Take how far the box's center is from the truth's center, horizontally as a share of the truth's width and
            vertically as a share of the truth's height. If neither is more than 0.1, return `"It fits: keep it."`. Else
            name the larger one: `"too far left"`, `"too far right"`, `"too high"` or `"too low"`, in a sentence such as
            `"It is too high: move down."`; `PROBLEMS["too high"]` is `"move down"`. Remember that y grows downwards.
            (Up to 0.1 a box fits in a variant of notebook 3, too; the package's teacher, below, is stricter.)
        """,
        hints=(
            "The center of a box is ((x1 + x2) / 2, (y1 + y2) / 2). If the truth's x is larger, which way is it off?",
            """Compute x = (truth's center - box's center) / truth's width, and y likewise with the height. Compare
            their absolute values with 0.1, then with each other. The sign says on which side the box lies: x above 0
            is too far left, y above 0 is too high.""",
            """`x = (truth[0] + truth[2] - box[0] - box[2]) / 2 / (truth[2] - truth[0])`, `y` the same with 1 and 3.
            First `if max(abs(x), abs(y)) <= 0.1:`. Then, if `abs(x) > abs(y)`, the words are `"too far left"` for
            x > 0, else `"too far right"`; otherwise `"too high"` for y > 0, else `"too low"`. Return
            `f"It is {words}: {PROBLEMS[words]}."`.""",
        ),
        solution=my_trace,
        inputs=_error,
        imports="from ivt_utils.protocol import PROBLEMS",
        mistakes={
            "You say on which side of the box the truth lies; say on which side of the truth the box lies.": lambda box, truth: (
                _said(*(-v for v in _shares(box, truth)))
            ),
            "You look at x first; when both are off, name the larger error.": lambda box, truth: _said(
                *_larger_x(*_shares(box, truth))
            ),
            "Your y axis points up; in an image y grows downwards.": lambda box, truth: _said(
                _shares(box, truth)[0], -_shares(box, truth)[1]
            ),
            "You compare the upper left corners; compare the centers.": _by_corners,
            "You compare the errors as lengths; compare them as shares of the truth's width and height.": _by_length,
            "You divide by the width and height of the box; divide by those of the truth.": lambda box, truth: _said(
                *_shares(box, truth, of=box)
            ),
            "You divide both errors by the truth's width; the vertical one needs its height.": lambda box, truth: _said(
                *(v / (truth[2] - truth[0]) for v in _offsets(box, truth))
            ),
            "You correct an error of exactly 0.1; only more than 0.1 is worth a word.": _a_tenth_is_wrong,
            "You always find an error; up to 0.1 the box fits.": lambda box, truth: _said(
                *_shares(box, truth), limit=-1
            ),
        },
    ),
)

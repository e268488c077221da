"""The teacher: each trace is read back, word by word, and compared with the boxes it was written from."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ivt_utils import protocol, teacher
from ivt_utils.profiles import TEACHER_TOLERANCE

# What each phrase claims, in numbers: (shown box, true box) -> error as a share of the true width or height,
# positive when the phrase is right; and how its advice changes the box.
CLAIMS = {
    "too far left": lambda b, t: (middle(t, 0) - middle(b, 0)) / side(t, 0),
    "too far right": lambda b, t: (middle(b, 0) - middle(t, 0)) / side(t, 0),
    "too high": lambda b, t: (middle(t, 1) - middle(b, 1)) / side(t, 1),
    "too low": lambda b, t: (middle(b, 1) - middle(t, 1)) / side(t, 1),
    "too narrow": lambda b, t: (side(t, 0) - side(b, 0)) / side(t, 0),
    "too wide": lambda b, t: (side(b, 0) - side(t, 0)) / side(t, 0),
    "too short": lambda b, t: (side(t, 1) - side(b, 1)) / side(t, 1),
    "too tall": lambda b, t: (side(b, 1) - side(t, 1)) / side(t, 1),
}
ADVICE = {
    "move right": (1, 0, 1, 0),
    "move left": (-1, 0, -1, 0),
    "move down": (0, 1, 0, 1),
    "move up": (0, -1, 0, -1),
    "make it wider": (-1, 0, 1, 0),
    "make it narrower": (1, 0, -1, 0),
    "make it taller": (0, -1, 0, 1),
    "make it shorter": (0, 1, 0, -1),
}
SLACK = 1e-9


def middle(box, axis):
    return (box[axis] + box[axis + 2]) / 2


def side(box, axis):
    return box[axis + 2] - box[axis]


def read(trace: str) -> list[tuple[str, str]]:
    """The (problem, advice) pairs of a trace; an assertion fails for text in any other form."""
    if trace == "It fits: keep it.":
        return []
    found = re.fullmatch(r"It is ([a-z ]+): ([a-z ]+)\.", trace)
    assert found, trace
    wrong, advice = (part.split(" and ") for part in found.groups())
    assert len(wrong) == len(advice) and set(wrong) <= CLAIMS.keys() and set(advice) <= ADVICE.keys(), trace
    return list(zip(wrong, advice, strict=True))


@st.composite
def box_and_truth(draw):
    """A model's box and a true one, near each other or anywhere."""
    low = [draw(st.floats(0, 900)) for _ in range(2)]
    truth = [*low, *(draw(st.floats(v + 20, 1000)) for v in low)]
    spread = draw(st.sampled_from((20, 60, 1000)))
    near = [min(1000, max(0, round(v + draw(st.floats(-spread, spread))))) for v in truth]
    (x1, x2), (y1, y2) = sorted(near[::2]), sorted(near[1::2])
    return (x1, y1, x2 + (x1 == x2), y2 + (y1 == y2)), truth


@settings(max_examples=500)
@given(box_and_truth())
def test_a_trace_says_what_is_true(pair):
    box, truth = pair
    errors = {phrase: claim(box, truth) for phrase, claim in CLAIMS.items()}
    worst = max(errors, key=errors.get)
    pairs = read(teacher.geometric_trace(box, truth))
    assert len(pairs) <= 2
    for place, (phrase, advice) in enumerate(pairs):
        assert errors[phrase] > (TEACHER_TOLERANCE if place else 0) - SLACK
        moved = [v + step * 1e-3 for v, step in zip(box, ADVICE[advice], strict=True)]
        assert CLAIMS[phrase](moved, truth) < errors[phrase]  # following the advice makes it less wrong
    assert (
        teacher.within_tolerance(box, truth) == (errors[worst] <= TEACHER_TOLERANCE) or abs(errors[worst] - 0.1) < SLACK
    )
    if not pairs:
        assert errors[worst] <= SLACK
    else:
        named = [errors[phrase] for phrase, _ in pairs]
        assert max(named) >= errors[worst] - SLACK
        left_out = sorted((e for phrase, e in errors.items() if phrase not in dict(pairs)), reverse=True)
        assert left_out[0] <= min(named) + SLACK or len(pairs) == 1 and left_out[0] <= TEACHER_TOLERANCE + SLACK


@given(box_and_truth())
def test_the_true_box_fits(pair):
    truth = pair[1]
    assert teacher.geometric_trace(truth, truth) == protocol.TRACE_FITS == "It fits: keep it."
    assert teacher.within_tolerance(truth, truth)


@pytest.mark.parametrize(
    "box, trace",
    [
        ((100, 100, 200, 200), "It fits: keep it."),
        ((104, 95, 204, 195), "It is too high: move down."),  # a small error is named where there is no larger one
        ((101, 100, 201, 200), "It is too far right: move left."),
        ((95, 160, 195, 260), "It is too low: move up."),  # beside a large one it is not
        ((40, 100, 140, 200), "It is too far left: move right."),
        ((160, 100, 260, 200), "It is too far right: move left."),
        ((100, 70, 200, 170), "It is too high: move down."),
        ((100, 130, 200, 230), "It is too low: move up."),
        ((130, 100, 170, 200), "It is too narrow: make it wider."),
        ((50, 100, 250, 200), "It is too wide: make it narrower."),
        ((100, 130, 200, 170), "It is too short: make it taller."),
        ((100, 50, 200, 250), "It is too tall: make it shorter."),
        ((120, 180, 220, 280), "It is too low and too far right: move up and move left."),
        ((500, 500, 900, 900), "It is too far right and too low: move left and move up."),
    ],
)
def test_each_direction_by_name(box, trace):
    assert teacher.geometric_trace(box, (100, 100, 200, 200)) == trace


def test_every_phrase_of_the_protocol_can_be_read():
    assert set(protocol.PROBLEMS) == set(CLAIMS)
    assert set(protocol.PROBLEMS.values()) == set(ADVICE)

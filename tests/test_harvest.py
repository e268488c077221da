"""Harvest: which errors are kept, and trajectories that lead from the student's own box straight to the truth."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ivt_utils import harvest, protocol
from ivt_utils.boxes import iou, parse_answer, snap, valid
from ivt_utils.profiles import get_profile
from ivt_utils.runtime.store import REFERENCE
from ivt_utils.show.reading import read_rollouts
from ivt_utils.teacher import geometric_trace, within_tolerance

TRUTH = [100.0, 100.0, 300.0, 300.0]


def rollout(box, truth=TRUTH, name="a-0"):
    text = "no box" if box is None else protocol.answer_text(box)
    steps = [{"text": text, "box": box}, {"text": "second", "box": (0, 0, 10, 10)}]
    return {
        "id": name,
        "image_id": "a",
        "subset": "attributes",
        "expression": "the star",
        "truth": truth,
        "steps": steps,
    }


@st.composite
def grid_boxes(draw):
    x, y = draw(st.integers(0, 98)), draw(st.integers(0, 98))
    right, bottom = draw(st.integers(x + 1, 100)), draw(st.integers(y + 1, 100))
    return x * 10, y * 10, right * 10, bottom * 10


def test_errors_up_to_the_limit_are_kept_and_answers_without_a_box_are_not():
    boxes = {
        "exact": (100, 100, 300, 300),
        "close": (100, 100, 300, 280),
        "at": (100, 100, 300, 270),
        "wrong": (100, 100, 300, 200),
        "elsewhere": (500, 500, 600, 600),
        "none": None,
    }
    assert iou(boxes["at"], TRUTH) == 0.85
    rollouts = [rollout(box, name=name) for name, box in boxes.items()]
    assert [r["id"] for r in harvest.keep_errors(rollouts, 0.85)] == ["at", "wrong", "elsewhere"]
    assert [r["id"] for r in harvest.keep_errors(rollouts, 0.0)] == ["elsewhere"]
    assert [r["id"] for r in harvest.keep_errors(rollouts, 1.0)] == [*boxes][:-1]


@given(grid_boxes(), grid_boxes(), st.integers(1, 4), st.sampled_from((1, 10)))
def test_a_straight_line_in_equal_steps_that_ends_on_the_truth(start, truth, turns, grid):
    line = harvest.straight_line(start, truth, turns, grid)
    assert len(line) == turns and line[-1] == truth and all(valid(box) for box in line)
    for k, box in enumerate(line, 1):
        for a, b, v in zip(start, truth, box, strict=True):
            assert abs(v - (a + (b - a) * k / turns)) <= grid and v % grid == 0


def test_an_own_answer_in_another_form_is_put_into_the_one_to_learn():
    own = rollout((0, 0, 10, 10))
    own["steps"][0]["text"] = '[{"bbox_2d": [0, 0, 10, 10], "label": "star"}]'
    assert harvest.trajectory(own, 0)["steps"] == [{"text": '{"bbox_2d": [0, 0, 10, 10]}', "box": (0, 0, 10, 10)}]


def test_no_turn_is_no_step():
    assert harvest.straight_line((0, 0, 10, 10), TRUTH, 0) == []
    assert harvest.trajectory(rollout((0, 0, 10, 10)), 0)["steps"] == rollout((0, 0, 10, 10))["steps"][:1]


@given(grid_boxes(), grid_boxes(), st.integers(1, 3))
def test_a_trajectory_starts_with_the_students_own_answer_and_corrects_it(box, truth, turns):
    own = rollout(box, [float(v) for v in truth])
    own["steps"][0]["text"] = "in its own words " + own["steps"][0]["text"]
    made = harvest.trajectory(own, turns, 10)
    assert {**made, "steps": None} == {**own, "steps": None}
    assert made["steps"][0] == own["steps"][0] and len(made["steps"]) == turns + 1
    line = harvest.straight_line(box, truth, turns, 10)
    for before, step, ahead in zip(made["steps"], made["steps"][1:], line, strict=False):
        assert parse_answer(step["text"]) == step["box"] == ahead
        stays = step["box"] == before["box"]
        assert step["text"].startswith(protocol.TRACE_FITS) == stays  # it says "keep it" exactly when it keeps it
        trace = protocol.TRACE_FITS if stays else geometric_trace(before["box"], truth)
        assert step["text"] == protocol.answer_text(step["box"], trace)


@given(grid_boxes(), grid_boxes(), st.integers(1, 3))
def test_the_variant_keeps_a_box_that_fits_and_says_so(box, truth, turns):
    own = rollout(box, [float(v) for v in truth])
    made = harvest.trajectory(own, turns, 10, keep=True)["steps"]
    line = harvest.straight_line(box, truth, turns, 10)
    for before, step, ahead in zip(made, made[1:], line, strict=False):
        assert step["box"] == (before["box"] if within_tolerance(before["box"], truth) else ahead)
        assert step["text"].startswith(protocol.TRACE_FITS) == (step["box"] == before["box"])


def test_a_box_that_fits_is_kept_by_the_variant_alone_with_and_without_words():
    def boxes(*arguments, **keep):
        return [step["box"] for step in harvest.trajectory(*arguments, **keep)["steps"]]

    for teacher in (geometric_trace, None):
        near, far = (110, 110, 310, 310), (180, 100, 380, 300)
        assert boxes(rollout(near), 2, 10, teacher, keep=True) == [near] * 3
        assert boxes(rollout(near), 2, 10, teacher)[-1] == (100, 100, 300, 300)
        for keep in (False, True):
            line = [(140, 100, 340, 300), (100, 100, 300, 300)]
            assert boxes(rollout(far), 2, 10, teacher, keep=keep)[1:] == line


def test_a_teacher_is_not_asked_about_a_box_that_stays():
    def teacher(box, truth):
        raise AssertionError("asked")

    steps = harvest.trajectory(rollout((100, 100, 300, 300)), 2, 10, teacher)["steps"]
    assert [step["text"] for step in steps[1:]] == ['It fits: keep it. {"bbox_2d": [100, 100, 300, 300]}'] * 2


def test_a_trajectory_without_reasons_and_one_of_another_teacher():
    own = rollout((500, 500, 600, 600))
    plain = harvest.trajectory(own, 2, trace=None)
    assert [s["text"] for s in plain["steps"][1:]] == [protocol.answer_text(s["box"]) for s in plain["steps"][1:]]
    asked = []

    def teacher(box, truth):
        asked.append((box, truth))
        return "Look again."

    taught = harvest.trajectory(own, 2, trace=teacher)
    assert asked == [((500, 500, 600, 600), TRUTH), (taught["steps"][1]["box"], TRUTH)]
    assert all(step["text"].startswith('Look again. {"bbox_2d": [') for step in taught["steps"][1:])


def test_harvesting_leaves_the_rollouts_as_they_were():
    own = rollout((500, 500, 600, 600))
    before = repr(own)
    harvest.keep_errors([own], 0.85)
    harvest.trajectory(own, 2)
    harvest.perturbed(own, 0)
    assert repr(own) == before


@given(grid_boxes().filter(lambda b: b[2] - b[0] >= 80 and b[3] - b[1] >= 80), st.floats(-0.8, 0.8), st.integers(0, 9))
def test_a_perturbed_truth_is_about_as_wrong_as_the_students_own_box(truth, shift, seed):
    width = truth[2] - truth[0]
    box = snap([truth[0] + shift * width, truth[1], truth[2] + shift * width, truth[3]], 1)
    own = rollout(box, [float(v) for v in truth])
    made = harvest.perturbed(own, seed)
    assert made == harvest.perturbed(own, seed)
    step = made["steps"][0]
    assert valid(step["box"]) and parse_answer(step["text"]) == step["box"] and made["steps"][1:] == own["steps"][1:]
    assert iou(step["box"], truth) == pytest.approx(iou(box, truth), abs=0.05)


def test_perturbed_truths_differ_from_seed_to_seed_and_from_sample_to_sample():
    own = rollout((150, 150, 350, 350))
    made = {harvest.perturbed(own, seed)["steps"][0]["box"] for seed in range(8)}
    made |= {harvest.perturbed({**own, "id": f"b-{i}"}, 0)["steps"][0]["box"] for i in range(8)}
    assert len(made) > 12 and (150, 150, 350, 350) not in made


@pytest.mark.parametrize("keep", [False, True])
def test_the_shipped_trajectories_are_the_harvest_of_the_shipped_first_answers(keep):
    first, made = (
        read_rollouts(REFERENCE / "rollouts" / f"{name}.jsonl")
        for name in ("train_step0", "trajectories" + "_keep" * keep)
    )
    profile = get_profile("micro")
    errors = harvest.keep_errors(first, profile.harvest_max_iou)
    assert len(errors) > 1000
    again = [harvest.trajectory(error, profile.turns, profile.grid, keep=keep) for error in errors]
    assert json.loads(json.dumps(again)) == made  # word by word: the student is trained on these

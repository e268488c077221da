"""What a student's own traces say, against the boxes that it was shown and those that it then gave."""

import pytest

from ivt_utils.trace_check import says_and_does, traces_told, ways

TRUTH, LEFT, NEARER = [400.0, 400.0, 600.0, 600.0], [300, 400, 500, 600], [350, 400, 550, 600]
CHANCE = {"seed": 0, "n_resamples": 20}


def rollout(number, *steps):
    return {"id": str(number), "image_id": str(number), "subset": "made", "expression": "the red square",
            "truth": TRUTH, "steps": [{"text": text, "box": box} for text, box in steps]}  # fmt: skip


def values(rollouts):
    return {kind: (cell["value"], cell["n"]) for kind, cell in traces_told(rollouts, **CHANCE).items()}


def test_the_ways_in_which_boxes_differ_are_the_words_of_a_trace():
    assert ways(LEFT, TRUTH) == {"too far left"} and ways(TRUTH, LEFT) == {"too far right"}
    assert ways([400, 420, 500, 600], TRUTH) == {"too far left", "too low", "too narrow", "too short"}
    assert ways(LEFT, LEFT) == set()


def test_a_true_trace_that_is_followed_and_a_false_one_that_is_not():
    said = "It is too far left: move right."
    true = rollout(1, ("", LEFT), (said, NEARER))
    assert values([true]) == {"largest": (1, 1), "true": (1, 1), "twice": (0, 1), "followed": (1, 1),
                              "opposite": (0, 1), "heeded": (1, 1), "unmoved": (0, 1), "kept": (None, 0)}  # fmt: skip
    false = rollout(2, ("", LEFT), ("It is too far right and too far right: move left.", LEFT))
    assert values([false]) == {"largest": (0, 1), "true": (0, 1), "twice": (1, 1), "followed": (0, 1),
                               "opposite": (0, 1), "heeded": (0, 1), "unmoved": (1, 1), "kept": (None, 0)}  # fmt: skip
    other_way = rollout(3, ("", NEARER), (said, LEFT))
    told = values([true, other_way])
    assert told["opposite"] == (0.5, 2) and told["heeded"] == (0, 2)


def test_a_small_error_may_be_true_without_being_one_that_the_teacher_names():
    told = values([rollout(1, ("", [300, 401, 500, 599]), ("It is too short: make it taller.", LEFT))])
    assert told["true"] == (1, 1) and told["largest"] == (0, 1)


def test_keep_it_is_asked_whether_it_keeps_and_an_answer_without_a_box_is_left_out():
    keep = "It fits: keep it."
    kept, moved = rollout(1, ("", LEFT), (keep, LEFT), ("", None)), rollout(2, ("", LEFT), (keep, NEARER), ("", NEARER))
    told = values([kept, moved])
    assert told["kept"] == (0.5, 2) and told["true"] == (None, 0)
    with pytest.raises(ValueError):
        traces_told([rollout(1, ("", None), (keep, LEFT))], **CHANCE)


def test_what_the_last_step_says_and_what_it_does():
    keep = "It fits: keep it."
    steps = [((keep, LEFT), (keep, LEFT)), (("", LEFT), (keep, NEARER)), ((keep, LEFT), (keep, NEARER)),
             (("", LEFT), ("", LEFT)), (("", None), ("", None))]  # fmt: skip
    found = says_and_does([rollout(i, ("", LEFT), *pair) for i, pair in enumerate(steps)], **CHANCE)
    assert [found[kind]["value"] for kind in ("says", "does", "difference")] == pytest.approx([0.6, 0.4, 0.2])

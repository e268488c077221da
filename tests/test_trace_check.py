"""What a student's own traces say, against the boxes that it was shown and those that it then gave."""

import re
from itertools import pairwise

import pytest

from ivt_utils.exercises.warmup import my_has_problem
from ivt_utils.metrics import Resampling, side
from ivt_utils.paper_scale.trace_check import says_and_does, traces_told, ways
from ivt_utils.profiles import get_profile
from ivt_utils.protocol import PROBLEMS
from ivt_utils.runtime.files import ROOT, read_json, read_jsonl
from ivt_utils.runtime.store import REFERENCE
from ivt_utils.teacher import geometric_trace

TRUTH, LEFT, NEARER = [400.0, 400.0, 600.0, 600.0], [300, 400, 500, 600], [350, 400, 550, 600]
CHANCE = Resampling(0, 20)


def rollout(number, *steps):
    return {
        "id": str(number),
        "image_id": str(number),
        "subset": "made",
        "expression": "the red square",
        "truth": TRUTH,
        "steps": [{"text": text, "box": box} for text, box in steps],
    }


def values(rollouts):
    return {kind: (cell["value"], cell["n"]) for kind, cell in traces_told(rollouts, CHANCE).items()}


def test_the_ways_in_which_boxes_differ_are_the_words_of_a_trace():
    assert ways(LEFT, TRUTH) == {"too far left"} and ways(TRUTH, LEFT) == {"too far right"}
    assert ways([400, 420, 500, 600], TRUTH) == {"too far left", "too low", "too narrow", "too short"}
    assert ways(LEFT, LEFT) == set()


def test_traces_are_compared_with_the_boxes_and_with_shuffled_traces():
    true = rollout(1, ("", LEFT), ("It is too far left: move right.", NEARER))
    false = rollout(2, ("", LEFT), ("It is too far right and too far right: move left.", LEFT))
    told = values([true, false])
    shares = {
        "true": 0.5,
        "true_shuffled": 0.5,
        "true_more": 0,
        "followed": 0.5,
        "followed_shuffled": 0.25,
        "followed_more": 0.25,
        "twice": 0.5,
        "unmoved": 0.5,
    }
    assert told == {kind: (share, 2) for kind, share in shares.items()} | {"kept": (None, 0)}


def test_words_that_are_always_the_same_tell_no_more_than_shuffled_ones():
    said = "It is too far left: move right."
    boxes = [LEFT, NEARER, [450, 400, 650, 600]]
    told = traces_told([rollout(i, ("", box), (said, TRUTH)) for i, box in enumerate(boxes)], CHANCE)
    assert told["true"]["value"] == pytest.approx(2 / 3)
    assert all(told["true_more"][limit] == pytest.approx(0, abs=1e-8) for limit in ("value", "low", "high"))
    assert side(told["true_more"]) == side(told["followed_more"]) == "open"


def test_keep_it_is_asked_whether_it_keeps_and_an_answer_without_a_box_is_left_out():
    keep = "It fits: keep it."
    kept, moved = rollout(1, ("", LEFT), (keep, LEFT), ("", None)), rollout(2, ("", LEFT), (keep, NEARER), ("", NEARER))
    told = values([kept, moved])
    assert told["kept"] == (0.5, 2) and told["true"] == (None, 0)
    with pytest.raises(ValueError):
        traces_told([rollout(1, ("", None), (keep, LEFT))], CHANCE)


def test_what_the_last_step_says_and_what_it_does():
    keep = "It fits: keep it."
    steps = [
        ((keep, LEFT), (keep, LEFT)),
        (("", LEFT), (keep, NEARER)),
        ((keep, LEFT), (keep, NEARER)),
        (("", LEFT), ("", LEFT)),
        (("", None), ("", None)),
    ]
    found = says_and_does([rollout(i, ("", LEFT), *pair) for i, pair in enumerate(steps)], CHANCE)
    assert [found[kind]["value"] for kind in ("says", "does", "difference")] == pytest.approx([0.6, 0.4, 0.2])


def test_the_investigation_of_the_notebook_is_solved_by_its_solution_and_checked_by_the_package(capsys):
    """On the reference's answers: what is left undone, a right answer, and a mistake are told apart."""
    cells = read_json(ROOT / "notebooks" / "03_sft_warmup.ipynb")["cells"]

    def cell(part, kind="code"):
        (text,) = [t for c in cells if c["cell_type"] == kind and part in (t := "".join(c["source"]))]
        return text

    collect = "looks = []" + cell("looks = []").split("looks = []")[1]
    (solution,) = re.findall(r"```python\n(.*?)```", cell("true_by_luck = share(", "markdown"), re.DOTALL)
    students = {name: read_jsonl(REFERENCE / "rollouts" / f"{name}.jsonl") for name in ("sft_ivt", "sft_keep_ivt")}
    known = students | {
        "my_has_problem": my_has_problem,
        "re": re,
        "pairwise": pairwise,
        "PROBLEMS": PROBLEMS,
        "geometric_trace": geometric_trace,
        "profile": get_profile("micro"),
        "SEED": 0,
    }
    for code in (
        collect,
        cell("EXPECTED = "),
        cell("told = ["),
        solution,
        cell("told = ["),
        "true = followed",
        cell("told = ["),
    ):
        exec(code, known)
    said = re.findall(r"^\[(.+?)\] (\w+)", capsys.readouterr().out, re.MULTILINE)
    four = ["true", "true_by_luck", "followed", "followed_by_luck"]
    wrong = [("not yet", "true"), *(("right", name) for name in four[1:])]
    assert said == [("to do", name) for name in four] + [("right", name) for name in four] + wrong
    assert len(known["looks"]) == known["told"][0]["true"]["n"]

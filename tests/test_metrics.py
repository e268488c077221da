"""Scores worked out by hand, and properties that any list of rollouts must have."""

import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from ivt_utils import boxes, metrics
from ivt_utils.metrics import Resampling

FAST = Resampling(3, 200)
UNIT = [0, 0, 100, 100]
# Boxes whose IoU with UNIT is plain to see.
FULL, HALF, NONE, TENTH = [0, 0, 100, 100], [0, 0, 100, 50], [500, 500, 600, 600], [0, 0, 100, 10]


def rollout(number, *steps, truth=UNIT, image=None, subset="attributes"):
    return {
        "id": f"s{number:03d}",
        "image_id": f"i{number:03d}" if image is None else image,
        "subset": subset,
        "expression": "the red square",
        "truth": truth,
        "steps": [{"text": "", "box": box} for box in steps],
    }


@st.composite
def some_boxes(draw):
    x1, y1 = draw(st.integers(0, 990)), draw(st.integers(0, 990))
    return [x1, y1, draw(st.integers(x1 + 1, 1000)), draw(st.integers(y1 + 1, 1000))]


@st.composite
def some_rollouts(draw, steps=None):
    steps = steps or draw(st.integers(1, 4))
    answers = st.lists(st.none() | some_boxes(), min_size=steps, max_size=steps)
    images, subsets = st.sampled_from("abcdef"), st.sampled_from(["attributes", "distractors"])
    rows = draw(st.lists(st.tuples(answers, some_boxes(), images, subsets), min_size=1, max_size=12))
    return [rollout(i, *a, truth=t, image=image, subset=s) for i, (a, t, image, s) in enumerate(rows)]


def cells(value, path=()):
    """Every cell of a `score` result, with its path."""
    if isinstance(value, dict) and "value" in value:
        yield path, value
    else:
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from cells(part, (*path, key))


# --- by hand


def test_iou_matrix_by_hand():
    rows = [rollout(0, FULL, HALF, None), rollout(1, NONE, TENTH, [50, 0, 150, 100])]
    assert metrics.iou_matrix(rows) == pytest.approx(np.array([[1, 0.5, 0], [0, 0.1, 1 / 3]]))
    assert metrics.parsed_matrix(rows).tolist() == [[True, True, False], [True, True, True]]


def test_iou_on_a_threshold_counts():
    rows = [rollout(0, HALF), rollout(1, [0, 0, 100, 70]), rollout(2, [0, 0, 90, 100])]
    found = metrics.score(rows, FAST)
    values = {name: found["final"][name]["value"] for name in ("acc50", "acc70", "acc90")}
    assert values == {"acc50": 1, "acc70": pytest.approx(2 / 3), "acc90": pytest.approx(1 / 3)}


def test_every_metric_by_hand():
    rows = [
        rollout(0, FULL, FULL, HALF),  # degrades, still right at .5
        rollout(1, FULL, NONE, None),  # lost: no box
        rollout(2, FULL, HALF, TENTH),  # lost: wrong box
        rollout(3, TENTH, TENTH, TENTH),  # stays, same box, hard
        rollout(4, NONE, HALF, FULL, subset="distractors"),  # gained, hard
        rollout(5, HALF, FULL, [0, 50, 100, 100], subset="distractors"),  # stays in IoU with another box
        rollout(6, None, None, None, subset="distractors"),  # never parses: stays, but no box to be the same
        rollout(7, FULL, None, FULL, subset="distractors"),  # stays, same box
    ]
    found = metrics.score(rows, FAST)
    value = {path: cell["value"] for path, cell in cells(found)}
    size = {path: cell["n"] for path, cell in cells(found)}
    assert value["per_step", 0, "acc50"] == 5 / 8
    assert value["per_step", 0, "miou"] == pytest.approx(4.6 / 8)
    assert value["final", "miou"] == pytest.approx(3.2 / 8)
    assert value["final", "acc50"] == value["per_step", 2, "acc50"] == 4 / 8
    assert [value["per_step", t, "parsed"] for t in range(3)] == [7 / 8, 6 / 8, 6 / 8]
    assert (value["per_step", 1, "acc50_of_parsed"], size["per_step", 1, "acc50_of_parsed"]) == (4 / 6, 6)
    assert value["per_step", 1, "miou_of_parsed"] == pytest.approx(3.1 / 6)
    assert value["degradation_per_step",] == pytest.approx((4.6 - 3.2) / 8 / 2)
    assert value["share_degrade",] == 3 / 8
    assert value["share_improve",] == 1 / 8
    assert value["share_stay",] == 4 / 8
    assert value["share_same_box",] == 2 / 8
    assert {part: cell["value"] for part, cell in found["fall"].items()} == {
        "lost_unparsed": 1 / 8,
        "lost_wrong_box": 1 / 8,
        "gained": 1 / 8,
    }
    assert (value["hard", "first"], size["hard", "first"]) == (pytest.approx(0.1 / 3), 3)
    assert value["hard", "final"] == pytest.approx(1.1 / 3)
    assert (value["easy", "first"], size["easy", "first"]) == (pytest.approx(4.5 / 5), 5)
    assert value["easy", "difference"] == pytest.approx((2.1 - 4.5) / 5)
    assert value["subsets", "distractors", "final", "acc50"] == 3 / 4
    assert size["subsets", "attributes", "step0", "acc50"] == 4
    assert value["oracle_best_step", "acc50"] == 6 / 8
    assert value["oracle_best_step", "miou"] == pytest.approx(6.1 / 8)


def test_degradation_has_the_papers_sign():
    assert metrics.degradation_per_step(np.array([[0.9, 0.7, 0.5], [0.2, 0.2, 0.6]])) == pytest.approx([0.2, -0.2])
    with pytest.raises(ValueError, match="step 0 only"):
        metrics.degradation_per_step(np.array([[0.9]]))


def test_a_single_answer_has_no_loop_metrics_and_the_oracle_gains_nothing():
    found = metrics.score([rollout(0, HALF), rollout(1, FULL)], FAST)
    assert found.keys() == {"final", "per_step", "subsets", "oracle_best_step"}
    assert found["oracle_best_step"]["miou"] == found["final"]["miou"]


def test_whatever_the_truth_chose_is_called_oracle():
    found = metrics.score([rollout(0, HALF, FULL, NONE), rollout(1, NONE, FULL, NONE)], FAST)
    best = [path for path, cell in cells(found) if cell["value"] == 1 and path[:2] != ("per_step", 1)]
    perfect = {path for path in best if path[-1] in ("acc50", "acc70", "acc90", "miou")}
    assert perfect and all("oracle" in path[0] for path in perfect)


def test_paired_difference_by_hand():
    a = [rollout(0, FULL), rollout(1, HALF), rollout(2, NONE)]
    b = [rollout(2, NONE, HALF), rollout(0, FULL, NONE), rollout(1, FULL, HALF)]  # another order, another T
    final = metrics.step_score("final", "miou")
    cell = metrics.paired_difference(a, b, final, FAST)
    assert cell["value"] == pytest.approx((1 + 0 - 0.5) / 3)
    assert cell["n"] == 3
    oracle = metrics.paired_difference(b, b, metrics.step_score("oracle", "acc50"), FAST, final)
    assert oracle["value"] == pytest.approx((3 - 1) / 3)


def test_a_step_can_be_scored_by_its_number():
    ious = np.array([[0.9, 0.2, 0.6], [0.4, 0.5, 0.1]])
    assert metrics.step_score(1, "miou")(ious).tolist() == [0.2, 0.5]
    assert metrics.step_score(1, "acc50")(ious).tolist() == [0, 1]


def test_the_gain_of_a_learning_curve_by_hand():
    """Nine rows: a quarter are two. Of each prompt only the final answer counts, and prompts share images."""
    finals = [(0.2, 0.4), (0.4, 0.4), *[(0.0, 0.0)] * 5, (0.6, 0.4), (0.8, 0.8)]
    rows = [{"step": 5 * i, "ious": [[0.9, value] for value in pair]} for i, pair in enumerate(finals)]
    found = metrics.curve_gain(rows, ["a", "b"], FAST)
    assert found["steps"] == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    assert (found["first"], found["last"]) == pytest.approx((0.35, 0.65))
    cell = found["difference"]
    assert (cell["value"], cell["low"], cell["high"], cell["n"]) == pytest.approx((0.3, 0.2, 0.4, 2))
    one_image = metrics.curve_gain(rows[-3:], ["a", "a"], FAST)  # of three rows the first and the last
    assert one_image["difference"] == {"value": pytest.approx(0.8), "low": None, "high": None, "n": 2}


@pytest.mark.parametrize(
    ("rows", "images"),
    [
        ([{"step": 0, "ious": [[0.5]]}], ["a"]),
        ([{"step": 0, "ious": [[0.5]]}] * 2, ["a", "b"]),
        ([{"step": 0, "ious": [[0.5]]}, {"step": 1, "ious": [[0.5], [0.5]]}], ["a"]),
        ([{"step": 0, "ious": [[float("nan")]]}] * 2, ["a"]),
    ],
)
def test_a_learning_curve_that_is_none_is_refused(rows, images):
    with pytest.raises(ValueError):
        metrics.curve_gain(rows, images, FAST)


def test_paired_ratio_by_hand_and_where_it_has_no_meaning():
    gentle = [rollout(i, FULL, [0, 0, 100, 90], [0, 0, 100, 90]) for i in range(4)]
    steep = [rollout(i, FULL, HALF, HALF) for i in range(4)]
    still = [rollout(i, FULL, FULL, FULL) for i in range(4)]
    cell = metrics.paired_ratio(gentle, steep, metrics.degradation_per_step, FAST)
    assert (cell["value"], cell["low"], cell["high"]) == pytest.approx((0.2, 0.2, 0.2))
    assert metrics.paired_ratio(gentle, still, metrics.degradation_per_step, FAST) == {
        "value": None,
        "low": None,
        "high": None,
        "n": 4,
    }
    improving = [rollout(i, HALF, FULL, FULL) for i in range(4)]
    assert metrics.paired_ratio(gentle, improving, metrics.degradation_per_step, FAST)["value"] is None
    mixed = [*steep[:1], *still[1:]]  # some resamples have nothing below the line
    cell = metrics.paired_ratio(gentle, mixed, metrics.degradation_per_step, FAST)
    assert cell["value"] == pytest.approx(0.8) and cell["low"] is None and cell["high"] is None


# --- intervals


def test_interval_agrees_with_the_normal_approximation():
    scores = np.random.default_rng(0).random(800) < 0.8
    cell = metrics.mean_interval(scores, [f"i{i}" for i in range(800)], Resampling(0, 4000))
    error = 1.96 * (cell["value"] * (1 - cell["value"]) / 800) ** 0.5
    sides = cell["value"] - cell["low"], cell["high"] - cell["value"]
    assert sides == pytest.approx((error, error), rel=0.08)


def test_intervals_cover_the_truth_about_95_times_in_100():
    rng, covered = np.random.default_rng(1), 0
    for trial in range(200):
        images = np.repeat(np.arange(60), 3).astype(str)  # three samples an image, which share a level
        scores = np.repeat(rng.normal(0, 1, 60), 3) + rng.normal(0, 0.5, 180)
        cell = metrics.mean_interval(scores, images, Resampling(trial, 400))
        covered += cell["low"] <= 0 <= cell["high"]
    assert 180 <= covered <= 198


def test_copies_of_a_row_within_its_image_do_not_narrow_the_interval():
    scores = (np.random.default_rng(0).random(200) < 0.7).astype(float)
    images = np.array([f"i{i}" for i in range(200)])
    once = metrics.mean_interval(scores, images, FAST)
    copied = metrics.mean_interval(np.repeat(scores, 9), np.repeat(images, 9), FAST)
    assert [copied[k] for k in ("value", "low", "high")] == pytest.approx([once[k] for k in ("value", "low", "high")])
    apart = metrics.mean_interval(np.repeat(scores, 9), [f"j{i}" for i in range(1800)], FAST)
    assert (apart["high"] - apart["low"]) * 2 < copied["high"] - copied["low"]


def test_pairing_narrows_the_interval_of_a_small_change():
    rng = np.random.default_rng(0)
    base = [rollout(i, FULL if rng.random() < 0.8 else NONE) for i in range(300)]
    better = [rollout(i, FULL if i < 6 else r["steps"][0]["box"]) for i, r in enumerate(base)]
    score = metrics.step_score("final", "acc50")
    paired = metrics.paired_difference(better, base, score, FAST)
    alone = metrics.score(base, FAST)["final"]["acc50"]
    assert paired["high"] - paired["low"] < 0.5 * (alone["high"] - alone["low"])


def test_too_few_images_have_no_interval_rather_than_a_false_one():
    one_image = metrics.score([rollout(i, FULL if i else NONE, image="only") for i in range(5)], FAST)
    assert one_image["final"]["acc50"] == {"value": 0.8, "low": None, "high": None, "n": 5}
    one_hard = metrics.score([rollout(i, FULL if i else NONE, FULL) for i in range(20)], FAST)
    assert one_hard["hard"]["first"] == {"value": 0, "low": None, "high": None, "n": 1}
    assert one_hard["easy"]["first"]["low"] == 1
    none_hard = metrics.score([rollout(i, FULL, FULL) for i in range(5)], FAST)
    assert none_hard["hard"]["first"] == {"value": None, "low": None, "high": None, "n": 0}


def test_seed_decides_the_interval():
    scores, images = np.random.default_rng(0).random(50), [str(i) for i in range(50)]
    first, again, other = (metrics.mean_interval(scores, images, Resampling(s, 300)) for s in (1, 1, 2))
    assert first == again
    assert first != other and first["value"] == other["value"]


# --- properties


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(some_rollouts())
def test_bounds_and_identities(rows):
    found = metrics.score(rows, FAST)
    for path, cell in cells(found):
        if cell["value"] is None:
            assert cell["n"] == 0
            continue
        signed = path[-1] in ("difference", "degradation_per_step")
        assert -signed <= cell["value"] <= 1 and 0 < cell["n"] <= len(rows)
        if cell["low"] is not None:
            assert cell["low"] - 1e-12 <= cell["value"] <= cell["high"] + 1e-12
    value = {path: cell["value"] for path, cell in cells(found)}
    for step in ("final", "oracle_best_step"):
        assert value[step, "acc50"] >= value[step, "acc70"] >= value[step, "acc90"]
    for step in range(len(rows[0]["steps"])):
        assert value["oracle_best_step", "miou"] >= value["per_step", step, "miou"] - 1e-12
    if len(rows[0]["steps"]) > 1:
        assert value["share_degrade",] + value["share_improve",] + value["share_stay",] == pytest.approx(1)
        fall = {name: value["fall", name] for name in found["fall"]}
        assert value["per_step", 0, "acc50"] - value["final", "acc50"] == pytest.approx(
            fall["lost_unparsed"] + fall["lost_wrong_box"] - fall["gained"]
        )
    sizes = [found["subsets"][name]["final"]["miou"] for name in found["subsets"]]
    assert sum(c["value"] * c["n"] for c in sizes) == pytest.approx(value["final", "miou"] * len(rows))


@pytest.mark.parametrize("right", [True, False])
def test_a_share_of_all_or_none_has_exact_limits(right):
    """Two samples an image, and a group in which only three of the four images take part."""
    images, group = list("aabbccdd"), np.array([1, 1, 1, 0, 0, 1, 0, 0], bool)
    whole, part = metrics.intervals([[right] * 8, group & right], [np.ones(8), group], images, FAST)
    for found, count, n in ((whole, 4, 8), (part, 3, 4)):
        exact = binomtest(count * right, count).proportion_ci(method="exact")
        assert (found["low"], found["high"]) == pytest.approx((exact.low, exact.high))
        assert found["value"] == right and found["n"] == n
    one_off = metrics.mean_interval(np.arange(505) > 0 if right else np.arange(505) == 0, np.arange(505), FAST)
    exact = binomtest(504 if right else 1, 505).proportion_ci(method="exact")  # no surer than with none wrong at all
    assert (one_off["low"], one_off["high"]) == pytest.approx((exact.low, exact.high))
    everyone = metrics.over_seeds(np.full((3, 8), right), images, share=True)
    exact = binomtest(4 * right, 4).proportion_ci(method="exact")
    assert (everyone["low"], everyone["high"]) == pytest.approx((exact.low, exact.high))
    no_difference = metrics.mean_interval(np.zeros(8), images, FAST)
    assert (no_difference["low"], no_difference["high"]) == (0, 0)


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(some_rollouts(), st.randoms(use_true_random=False))
def test_order_of_the_rollouts_does_not_matter(rows, random):
    shuffled = random.sample(rows, len(rows))
    assert metrics.score(shuffled, FAST) == metrics.score(rows, FAST)
    score = metrics.step_score("final", "miou")
    assert metrics.paired_difference(shuffled, rows, score, FAST)["value"] == 0


def test_order_does_not_matter_to_the_last_bit():
    rng = np.random.default_rng(0)
    rows = [
        rollout(
            i,
            *([0, 0, *rng.integers(1, 1000, 2).tolist()] for _ in range(3)),
            image=f"i{i % 3}",
            truth=[0, 0, *rng.uniform(1, 1000, 2).tolist()],
        )
        for i in range(300)
    ]
    other = [row | {"steps": row["steps"][::-1]} for row in rows]
    assert metrics.score(rows[::-1], FAST) == metrics.score(rows, FAST)
    score = metrics.step_score("final", "miou")
    there = metrics.paired_difference(rows, other, score, FAST)
    assert metrics.paired_difference(rows[::-1], other, score, FAST) == there


@settings(deadline=None, max_examples=30)
@given(some_rollouts(), st.sampled_from(metrics.STEPS), st.sampled_from(["acc50", "acc70", "acc90", "miou"]))
def test_difference_of_a_thing_with_itself_is_exactly_zero(rows, step, metric):
    cell = metrics.paired_difference(rows, rows, metrics.step_score(step, metric), FAST)
    assert cell["value"] == 0 and cell["low"] in (0, None) and cell["high"] in (0, None)


@settings(deadline=None, max_examples=30)
@given(some_rollouts(steps=2), some_rollouts(steps=3))
def test_difference_changes_sign_with_its_sides(a, b):
    count = min(len(a), len(b))
    shared = [{key: left[key] for key in ("image_id", "truth")} for left in a[:count]]
    b = [right | same for right, same in zip(b, shared, strict=False)]
    score = metrics.step_score("final", "miou")
    there = metrics.paired_difference(a[:count], b, score, FAST)
    back = metrics.paired_difference(b, a[:count], score, FAST)
    assert there["value"] == -back["value"]


@settings(deadline=None, max_examples=200)
@given(some_boxes(), st.none() | some_boxes())
def test_iou_agrees_with_torchvision(truth, box):
    ours = metrics.iou_matrix([rollout(0, box, truth=truth)])[0, 0]
    assert ours == pytest.approx(boxes.iou(truth, box), abs=1e-9)


# --- bad input


def test_first_steps_cuts_without_touching_the_original():
    rows = [rollout(0, FULL, HALF, NONE)]
    assert len(metrics.first_steps(rows)[0]["steps"]) == 1
    assert len(rows[0]["steps"]) == 3


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([], "no rollouts"),
        ([rollout(0, FULL), rollout(0, HALF)], "'s000' stands twice"),
        ([rollout(0, FULL), rollout(1, FULL, HALF)], "differ in their number of steps: 1, 2"),
        ([rollout(0)], "'s000' has no steps"),
        (["text"], "must be a dictionary"),
        ([{**rollout(0, FULL), "image_id": None}], "'image_id'"),
        ([rollout(0, FULL, truth=[0, 0, 1])], "ground truth of 's000' is not four"),
        ([rollout(0, FULL, truth=[0, 0, float("nan"), 1])], "ground truth of 's000' is not four"),
        ([rollout(0, FULL, truth=[5, 0, 5, 10])], "ground truth of 's000' is reversed or empty"),
        ([rollout(0, FULL, [1, 2, 3])], "Step 1 of 's000'"),
        ([rollout(0, [10, 0, 5, 10])], "Step 0 of 's000'"),
        ([rollout(0, [0, 0, 1001, 10])], "Step 0 of 's000'"),
        ([rollout(0, [0, 0, float("nan"), 10])], "Step 0 of 's000'"),
        ([rollout(0, [0, 0, 10**400, 10])], "Step 0 of 's000'"),
        ([rollout(0, "1234")], "Step 0 of 's000'"),
        ([{**rollout(0, FULL), "steps": [{"text": ""}]}], "no 'box'"),
    ],
)
def test_bad_rollouts_are_refused_in_one_sentence(rows, says):
    with pytest.raises(ValueError, match=says) as error:
        metrics.score(rows, FAST)
    assert "\n" not in str(error.value)


def test_pairs_must_be_about_the_same_samples():
    score = metrics.step_score("final", "miou")
    a, b = [rollout(0, FULL), rollout(1, FULL)], [rollout(0, FULL), rollout(2, FULL)]
    with pytest.raises(ValueError, match="not about the same samples: 's001'"):
        metrics.paired_difference(a, b, score, FAST)
    with pytest.raises(ValueError, match="truth of 's001'"):
        metrics.paired_difference(a, [rollout(0, FULL), rollout(1, FULL, truth=HALF)], score, FAST)
    with pytest.raises(ValueError, match="image"):
        metrics.paired_difference(a, [rollout(0, FULL), rollout(1, FULL, image="other")], score, FAST)


def test_unknown_scores_and_no_resamples_are_refused():
    with pytest.raises(ValueError, match="'best'"):
        metrics.step_score("best", "miou")
    with pytest.raises(ValueError, match="'acc60'"):
        metrics.step_score("final", "acc60")
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="positive integer"):
            Resampling(0, wrong)


# --- size and speed


def test_505_rollouts_with_2000_resamples_take_less_than_3_seconds():
    rng = np.random.default_rng(0)
    steps = [FULL, HALF, NONE, TENTH, None]
    rows = [rollout(i, *(steps[k] for k in rng.integers(0, 5, 3)), image=f"i{i // 2}") for i in range(505)]
    start = time.process_time()  # of this process alone: other work on the machine does not count
    metrics.score(rows, Resampling(0, 2000))
    assert time.process_time() - start < 3


def test_importing_does_not_import_torch_or_matplotlib():
    heavy = "{'torch', 'torchvision', 'matplotlib', 'transformers'}"
    code = f"import sys, ivt_utils.show.report; sys.exit(', '.join({heavy} & sys.modules.keys()) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- the refinement metrics of VG-Refiner


def test_refinement_metrics_by_hand():
    """IoUs of step 0 and the final step: .8 -> .9, .8 -> .8, .8 -> .4, .2 -> .6, .2 -> .2, 0 -> 0."""
    truth = [0, 0, 1000, 1000]
    pairs = [(800, 900), (800, 800), (800, 400), (200, 600), (200, 200), (None, None)]
    rollouts = [
        {
            "id": f"{i}",
            "image_id": f"{i}",
            "subset": "s",
            "truth": truth,
            "steps": [{"box": side and (0, 0, side, 1000)} for side in pair],
        }
        for i, pair in enumerate(pairs)
    ]
    found = {name: cell["value"] for name, cell in metrics.refinement(rollouts, FAST).items()}
    gains = [0.5, 0, -0.5, 0.5, 0, 0]
    assert found == pytest.approx(
        {
            "nsri": np.mean(gains),
            "nsri_first_right": np.mean(gains[:3]),
            "nsri_first_wrong": np.mean(gains[3:]),
            "ccr": 1 / 3,
            "refinement": 1 / 3,
            "follow": 1 / 3,
            "worsen": 1 / 6,
            "inherited_error": 2 / 3,
        }
    )
    sizes = {name: cell["n"] for name, cell in metrics.refinement(rollouts, FAST).items()}
    assert (sizes["nsri"], sizes["ccr"], sizes["follow"], sizes["inherited_error"]) == (6, 3, 3, 3)


def test_refinement_of_a_student_that_never_moves():
    truth = [0, 0, 1000, 1000]
    kept = [
        {"id": f"{i}", "image_id": f"{i}", "subset": "s", "truth": truth, "steps": [{"box": (0, 0, side, 1000)}] * 3}
        for i, side in enumerate((300, 700, 1000))
    ]
    found = {name: cell["value"] for name, cell in metrics.refinement(kept, FAST).items()}
    assert found["nsri"] == found["worsen"] == found["ccr"] == 0 and found["follow"] == found["inherited_error"] == 1


# --- several trainings


def test_an_interval_over_seeds_covers_new_trainings_and_new_images():
    """At 95 %, where a bootstrap over the images alone is too sure; the luck of training and image is drawn anew."""
    rng, images, inside, alone = np.random.default_rng(0), 60, 0, 0
    for _ in range(300):
        of_image = np.repeat(np.arange(images), rng.integers(1, 4, images))
        of_pair = rng.normal(0, 0.15, (5, images)) + rng.normal(0, 0.3, images)
        scores = 0.1 + rng.normal(0, 0.05, (5, 1)) + of_pair[:, of_image] + rng.normal(0, 0.3, (5, len(of_image)))
        cell = metrics.over_seeds(scores, of_image)
        inside += cell["low"] <= 0.1 <= cell["high"]
        cell = metrics.mean_interval(scores.mean(axis=0), of_image, Resampling(0, 100))
        alone += cell["low"] <= 0.1 <= cell["high"]
    assert 0.92 <= inside / 300 <= 0.98 and alone / 300 < 0.9


def test_equal_trainings_have_the_interval_of_one():
    rng = np.random.default_rng(1)
    scores, images = rng.random(200), np.repeat(np.arange(100), 2)
    cell = metrics.over_seeds([scores] * 5, images)
    one = metrics.mean_interval(scores, images, Resampling(0, 2000))
    assert cell["value"] == pytest.approx(scores.mean()) and cell["n"] == 200
    assert [cell["low"], cell["high"]] == pytest.approx([one["low"], one["high"]], abs=0.005)


def test_seeds_that_all_agree_and_a_single_image():
    assert metrics.over_seeds([[1, 1], [1, 1]], ["a", "b"]) == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 2}
    assert metrics.over_seeds([[1, 0], [1, 1]], ["a", "a"]) == {"value": 0.75, "low": None, "high": None, "n": 2}
    with pytest.raises(ValueError, match="two trainings"):
        metrics.over_seeds([[1, 0]], ["a", "b"])

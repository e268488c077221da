"""Selection: rules that never see the truth, thresholds from val, exact tests, and what 505 samples can show."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from ivt_utils import metrics, selection
from ivt_utils.metrics import Resampling

TRUTH = [100, 100, 300, 300]
A, NEAR_A, B = (100, 100, 300, 300), (110, 100, 310, 300), (600, 600, 900, 900)


def rollout(boxes, name="a-0", fits=None, likelihood=None):
    steps = [{"text": "", "box": box, "fits": None, "likelihood": None} for box in boxes]
    for key, values in (("fits", fits), ("likelihood", likelihood)):
        for step, value in zip(steps, values or [], strict=False):
            step[key] = value
    return {
        "id": name,
        "image_id": name.split("-")[0],
        "subset": "s",
        "expression": "the star",
        "truth": TRUTH,
        "steps": steps,
    }


@pytest.mark.parametrize(
    "rule, boxes, chosen",
    [
        (selection.step_0, [B, A, A], 0),
        (selection.final, [A, A, B], 2),
        (selection.medoid, [B, A, NEAR_A], 1),
        (selection.medoid, [None, None, A], 2),  # the only box
        (selection.medoid, [None, None, None], 0),
        (selection.medoid, [A, B, B], 1),
        (selection.agreed(0.8), [B, A, NEAR_A], 2),
        (selection.agreed(0.8), [A, NEAR_A, B], 1),
        (selection.agreed(0.8), [A, None, B], 2),
        (selection.agreed(1.0), [A, A, B], 1),
    ],
)
def test_a_rule_on_boxes(rule, boxes, chosen):
    assert rule(rollout(boxes)["steps"]) == chosen


def test_rules_that_ask_the_student():
    steps = rollout([A, B, A], fits=[0.2, 0.9, 0.4], likelihood=[-0.5, -2.0, -0.1])["steps"]
    assert (selection.verified(steps), selection.likely(steps)) == (1, 2)
    assert [selection.first_verified(threshold)(steps) for threshold in (0.3, 0.1, 0.95)] == [1, 0, 0]
    unparsed = rollout([None, B, None], fits=[None, 0.1, None], likelihood=[-0.1, -9.0, None])["steps"]
    assert (selection.verified(unparsed), selection.likely(unparsed)) == (1, 1)


def test_nothing_is_chosen_with_the_truth_of_the_test_samples():
    rows, test = table()
    elsewhere = [{**r, "truth": [0, 0, 50, 50]} for r in test]
    sampled = [{**r, "steps": [r["steps"][0]] * 3} for r in elsewhere]
    again = selection.rule_rows(elsewhere, test, sampled, sampled, (0.1, 0.5, 0.9), Resampling(0, 100))
    assert [row["acc50"]["value"] for row in again] == [0.0] * len(again)  # no box is right now
    assert [(r["rule"], r["threshold"]) for r in again] == [(r["rule"], r["threshold"]) for r in rows]
    assert [r["val_acc50"] for r in again[:-2]] == [r["val_acc50"] for r in rows[:-2]]


def test_a_threshold_is_the_best_on_val_and_the_first_of_equals():
    val = [rollout([B, (0, 0, 50, 50), NEAR_A, A], f"{i}-0") for i in range(4)]
    assert selection.best_threshold(val, selection.agreed, (0.0, 0.5, 0.9, 0.99)) == 0.5


def table(n=40):
    test = [
        rollout([A if i % 4 else B, A if i % 3 else B, B], f"{i}-0", [0.1, 0.6, 0.2], [-1.0, -2.0, -3.0])
        for i in range(n)
    ]
    sampled = [{**r, "steps": [r["steps"][0]] * 3} for r in test]
    return selection.rule_rows(test, test, sampled, sampled, (0.1, 0.5, 0.9), Resampling(0, 100)), test


def test_there_is_a_row_a_rule_with_everything_that_is_reported():
    rows, test = table()
    named = {row["rule"]: row for row in rows}
    assert len(named) == len(rows) == len(selection.RULES) + len(selection.STOPS) + 2
    assert named["step 0"]["acc50"]["value"] == 0.75 and named["step 0"]["difference"]["value"] == 0
    assert named["final step"]["acc50"]["value"] == 0 and named["final step"]["difference"]["value"] == -0.75
    assert named["final step"]["lost"] == 30 and named["final step"]["gained"] == 0
    oracle = [row for row in rows if "oracle" in row["rule"]]
    assert len(oracle) == 1 and oracle[0]["acc50"]["value"] == max(row["acc50"]["value"] for row in rows)
    assert oracle[0]["acc50"]["value"] == np.mean([i % 4 > 0 or i % 3 > 0 for i in range(40)])
    assert [row["answers"] for row in rows] == [1] + [3] * (len(rows) - 1)
    stops = [row for row in rows if row["threshold"] is not None]
    assert {row["rule"] for row in stops} == set(selection.STOPS)
    for row in rows:
        for cell in (row["acc50"], row["difference"]):
            assert cell["n"] == 40 and cell["low"] <= cell["value"] <= cell["high"]
        assert row["difference"]["value"] * 40 == pytest.approx(row["gained"] - row["lost"]) and row["seed"] == 0


def test_the_rule_that_could_be_shipped_is_chosen_on_val_and_is_never_the_oracle():
    rows, _ = table()
    assert rows[-1]["rule"] == selection.ORACLE and rows[-1]["val_acc50"] is None
    assert selection.best_rule(rows)["rule"] == "step 0"  # 0.75 on val, and the first of equals
    rows[3]["val_acc50"], rows[0]["acc50"]["value"] = 0.9, 1.0
    assert selection.best_rule(rows) is rows[3]


# --- tests and power


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_a_fair_coin(gained, lost):
    n, k = gained + lost, min(gained, lost)
    expected = min(1.0, 2 * binom.cdf(k, n, 0.5)) if n else 1.0
    assert selection.exact_p(gained, lost) == pytest.approx(expected)


def test_mcnemar_counts_the_samples_that_one_of_the_two_gets_right():
    a = [rollout([A], "1-0"), rollout([A], "2-0"), rollout([B], "3-0"), rollout([B], "4-0")]
    b = [rollout([B], "2-0"), rollout([A], "3-0"), rollout([None], "1-0"), rollout([B], "4-0")]  # another order
    found = selection.mcnemar(a, b)
    assert (found["gained"], found["lost"]) == (2, 1) and found["p"] == pytest.approx(1.0)


def test_the_rules_of_a_table_are_corrected_for_their_number():
    rows, test = table()
    for rule in rows[1:-1]:
        others = [selection.exact_p(r["gained"], r["lost"]) for r in rows[1:-1]]
        assert rule["p"] >= selection.exact_p(rule["gained"], rule["lost"])
        assert rule["p"] in selection.holm(others)
    assert rows[0]["p"] == 1.0


def test_holms_correction_is_that_of_an_example():
    """Of four: the smallest counts four times, the next one three times, and none comes before a smaller one."""
    assert selection.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert selection.holm([0.6, 0.7]) == [1.0, 1.0] and selection.holm([]) == []


def test_holms_correction_finds_something_in_five_of_a_hundred_tables_of_nothing():
    tables = np.random.default_rng(0).uniform(size=(2000, 11))
    assert np.mean([min(selection.holm(p)) < 0.05 for p in tables]) == pytest.approx(0.05, abs=0.015)


def test_random_signs_give_the_p_value_of_a_fair_coin():
    """Ten images, each with a gain of the same size: only the two tables with one sign throughout are as extreme."""
    a = [rollout([A], f"{i}-0") for i in range(10)]
    b = [rollout([B], f"{i}-0") for i in reversed(range(10))]
    score, chance = metrics.step_score("final", "miou"), Resampling(0, 5000)
    assert selection.sign_flip_p(a, b, score, chance) == pytest.approx(2 / 2**10)
    assert selection.sign_flip_p(a, a, score, chance) == 1.0
    twice = [[{**r, "id": f"{r['image_id']}-{k}"} for r in rollouts for k in range(2)] for rollouts in (a, b)]
    assert selection.sign_flip_p(*twice, score, chance) == pytest.approx(2 / 2**10)  # images count, not samples


def test_the_smallest_difference_is_found_as_often_as_it_says():
    """Simulated: with that difference the test rejects in about 80% of the tables."""
    n, discordant = 505, 0.12
    difference = selection.smallest_difference(discordant, n)
    rng = np.random.default_rng(0)
    gained, lost = (discordant + difference) / 2, (discordant - difference) / 2
    tables = rng.multinomial(n, [gained, lost, 1 - discordant], 2000)
    z = (tables[:, 0] - tables[:, 1]) / np.sqrt(tables[:, 0] + tables[:, 1])
    assert (abs(z) > 1.96).mean() == pytest.approx(0.8, abs=0.04)
    assert selection.smallest_difference(0.0, n) is selection.smallest_difference(0.005, n) is None
    assert selection.smallest_difference(discordant, 4 * n) < difference < selection.smallest_difference(0.3, n)

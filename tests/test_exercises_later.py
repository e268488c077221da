"""The exercises of notebooks 4 to 6: right variants are right, and the solutions agree with the package."""

import math
import random
import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ivt_utils import boxes, grpo, metrics, selection
from ivt_utils.boxes import iou
from ivt_utils.exercises import RIGHT, check, comparisons, find, rewards, stopping
from ivt_utils.metrics import Resampling


# ------------------------------------------------------------------------------------------------ right variants
def reward_by_ifs(ious, bonus):
    total = 0.0
    if ious[-1] is not None:
        total += ious[-1]
    for value in ious:
        if value is None:
            return total
    return total + bonus


def reward_in_one_line(ious, bonus):
    return (ious[-1] or 0) + bonus * all(value is not None for value in ious)


def advantages_by_numpy(rewards, spread):
    rewards = np.array(rewards)
    return (rewards - rewards.mean()) / (spread + 0.0001)


def advantages_by_loop(rewards, spread):
    found = []
    for reward in rewards:
        found.append((reward - np.mean(rewards)) / (1e-4 + spread))
    return tuple(found)


def kl_by_loop(policy, reference, own):
    terms = [math.exp(r - p) - (r - p) - 1 for p, r, mine in zip(policy, reference, own, strict=True) if mine]
    return sum(terms) / len(terms)


def kl_by_mask(policy, reference, own):
    ratio = np.exp(reference) / np.exp(policy)
    return np.sum((ratio - np.log(ratio) - 1) * own) / np.sum(own)


def pairs_by_sorted_ids(a, b):
    gains = np.array([a[k] for k in sorted(a)]) - np.array([b[k] for k in sorted(b)])
    return gains.mean(), 1.96 * gains.std() / np.sqrt(len(gains))


def pairs_by_hand(a, b):
    mean = sum(a[k] - b[k] for k in b) / len(b)
    variance = sum((a[k] - b[k] - mean) ** 2 for k in b) / len(b)
    return [mean, 1.96 * math.sqrt(variance / len(b))]


def resampled_by_counts(scores, image_ids, drawn):
    return np.average(scores, weights=[drawn.count(image) for image in image_ids])


def resampled_by_dictionary(scores, image_ids, drawn):
    by_image = {}
    for score, image in zip(scores, image_ids, strict=True):
        by_image.setdefault(image, []).append(score)
    return np.mean(sum((by_image[image] for image in drawn), []))


def interval_by_matrix(scores, resamples):
    return np.percentile(np.array(scores)[np.array(resamples)].mean(axis=1), [2.5, 97.5])


def interval_by_quantile(scores, resamples):
    means = sorted(sum(scores[i] for i in resample) / len(resample) for resample in resamples)
    return [np.quantile(means, 0.025), np.quantile(means, 0.975)]


def stop_by_next(boxes, threshold):
    last = len(boxes) - 1
    return next((t + 1 for t in range(last) if iou(boxes[t], boxes[t + 1]) >= threshold), last)


def stop_by_memory(boxes, threshold):
    before = None
    for step in range(len(boxes)):
        box = boxes[step]
        if box is not None and before is not None and iou(before, box) >= threshold:
            break
        before = box
    return step


VARIANTS = {
    "my_reward": (reward_by_ifs, reward_in_one_line),
    "my_advantages": (advantages_by_numpy, advantages_by_loop),
    "my_kl": (kl_by_loop, kl_by_mask),
    "my_paired_difference": (pairs_by_sorted_ids, pairs_by_hand),
    "my_resampled_mean": (resampled_by_counts, resampled_by_dictionary),
    "my_interval": (interval_by_matrix, interval_by_quantile),
    "my_stop_rule": (stop_by_next, stop_by_memory),
}


@pytest.mark.parametrize("name, variant", [(name, variant) for name, pair in VARIANTS.items() for variant in pair])
def test_a_right_variant_is_right(name, variant):
    verdict = check(find(name), variant)
    assert verdict.state == RIGHT, verdict.sentence


def test_every_exercise_of_these_notebooks_has_its_variants():
    names = [exercise.name for module in (rewards, comparisons, stopping) for exercise in module.EXERCISES]
    assert names == list(VARIANTS)


# ------------------------------------------------------------------------------------------------ the package agrees
def calls(name, trials=100):
    rng = random.Random(7)
    return [find(name).inputs(rng) for _ in range(trials)]


def any_box(rng):
    (x1, x2), (y1, y2) = (sorted(rng.sample(range(1001), 2)) for _ in range(2))
    return x1, y1, x2, y2


def rollout(name, steps, truth=(0, 0, 500, 500), image=None):
    return {
        "id": name,
        "image_id": image or name,
        "subset": "s",
        "truth": list(truth),
        "steps": [{"box": box} for box in steps],
    }


def test_the_reward_is_that_of_the_training():
    rng = random.Random(0)
    for _ in range(30):
        truths, generations = [any_box(rng) for _ in range(3)], rng.randint(2, 4)
        answered = [
            [rng.choice([None, truth, any_box(rng)]) for _ in range(3)] if rng.random() < 0.5 else [truth] * 3
            for truth in truths
            for _ in range(generations)
        ]
        truths = [truth for truth in truths for _ in range(generations)]
        texts = [[boxes.format_answer(box) if box else "no box" for box in steps] for steps in answered]
        logged, nothing_shown = {}, SimpleNamespace(_shown=0, _image=None)
        given = grpo.make_reward(2, 0.1, generations, -1, {None: 0}.get)(
            completions=[[{"role": "assistant", "content": text} for text in steps] for steps in texts],
            truth=truths,
            environments=[nothing_shown] * len(texts),
            completion_ids=[[]] * len(texts),
            log_metric=logged.__setitem__,
        )
        scores = [grpo.step_ious(steps, truth, 2) for steps, truth in zip(answered, truths, strict=True)]
        assert [rewards.my_reward(ious, 0.1) for ious in scores] == pytest.approx(given)


def trl_source(pattern):
    """Return the part of the installed TRL's trainer that matches; reading it loads nothing."""
    source = Path(find_spec("trl").origin).parent / "trainer" / "grpo_trainer.py"
    found = re.search(pattern, source.read_text("utf-8"))
    assert found, "TRL writes this formula otherwise now: compare the exercise with it again."
    return found[1]


def test_the_kl_is_trls_formula_averaged_over_the_students_own_tokens():
    formula = trl_source(r"per_token_kl = \(\s*(.+exp\(ref.+)\n")
    for policy, reference, own in calls("my_kl"):
        numbers = {"torch": np, "per_token_logps": policy, "ref_per_token_logps": reference}
        per_token_kl = eval(formula, numbers)
        assert rewards.my_kl(policy, reference, own) == pytest.approx((per_token_kl * own).sum() / own.sum())


def test_the_advantages_are_trls_formula():
    formula = trl_source(r"(advantages / \(std_rewards \+ .+\))\n")
    for group, spread in calls("my_advantages"):
        wanted = eval(formula, {"advantages": np.array(group) - np.mean(group), "std_rewards": spread})
        assert rewards.my_advantages(group, spread) == pytest.approx(wanted)
        assert len(set(group)) > 1 or rewards.my_advantages(group, spread) == pytest.approx([0] * len(group))


def test_the_paired_difference_is_that_of_the_results():
    rng, score = random.Random(1), metrics.step_score("final", "miou")
    for _ in range(20):
        names = [f"s{i}" for i in range(60)]
        a, b = ([rollout(name, [any_box(rng)]) for name in rng.sample(names, len(names))] for _ in range(2))
        by_id = [dict(zip([r["id"] for r in x], metrics.iou_matrix(x)[:, 0], strict=True)) for x in (a, b)]
        difference, margin = comparisons.my_paired_difference(*by_id)
        cell = metrics.paired_difference(a, b, score, Resampling(0, 2000))
        assert difference == pytest.approx(cell["value"])
        assert margin == pytest.approx((cell["high"] - cell["low"]) / 2, rel=0.15)  # the bootstrap agrees nearly


def test_resamples_by_image_and_their_percentiles_give_the_interval_of_the_results():
    rng = np.random.default_rng(2)
    scores, images = rng.uniform(size=40).tolist(), [f"image{i}" for i in rng.integers(15, size=40)]
    names = sorted(set(images))
    draws = [[names[i] for i in rng.integers(len(names), size=len(names))] for _ in range(3000)]
    means = [comparisons.my_resampled_mean(scores, images, drawn) for drawn in draws]
    cell = metrics.mean_interval(scores, images, Resampling(0, 3000))
    assert comparisons.my_resampled_mean(scores, images, names) == pytest.approx(cell["value"])
    assert np.percentile(means, [2.5, 97.5]) == pytest.approx([cell["low"], cell["high"]], abs=0.02)
    resamples = rng.integers(40, size=(3000, 40)).tolist()
    alone = metrics.mean_interval(scores, [str(i) for i in range(40)], Resampling(0, 3000))  # an image a sample
    assert comparisons.my_interval(scores, resamples) == pytest.approx([alone["low"], alone["high"]], abs=0.02)


def test_the_stop_rule_is_that_of_the_results():
    for steps, threshold in calls("my_stop_rule"):
        assert stopping.my_stop_rule(steps, threshold) == selection.agreed(threshold)([{"box": box} for box in steps])

"""Which step to answer with when nobody knows the truth (the paper's second version): rules, their score, their power.

A rule takes the steps of one rollout and returns the index of the step to answer with; it never sees the truth. Steps
are those of `metrics`; for `verified` and `likely` each holds "fits" and "likelihood" as well (`confidence`).
Thresholds are chosen on the validation split and scored once on the test split.
"""

from math import inf

import numpy as np
from scipy.stats import binomtest, norm, permutation_test

from ivt_utils import metrics
from ivt_utils.boxes import ious
from ivt_utils.metrics import Resampling


def step_0(steps) -> int:
    """Return 0: the answer at first sight."""
    return 0


def final(steps) -> int:
    """Return the last step: a method's result elsewhere in this project."""
    return len(steps) - 1


def verified(steps) -> int:
    """Return the step whose box the student itself finds most fitting."""
    return _best(step["fits"] for step in steps)


def likely(steps) -> int:
    """Return the step whose answer the student gave with the highest likelihood a token."""
    return _best(step["likelihood"] if step["box"] else None for step in steps)


def medoid(steps) -> int:
    """Return the step whose box has the highest mean IoU with the boxes of the other steps: the consensus."""
    ious = _ious([step["box"] for step in steps])
    return _best(row.sum() if step["box"] else None for row, step in zip(ious, steps, strict=True))


def agreed(threshold: float):
    """Return a rule: stop at the first step whose box has this IoU with the box before it, else take the final one."""

    def rule(steps) -> int:
        ious = _ious([step["box"] for step in steps])
        return next((t for t in range(1, len(steps)) if ious[t, t - 1] >= threshold), len(steps) - 1)

    return rule


def first_verified(threshold: float):
    """Return a rule: stop at the first step whose box the student finds fitting with this probability, else step 0."""

    def rule(steps) -> int:
        return next((t for t, step in enumerate(steps) if (step["fits"] or 0) >= threshold), 0)

    return rule


RULES = {
    "step 0": step_0,
    "final step": final,
    "own verification, highest": verified,
    "highest likelihood": likely,
    "consensus of the steps": medoid,
}
STOPS = {"two boxes agree": agreed, "own verification, first enough": first_verified}  # each with a threshold from val
OF_LOGITS = (verified, likely, first_verified)  # rules that ask for confidence, which a served student does not give

ORACLE = "oracle: the best step, chosen with the ground truth"


def choose(rollouts, rule) -> list[dict]:
    """Return the rollouts cut down to the one step that the rule chooses."""
    return [{**rollout, "steps": [rollout["steps"][rule(rollout["steps"])]]} for rollout in rollouts]


def best_threshold(rollouts, stop, thresholds) -> float:
    """Return the threshold (the first of equals) under which `stop` has the highest Acc@0.5 on these val rollouts."""
    accuracy = [metrics.is_right(metrics.iou_matrix(choose(rollouts, stop(t)))[:, 0]).mean() for t in thresholds]
    return thresholds[int(np.argmax(accuracy))]


def rule_rows(test, val, sampled, sampled_val, thresholds, resampling: Resampling) -> list[dict]:
    """Return one row a rule, and last the oracle's: Acc@0.5 on test, and its paired difference from step 0.

    A row: {"rule", "threshold" (chosen on val, or None), "answers" (generated a sample at most), "seed", "val_acc50",
    "acc50", "difference" (cells of `metrics`), "gained", "lost", "p" (of `mcnemar`, corrected by `holm` for the number
    of rules besides step 0)}. `test` and `val`: rollouts of one method, with confidence, or the rules `OF_LOGITS` are
    left out; `sampled`, `sampled_val`: rollouts whose steps are as many independent first answers.
    """
    turns, blind = len(test[0]["steps"]), OF_LOGITS if "fits" not in test[0]["steps"][0] else ()
    rules = [(name, rule, None, test, val) for name, rule in RULES.items() if rule not in blind]
    for name, stop in STOPS.items():
        if stop in blind:
            continue
        threshold = best_threshold(val, stop, thresholds)
        rules.append((name, stop(threshold), threshold, test, val))
    rules.append((f"consensus of {turns} sampled answers", medoid, None, sampled, sampled_val))
    first, score, rows = metrics.first_steps(test), metrics.step_score("final", "acc50"), []

    def row(name, threshold, answers, **more):
        images = [rollout["image_id"] for rollout in answers]
        right = metrics.is_right(metrics.iou_matrix(answers)[:, -1])
        rows.append(
            {
                "rule": name,
                "threshold": threshold,
                "answers": 1 if name == "step 0" else turns,
                "seed": resampling.seed,
                "acc50": metrics.mean_interval(right, images, resampling),
                "difference": metrics.paired_difference(answers, first, score, resampling),
                **mcnemar(answers, first),
                **more,
            }
        )

    for name, rule, threshold, on_test, on_val in rules:
        accuracy = float(score(metrics.iou_matrix(choose(on_val, rule))).mean())
        row(name, threshold, choose(on_test, rule), val_acc50=accuracy)
    for rule, p in zip(rows[1:], holm([rule["p"] for rule in rows[1:]]), strict=True):
        rule["p"] = p
    best = metrics.iou_matrix(test).argmax(1)
    oracle = [{**rollout, "steps": [rollout["steps"][step]]} for rollout, step in zip(test, best, strict=True)]
    row(ORACLE, None, oracle, val_acc50=None)
    return rows


def best_rule(rows: list[dict]) -> dict:
    """Return the row of the rule (the first of equals) with the highest Acc@0.5 on val: what could be shipped."""
    return max((row for row in rows if row["rule"] != ORACLE), key=lambda row: row["val_acc50"])


def mcnemar(rollouts_a, rollouts_b) -> dict:
    """Return {"gained", "lost", "p"}: samples only a gets right (IoU >= 0.5), only b, and McNemar's exact p-value."""
    right = [
        {r["id"]: bool(metrics.is_right(v)) for r, v in zip(rs, metrics.iou_matrix(rs)[:, -1], strict=True)}
        for rs in (rollouts_a, rollouts_b)
    ]
    gained, lost = (sum(a[name] and not b[name] for name in a) for a, b in (right, right[::-1]))
    return {"gained": gained, "lost": lost, "p": exact_p(gained, lost)}


def exact_p(gained: int, lost: int) -> float:
    """Return McNemar's exact two-sided p-value for so many discordant samples, taken as independent; 1 for none."""
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def sign_flip_p(rollouts_a, rollouts_b, score, resampling: Resampling) -> float:
    """Return the two-sided p-value of a's mean score minus b's: how often random signs give one as large.

    Paired by id; `score` is that of `metrics.paired_difference`. All samples of an image get the same sign, for they
    are not independent.
    """
    ours, gains = dict(zip((r["id"] for r in rollouts_b), score(metrics.iou_matrix(rollouts_b)), strict=True)), {}
    for rollout, value in zip(rollouts_a, score(metrics.iou_matrix(rollouts_a)), strict=True):
        gains[rollout["image_id"]] = gains.get(rollout["image_id"], 0.0) + value - ours[rollout["id"]]
    return float(
        permutation_test(
            (list(gains.values()),),
            np.sum,
            permutation_type="samples",
            vectorized=True,
            n_resamples=resampling.n_resamples,
            rng=np.random.default_rng(resampling.seed),
        ).pvalue
    )


def holm(p_values) -> list[float]:
    """Return the p-values corrected for their number (Holm 1979), in the same order.

    Where nothing differs, any of them is below 0.05 in at most 5% of the cases, however the tests depend on each other.
    """
    ps, order = np.asarray(p_values, dtype=float), np.argsort(p_values)
    corrected = np.empty_like(ps)
    corrected[order] = np.maximum.accumulate(ps[order] * np.arange(len(ps), 0, -1)).clip(max=1)
    return corrected.tolist()


# ------------------------------------------------------------------------------------------------ power
def smallest_difference(discordant: float, n: int, power: float = 0.8) -> float | None:
    """Return the smallest difference of two shares that `n` paired samples show with this power, at 5% two-sided.

    `discordant`: the share of samples that exactly one of the two gets right. Normal approximation (Connor 1987): the
    difference is (z_0.975 sqrt(d) + z_power sqrt(d - difference^2)) / sqrt(n), a quadratic equation whose root stands
    here. It takes the samples as independent. None where even a difference as large as `discordant` does not show.
    """
    alpha, beta = norm.ppf([0.975, power])
    root = alpha * n**0.5 + beta * max(n + beta**2 - alpha**2, 0) ** 0.5
    difference = discordant**0.5 * root / (n + beta**2)
    return float(difference) if n > alpha**2 and 0 < difference <= discordant else None


def _best(values) -> int:
    """Return the index of the largest value, the first of equals; None counts below all."""
    return int(np.argmax([-inf if value is None else value for value in values]))


def _ious(boxes) -> np.ndarray:
    """Return the IoU of each pair of boxes, shape (n, n), 0 where one is missing or with itself."""
    rows = ious([box for box in boxes for _ in boxes], boxes * len(boxes)).reshape(len(boxes), -1)
    np.fill_diagonal(rows, 0.0)
    return rows


def rule_curve(rollouts, stop, thresholds) -> list[dict]:
    """Return for each threshold of a stopping rule {"threshold", "acc50", "answers"}: samples answered by each step."""
    ious, curve = metrics.iou_matrix(rollouts), []
    for threshold in thresholds:
        steps = np.array(list(map(stop(threshold), (rollout["steps"] for rollout in rollouts))))
        right = metrics.is_right(ious[np.arange(len(ious)), steps])
        answers = np.bincount(steps, minlength=ious.shape[1]).tolist()
        curve.append({"threshold": threshold, "acc50": float(right.mean()), "answers": answers})
    return curve

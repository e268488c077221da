"""Scores of rollouts, each with a 95% bootstrap interval that resamples images (scores as in the paper's v1).

A rollout is one sample with its T + 1 steps, boxes as four integers 0..1000:
    {"id", "image_id", "subset", "truth": [four numbers 0..1000], "steps": [{"box": box or None}, ...]}
A step without a box did not parse: its IoU is 0. The final step is the result; whatever was chosen with the
ground truth stands under a key with the word "oracle". A value comes as a cell {"value", "low", "high", "n"},
n in samples. The value is None for an empty slice; the limits are None where too few images allow none.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import DegenerateDataWarning, binomtest, bootstrap, t

from ivt_utils.boxes import ious, valid
from ivt_utils.schema import Cell, Rollout

RIGHT = 0.5  # a box is right from this IoU on
THRESHOLDS = {"acc50": RIGHT, "acc70": 0.7, "acc90": 0.9}
STEPS = ("step0", "final", "oracle")
SAME = 1e-9  # IoU differences up to this are none
FEW = 5  # right or wrong samples: below it, the limits of a share are exact ones
CURVE_PARTS = 4  # a learning curve gains from the first of so many parts to the last
BATCH = 20  # resamples held in memory at a time; part of what a seed means


@dataclass(frozen=True)
class Resampling:
    """How intervals are drawn: the seed of the bootstrap, and its number of resamples (positive, else ValueError)."""

    seed: int
    n_resamples: int

    def __post_init__(self):
        if isinstance(self.n_resamples, bool) or not isinstance(self.n_resamples, int) or self.n_resamples < 1:
            raise ValueError(f"The number of resamples must be a positive integer, not {self.n_resamples!r}.")


def check_rollout(rollout) -> None:
    """Return nothing when `rollout` has the form above; otherwise a ValueError says what is wrong with it."""
    if not isinstance(rollout, dict):
        raise ValueError("A rollout must be a dictionary.")
    for key in ("id", "image_id", "subset"):
        if not isinstance(rollout.get(key), str):
            raise ValueError(f"A rollout needs a text under {key!r}.")
    name, truth, steps = rollout["id"], rollout.get("truth"), rollout.get("steps")
    if not isinstance(truth, list | tuple) or len(truth) != 4 or not all(map(_is_coordinate, truth)):
        raise ValueError(f"The ground truth of {name!r} is not four finite numbers.")
    if not (truth[0] < truth[2] and truth[1] < truth[3]):
        raise ValueError(f"The ground truth of {name!r} is reversed or empty: {list(truth)}.")
    if not isinstance(steps, list | tuple) or not steps:
        raise ValueError(f"The rollout {name!r} has no steps.")
    for number, step in enumerate(steps):
        if not isinstance(step, dict) or "box" not in step:
            raise ValueError(f"Step {number} of {name!r} has no 'box' (null where the answer did not parse).")
        if step["box"] is not None and not valid(step["box"]):
            raise ValueError(f"Step {number} of {name!r} has a box that is not four integers 0..1000.")


def check(rollouts) -> None:
    """Return nothing when rollouts can be scored together: at least one, no id twice, equally many steps."""
    if len(rollouts) == 0:
        raise ValueError("There are no rollouts to score.")
    seen = set()
    for rollout in rollouts:
        check_rollout(rollout)
        if rollout["id"] in seen:
            raise ValueError(f"The id {rollout['id']!r} stands twice in one list of rollouts.")
        seen.add(rollout["id"])
    counts = sorted({len(rollout["steps"]) for rollout in rollouts})
    if len(counts) > 1:
        raise ValueError(f"The rollouts differ in their number of steps: {', '.join(map(str, counts))}.")


def first_steps(rollouts: list[Rollout], count: int = 1) -> list[Rollout]:
    """Return the same rollouts cut after `count` steps (1: the single-shot answer alone)."""
    return [{**rollout, "steps": rollout["steps"][:count]} for rollout in rollouts]


def iou_matrix(rollouts) -> np.ndarray:
    """Return the IoU of every step with the ground truth, shape (n, T + 1), 0 where a step has no box."""
    check(rollouts)
    count = len(rollouts[0]["steps"])
    boxes = [step["box"] for rollout in rollouts for step in rollout["steps"]]
    truths = [rollout["truth"] for rollout in rollouts for _ in range(count)]
    return ious(boxes, truths).reshape(len(rollouts), count)


def is_right(iou):
    """Return whether a box with this IoU is right, as Acc@0.5 counts it; for an array, the array of it."""
    return iou >= RIGHT


def parsed_matrix(rollouts) -> np.ndarray:
    """Return which steps have a box, booleans of shape (n, T + 1)."""
    check(rollouts)
    return np.array([[step["box"] is not None for step in rollout["steps"]] for rollout in rollouts])


def step_score(step: str | int, metric: str):
    """Return a function from an IoU matrix (n, T + 1) to one score a sample (n,).

    `step`: "step0", "final", "oracle" (the best step, chosen with the ground truth) or the number of a step.
    `metric`: "acc50", "acc70", "acc90" (1 where IoU >= threshold) or "miou".
    """
    if not (isinstance(step, int) or step in STEPS) or metric not in (*THRESHOLDS, "miou"):
        raise ValueError(f"There is no {metric!r} of {step!r}: take acc50, acc70, acc90 or miou of {STEPS}.")

    def score(ious):
        by_name = {"step0": ious[:, 0], "final": ious[:, -1], "oracle": ious.max(axis=1)}
        column = ious[:, step] if isinstance(step, int) else by_name[step]
        return column if metric == "miou" else (column >= THRESHOLDS[metric]).astype(float)

    return score


def degradation_per_step(ious) -> np.ndarray:
    """Return per sample (IoU of step 0 - IoU of the final step) / T, shape (n,); positive: the loop harms."""
    turns = ious.shape[1] - 1
    if turns == 0:
        raise ValueError("Degradation needs at least one refinement, and these rollouts have step 0 only.")
    return (ious[:, 0] - ious[:, -1]) / turns


def _is_coordinate(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e6


def _ratio(sums, counts, axis=-1):
    total, weight = sums.sum(axis=axis), counts.sum(axis=axis)
    return np.divide(total, weight, out=np.full(total.shape, np.nan), where=weight > 0)


def intervals(numerators, denominators, image_ids, resampling: Resampling) -> list[Cell]:
    """Return one cell per row k: sum(numerators[k]) / sum(denominators[k]), with its 95% bootstrap interval.

    Arrays of shape (K, n) over n samples. The unit of resampling is the image: all samples of an image are
    drawn together, the same draws for every row (scipy.stats.bootstrap, percentile method). The value is None
    without a positive denominator; the limits are None where any resample has none, or with one image.
    A row of booleans is a share. Where fewer than `FEW` samples are true, or fewer are not, the resamples hardly
    differ, and the limits are those of `exact_limits`.
    `n` counts the samples with a denominator other than 0.
    """
    shares = [np.asarray(row).dtype == bool for row in numerators]
    numerators, denominators = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    _, image = np.unique(np.asarray(image_ids), return_inverse=True)
    images = int(image.max()) + 1
    sums = np.array([np.bincount(image, row, images) for row in numerators])
    counts = np.array([np.bincount(image, row, images) for row in denominators])
    values, low, high = _ratio(sums, counts), *np.full((2, len(sums)), np.nan)
    if images > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DegenerateDataWarning)
            low, high = bootstrap(
                (sums, counts),
                _ratio,
                axis=-1,
                paired=True,
                vectorized=True,
                method="percentile",
                n_resamples=resampling.n_resamples,
                batch=BATCH,
                rng=np.random.default_rng(resampling.seed),
            ).confidence_interval
        for row in np.flatnonzero(shares):
            hits, misses = sums[row].sum(), counts[row].sum() - sums[row].sum()
            if min(hits, misses) < FEW and hits + misses > 0:
                low[row], high[row] = exact_limits(hits, misses, int(np.count_nonzero(counts[row])))
    sizes = np.count_nonzero(denominators, axis=1)
    rows = zip(values, low, high, sizes, strict=True)
    return [{"value": _plain(v), "low": _plain(a), "high": _plain(b), "n": int(n)} for v, a, b, n in rows]


def exact_limits(hits: float, misses: float, images: int) -> tuple[float, float]:
    """Return the limits of Clopper and Pearson (95%) of a share, for as many trials as there are images.

    The samples of one image may share their luck, so an image counts as one trial: of the rarer kind there are as many
    trials as samples, and the other kind makes up the rest.
    """
    rare, share = min(hits, misses, images), min(hits, misses) / (hits + misses)
    limits = binomtest(int(rare), int(images)).proportion_ci(method="exact")
    low, high = min(limits.low, share), max(limits.high, share)
    return (low, high) if hits < misses else (1 - high, 1 - low)


def _plain(number) -> float | None:
    return None if np.isnan(number) else float(number)


def side(cell: Mapping[str, Any], level: float = 0.0) -> str:
    """Return where the interval of a cell lies: "above" the level, "below" it, or "open" where it holds both.

    Whatever the project says of a number, in tables, sentences and verdicts, is decided here.
    """
    if cell["low"] is None or cell["low"] <= level <= cell["high"]:
        return "open"
    return "above" if cell["low"] > level else "below"


def mean_interval(scores, image_ids, resampling: Resampling) -> Cell:
    """Return the cell of the mean of one score a sample, resampled by image."""
    return intervals([scores], [np.ones(len(scores))], image_ids, resampling)[0]


def paired(rollouts_a, rollouts_b):
    """Return both lists ordered by id; a ValueError where they do not speak of the same samples."""
    check(rollouts_a)
    check(rollouts_b)
    a, b = ({rollout["id"]: rollout for rollout in rollouts} for rollouts in (rollouts_a, rollouts_b))
    if a.keys() != b.keys():
        odd = min(a.keys() ^ b.keys())
        raise ValueError(f"The two lists of rollouts are not about the same samples: {odd!r} is in only one.")
    for name in a:
        if a[name]["image_id"] != b[name]["image_id"] or list(a[name]["truth"]) != list(b[name]["truth"]):
            raise ValueError(f"The two lists of rollouts disagree on the image or the truth of {name!r}.")
    names = sorted(a)
    return [a[name] for name in names], [b[name] for name in names]


def paired_difference(rollouts_a, rollouts_b, score, resampling: Resampling, score_b=None) -> Cell:
    """Return the cell of the mean of a's score minus b's, paired by id and resampled by image.

    `score` takes an IoU matrix (n, T + 1) to (n,), as `step_score` and `degradation_per_step` do; `score_b` when b is
    scored otherwise. T may differ. ValueError when the lists are not about the same samples.
    """
    a, b = paired(rollouts_a, rollouts_b)
    gains = score(iou_matrix(a)) - (score_b or score)(iou_matrix(b))
    return mean_interval(gains, [rollout["image_id"] for rollout in a], resampling)


def over_seeds(scores, image_ids, share: bool = False) -> Cell:
    """Return the cell of the mean score over several trainings, with an interval for new images and new trainings.

    `scores`: shape (S, n), one row a training, S > 1. A mixed model with two crossed random effects, the training and
    the image: the samples of an image share its luck, and so do all answers of one training. Its variance comes from
    the mean squares (method of moments), and the limits from Student's t with Satterthwaite's degrees of freedom.
    A bootstrap would draw the few trainings again from themselves, which makes its intervals too short. The limits are
    None with one image. `share`: the mean lies in [0, 1], and so do the limits; they are those of `exact_limits` where
    all scores are 0, or all are 1.
    """
    scores = np.asarray(scores, dtype=float)
    trainings, n = scores.shape
    if trainings < 2:
        raise ValueError("An interval over seeds needs two trainings or more.")
    _, image = np.unique(np.asarray(image_ids), return_inverse=True)
    images, mean = int(image.max()) + 1, scores.mean()
    if images < 2:
        return {"value": float(mean), "low": None, "high": None, "n": n}
    # What each image adds to the mean (the linear part of a ratio estimate, for images hold unequal numbers of samples)
    parts = np.array([np.bincount(image, row - mean, images) for row in scores]) * images / n
    rows, columns = parts.mean(axis=1, keepdims=True), parts.mean(axis=0, keepdims=True)
    freedom = np.array([trainings - 1, images - 1, (trainings - 1) * (images - 1)])
    squares = images * (rows**2).sum(), trainings * (columns**2).sum(), ((parts - rows - columns) ** 2).sum()
    of_seeds, of_images, rest = np.array(squares) / freedom
    terms = np.array([max(of_seeds, rest), max(of_images, rest), -rest])
    total = terms.sum()
    if total > 0:
        half = t.ppf(0.975, total**2 / (terms**2 / freedom).sum()) * np.sqrt(total / (trainings * images))
    else:
        half = 0.0
    low, high = mean - half, mean + half
    if share:
        low, high = exact_limits(mean, 1 - mean, images) if mean in (0, 1) else (max(low, 0), min(high, 1))
    return {"value": float(mean), "low": float(low), "high": float(high), "n": n}


def paired_ratio(rollouts_a, rollouts_b, score, resampling: Resampling) -> Cell:
    """Return the cell of a's mean score over b's, paired as above; None where b's mean is not positive.

    The limits are None when b's mean is not positive in some resample: such a ratio has no bounded interval.
    """
    a, b = paired(rollouts_a, rollouts_b)
    pair, images = ([score(iou_matrix(a))], [score(iou_matrix(b))]), [rollout["image_id"] for rollout in a]
    return intervals(*pair, images, resampling)[0] | {"n": len(a)}


def score(rollouts, resampling: Resampling) -> dict:
    """Return every metric of one method as nested dictionaries of cells; the rollouts' order does not matter.

    "final": acc50, acc70, acc90, miou of the final step, the result. "per_step"[t]: the same, with the
    share of answers that parse ("parsed") and acc50 and miou among those. "subsets": step 0 and final.
    With T > 0 also "degradation_per_step"; the shares of samples that degrade, improve or stay (final against
    step-0 IoU) and whose final box is the step-0 box; "fall": acc50 of step 0 minus that of the final step is
    lost_unparsed + lost_wrong_box - gained; "hard" and "easy" (step-0 IoU below 0.5, or not): mean IoU first,
    final and their difference. "oracle_best_step": the best step, chosen with the ground truth.
    """
    check(rollouts)
    rollouts = sorted(rollouts, key=lambda rollout: rollout["id"])
    ious, parsed = iou_matrix(rollouts), parsed_matrix(rollouts)
    first, final = ious[:, 0], ious[:, -1]
    subset = np.array([rollout["subset"] for rollout in rollouts])
    everyone = np.ones(len(rollouts), dtype=bool)
    pending = []  # (cell to fill, numerator, denominator): all are resampled in one go below

    def share(scores, where=everyone):
        pending.append((cell := {}, np.where(where, scores, False), where))
        return cell

    def quality(column, where=everyone):
        accuracies = {name: share(column >= limit, where) for name, limit in THRESHOLDS.items()}
        return accuracies | {"miou": share(column, where)}

    per_step = []
    for column, has_box in zip(ious.T, parsed.T, strict=True):
        among = {"acc50_of_parsed": share(is_right(column), has_box), "miou_of_parsed": share(column, has_box)}
        per_step.append(quality(column) | {"parsed": share(has_box)} | among)
    metrics = {"final": per_step[-1], "per_step": per_step}
    if ious.shape[1] > 1:
        change, right = final - first, is_right(ious)
        lost = right[:, 0] & ~right[:, -1]
        same = [r["steps"][0]["box"] is not None and _same_box(r) for r in rollouts]
        metrics |= {
            "degradation_per_step": share(degradation_per_step(ious)),
            "share_degrade": share(change < -SAME),
            "share_improve": share(change > SAME),
            "share_stay": share(abs(change) <= SAME),
            "share_same_box": share(same),
            "fall": {
                "lost_unparsed": share(lost & ~parsed[:, -1]),
                "lost_wrong_box": share(lost & parsed[:, -1]),
                "gained": share(~right[:, 0] & right[:, -1]),
            },
        }
        for name, where in (("hard", ~is_right(first)), ("easy", is_right(first))):
            parts = {"first": first, "final": final, "difference": change}
            metrics[name] = {part: share(values, where) for part, values in parts.items()}
    metrics["subsets"] = {
        str(name): {"step0": quality(first, subset == name), "final": quality(final, subset == name)}
        for name in np.unique(subset)
    }
    metrics["oracle_best_step"] = quality(ious.max(axis=1))
    cells, *columns = zip(*pending, strict=True)
    images = [rollout["image_id"] for rollout in rollouts]
    results = intervals(*columns, images, resampling)
    for cell, values in zip(cells, results, strict=True):
        cell.update(values)
    return metrics


def refinement(rollouts, resampling: Resampling) -> dict:
    """Return the refinement metrics of VG-Refiner (arXiv 2512.06373) as cells; step 0 takes the role of their tool.

    With a the IoU of step 0, b that of the final step, right: above 0.5 (theirs; >= 0.5 elsewhere in this project):
    "nsri", normalized signed relative IoU: the mean of (b - a) / (1 - a) where b > a, (b - a) / a where b < a, else 0;
    "nsri_first_right", "nsri_first_wrong": the same among those; "ccr", critical correction rate: right in the end
    among those wrong at first; "refinement": b > a, and "follow": b = a, among those right at first; "worsen": b < a
    among all; "inherited_error": wrong at first and b = a, among those wrong in the end.
    """
    ious = iou_matrix(rollouts)
    first, final = ious[:, 0], ious[:, -1]
    change = np.where(abs(final - first) <= SAME, 0.0, final - first)
    room = np.where(change > 0, 1 - first, first)
    gain = np.divide(change, room, out=np.zeros_like(change), where=room > SAME)
    right, wrong, everyone = first > RIGHT, first <= RIGHT, np.ones(len(first), dtype=bool)
    parts = {
        "nsri": (gain, everyone),
        "nsri_first_right": (gain, right),
        "nsri_first_wrong": (gain, wrong),
        "ccr": (final > RIGHT, wrong),
        "refinement": (change > 0, right),
        "follow": (change == 0, right),
        "worsen": (change < 0, everyone),
        "inherited_error": (wrong & (change == 0), final <= RIGHT),
    }
    scores, groups = zip(*parts.values(), strict=True)
    images = [rollout["image_id"] for rollout in rollouts]
    numerators = [np.where(group, score, False) for score, group in zip(scores, groups, strict=True)]
    return dict(zip(parts, intervals(numerators, groups, images, resampling), strict=True))


def curve_gain(rows: list[dict], image_ids, resampling: Resampling) -> dict:
    """Return what a learning curve gained: {"steps", "first", "last", "difference"}.

    `rows`: {"step", "ious"} in the order of training, "ious" with the IoUs (0 to 1) of the answers to each prompt;
    `image_ids`: one a prompt. "first" and "last" are the mean IoU of the final answers in the first and in the last
    quarter of the rows, one row at least; "difference" is the cell of last - first, paired by prompt, n in prompts.
    ValueError for fewer than two rows, or for rows that are not about these prompts.
    """
    finals = np.array([[answers[-1] for answers in row["ious"]] for row in rows], dtype=float)
    if len(rows) < 2 or finals.shape != (len(rows), len(image_ids)) or not np.isfinite(finals).all():
        raise ValueError("A learning curve needs two rows or more, each with the IoUs of every prompt.")
    quarter = max(1, len(rows) // CURVE_PARTS)
    first, last = finals[:quarter].mean(axis=0), finals[-quarter:].mean(axis=0)
    return {
        "steps": [row["step"] for row in rows],
        "first": float(first.mean()),
        "last": float(last.mean()),
        "difference": mean_interval(last - first, image_ids, resampling),
    }


def _same_box(rollout) -> bool:
    first, final = rollout["steps"][0]["box"], rollout["steps"][-1]["box"]
    return final is not None and list(first) == list(final)

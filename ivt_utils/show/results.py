"""The content of results.json: every method's metrics, paired differences, and the targets they are held to.

The final step is a method's result. Whatever was chosen with the ground truth has "oracle" in its name.
"""

import math
from datetime import UTC, datetime

import numpy as np

from ivt_utils import closer, metrics, selection
from ivt_utils.methods import METHODS, SINGLE, TRAINED
from ivt_utils.metrics import Resampling
from ivt_utils.mirage import SAMPLED
from ivt_utils.schema import Rollout

COMPARISONS = (  # (a, its step, b, its step): a - b, paired
    ("base_ivt", "final", "base_single", "final"),
    ("base_ivt_bare", "final", "base_single", "final"),
    ("base_ivt", "final", "base_ivt_bare", "final"),
    ("sft_ivt", "final", "base_single", "final"),
    ("sft_ivt", "step0", "base_single", "final"),
    ("sft_ivt", "oracle", "base_single", "final"),
    ("sft_ivt", "final", "sft_ivt", "step0"),
    ("sft_ivt", "oracle", "sft_ivt", "step0"),
    ("sft_ivt_long", "final", "sft_ivt_long", "step0"),
    ("sft_ivt_long", "oracle", "sft_ivt_long", "step0"),
    ("sft_grpo_ivt", "final", "base_single", "final"),
    ("sft_grpo_ivt", "final", "sft_ivt", "final"),
    ("sft_grpo_ivt", "final", "sft_grpo_ivt", "step0"),
    ("grpo_single", "final", "base_single", "final"),
    ("sft_keep_ivt", "final", "base_single", "final"),
    ("sft_keep_ivt", "final", "sft_keep_ivt", "step0"),
    ("sft_keep_grpo_ivt", "final", "sft_keep_ivt", "final"),
    ("sft_keep_grpo_ivt", "final", "sft_keep_grpo_ivt", "step0"),
)
MENDED = (  # (after GRPO, before it): what a step of the loop loses
    ("sft_grpo_ivt", "sft_ivt"),
    ("sft_grpo_ivt_long", "sft_ivt_long"),
    ("sft_keep_grpo_ivt", "sft_keep_ivt"),
    ("sft_keep_grpo_ivt_long", "sft_keep_ivt_long"),
)
CURVES = ("grpo", "grpo_keep")  # the adapters whose learning curve is told
CONSENSUS = "consensus of its steps"
ROW = ("name", "a", "b", "metric")  # what tells a row of `seed_rows` from the others
OF_THE_DAY = ("created", "commit", "versions", "machine", "wall_seconds")  # what may differ between equal results
STEP_NAMES = {"step0": "step 0", "final": "final", "oracle": "oracle best step"}


def build_results(
    rollouts_by_method,
    *,
    profile_name,
    resampling: Resampling,
    wall_seconds,
    versions,
    commit,
    ablations=(),
    mirage=None,
    looks=(),
    second_turn=(),
    curves=None,
    seeds=None,
) -> dict:
    """Return the content of results.json from the rollouts of each method, all about the same samples.

    Without "base_single", step 0 of "base_ivt" takes its place: the same greedy decoding. Equal input
    gives equal values; created, wall_seconds, commit and versions may differ. ValueError for bad rollouts.
    `mirage`: {method: what `mirage_from` returns} of the methods that notebook 6 has asked; `looks`: rows of
    `closer.closer_rows`; `second_turn`: rows of `controls.second_turn_rows`; `curves`: what `curves_from` returns;
    `seeds`: {seed: {method: rollouts}} of other trainings of the methods in `TRAINED`.
    """
    rollouts: dict[str, list[Rollout]] = dict(rollouts_by_method)
    if "base_single" not in rollouts and "base_ivt" in rollouts:
        rollouts["base_single"] = rollouts["base_ivt"]
    names = [name for name in METHODS if name in rollouts]
    names += sorted(rollouts.keys() - METHODS.keys())
    if not names:
        raise ValueError("There are no rollouts to report; run the notebooks first.")
    for name in names:
        metrics.check(rollouts[name])
        if {r["id"] for r in rollouts[name]} != {r["id"] for r in rollouts[names[0]]}:
            raise ValueError(f"{name} and {names[0]} are about different samples; run one of them again.")
    cut = metrics.first_steps
    own = resampling.seed  # of this run
    rollouts = {name: cut(rollouts[name]) if name in SINGLE else rollouts[name] for name in names}
    methods = {
        name: {
            "n": len(items),
            "n_images": len({r["image_id"] for r in items}),
            "seed": resampling.seed,
            "wall_seconds": wall_seconds.get(name),
            "answers_per_sample": len(items[0]["steps"]),
            "metrics": metrics.score(items, resampling),
            "rules": None,
            **(mirage or {}).get(name, {}),
        }
        for name, items in rollouts.items()
    }
    return {
        "schema": 1,
        "profile": profile_name,
        "seed": resampling.seed,
        "n_resamples": resampling.n_resamples,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "versions": dict(versions),
        "n_test": len(rollouts[names[0]]),
        "methods": methods,
        "differences": list(_differences(rollouts, resampling)),
        "ablations": [dict(row) for row in ablations],
        "closer": [dict(row) for row in looks],
        "second_turn": [dict(row) for row in second_turn],
        "learning_curve": dict(curves or {}),
        "seeds": seed_rows((seeds or {}) | {own: rollouts | (seeds or {}).get(own, {})}, rollouts),
    }


def changed(before, now, place: str = "") -> list[str]:
    """Return "place: before, now" of each value that differs between the contents of two results.json.

    Left out is what may differ (when, where and in what time they were made), and what the last digits of a sum do.
    """
    if isinstance(before, float) and isinstance(now, float) and math.isclose(before, now, rel_tol=1e-9, abs_tol=1e-12):
        return []
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in {**before, **now} if key not in OF_THE_DAY]
        return [line for key in keys for line in changed(before.get(key), now.get(key), f"{place}/{key}")]
    return [] if before == now else [f"{place[1:]}: {before}, now {now}"]


def _compared(steps: dict[str, int]):
    """Yield {"name", "a", "b", "metric"} and the scores of a and b for each difference between methods in `steps`.

    `steps`: how many steps the rollouts of a method have.
    """
    for a, step_a, b, step_b in COMPARISONS:
        if a not in steps or b not in steps:
            continue
        left, right = (n if n in SINGLE else f"{n} {STEP_NAMES[s]}" for n, s in ((a, step_a), (b, step_b)))
        for metric in ("acc50", "miou"):
            kind = f"oracle_{metric}" if "oracle" in (step_a, step_b) else metric
            scores = metrics.step_score(step_a, metric), metrics.step_score(step_b, metric)
            yield {"name": f"{left} - {right}", "a": a, "b": b, "metric": kind}, *scores
    for a, b in _mended(steps):
        same = {"a": a, "b": b, "metric": "degradation_per_step"}
        lost = metrics.degradation_per_step
        yield {"name": f"{a} degradation - {b} degradation", **same}, lost, lost
        yield {"name": f"{a} degradation - a fifth of {b} degradation", **same}, lost, _fifth


def _mended(steps: dict[str, int]) -> list[tuple[str, str]]:
    return [pair for pair in MENDED if all(steps.get(name, 1) > 1 for name in pair)]


def _fifth(ious):
    return metrics.degradation_per_step(ious) / 5


def _differences(rollouts, resampling):
    steps = {name: len(items[0]["steps"]) for name, items in rollouts.items()}
    for row, score_a, score_b in _compared(steps):
        cell = metrics.paired_difference(rollouts[row["a"]], rollouts[row["b"]], score_a, resampling, score_b)
        yield row | cell | {"seed": resampling.seed}
    for a, b in _mended(steps):
        row = {"name": f"{a} degradation / {b} degradation", "a": a, "b": b, "metric": "degradation_ratio"}
        cell = metrics.paired_ratio(rollouts[a], rollouts[b], metrics.degradation_per_step, resampling)
        yield row | cell | {"seed": resampling.seed}
    yield from _worst_step(rollouts.get("base_ivt"), rollouts.get("base_ivt_bare"), resampling)


def seed_rows(trained: dict[int, dict[str, list[Rollout]]], untrained: dict[str, list[Rollout]]) -> list[dict]:
    """Return what several trainings say together: a row for each score of a method and for each difference.

    `trained`: {seed: {method: rollouts}}; a method counts with the seeds that have it, [] where those are fewer than
    two, and so do the rivals under `SAMPLED` and `closer.TAUGHT`. `untrained`: rollouts of the methods that no seed
    changes. A row: {"name", "a", "b" (None: a level), "metric", the cell of `metrics.over_seeds`, "seeds": {seed:
    mean}}. Levels have the name of their method, and the metrics "step0_acc50", "acc50", "miou", "step0_miou",
    "step1_miou" ..., and with refinements "oracle_acc50", "degradation_per_step" and "share_stay".
    """
    if len(trained) < 2:
        return []
    samples = next(iter(untrained.values()))
    images = [rollout["image_id"] for rollout in metrics.paired(samples, samples)[0]]

    def ious_of(rollouts):
        return metrics.iou_matrix(metrics.paired(rollouts, samples)[0])

    fixed = {name: ious_of(rollouts) for name, rollouts in untrained.items() if name not in TRAINED}
    scored = {}  # row's key: {seed: scores}
    for seed, by_method in trained.items():
        own = {name: ious_of(by_method[name]) for name in TRAINED if name in by_method}
        for name, ious in own.items():
            for metric, scores in _levels(ious).items():
                scored.setdefault((name, name, None, metric), {})[seed] = scores
        ious_by_method = fixed | own
        for row_key, score_a, score_b in _compared({name: ious.shape[1] for name, ious in ious_by_method.items()}):
            if row_key["a"] in own:
                gains = score_a(ious_by_method[row_key["a"]]) - score_b(ious_by_method[row_key["b"]])
                scored.setdefault(tuple(row_key[key] for key in ROW), {})[seed] = gains
        for key, gains in _rules(by_method, ious_by_method, ious_of):
            scored.setdefault(key, {})[seed] = gains
    rows = []
    for key, each in scored.items():
        if len(each) > 1:
            row = dict(zip(ROW, key, strict=True))
            share = row["b"] is None and row["metric"] != "degradation_per_step"  # or a mean of IoUs
            row |= metrics.over_seeds(list(each.values()), images, share)
            rows.append(row | {"seeds": {str(seed): float(scores.mean()) for seed, scores in each.items()}})
    return rows


def _rules(rollouts: dict[str, list[Rollout]], ious: dict[str, np.ndarray], ious_of):
    """Yield the key and the gains of what can be shipped after SFT without a threshold, and of SFT over its rivals."""
    first, final = (metrics.step_score(step, "acc50") for step in ("step0", "final"))
    for name in ("sft_ivt", "sft_ivt_long"):
        if name in rollouts:
            consensus = first(ious_of(selection.choose(rollouts[name], selection.medoid)))
            yield (f"{name} {CONSENSUS} - {name} step 0", name, name, "acc50"), consensus - first(ious[name])
            if name == "sft_ivt" and "base_single" in ious:
                gains = consensus - first(ious["base_single"])
                yield (f"{name} {CONSENSUS} - base_single", name, "base_single", "acc50"), gains
    if SAMPLED in rollouts and "sft_ivt" in rollouts:
        sampled = ious_of(selection.choose(rollouts[SAMPLED], selection.medoid))
        key = ("sft_ivt final - consensus of as many sampled answers", "sft_ivt", SAMPLED, "acc50")
        yield key, final(ious["sft_ivt"]) - first(sampled)
    if closer.TAUGHT in rollouts and "sft_ivt" in rollouts:
        both = ious["sft_ivt"], ious_of(rollouts[closer.TAUGHT])
        for metric in ("acc50", "miou"):
            ours, rival = (metrics.step_score("final", metric)(each) for each in both)
            yield (f"sft_ivt final - {closer.TAUGHT}", "sft_ivt", closer.TAUGHT, metric), ours - rival


def _levels(ious) -> dict[str, np.ndarray]:
    which_scores: dict[str, tuple[str | int, str]] = {
        "step0_acc50": ("step0", "acc50"),
        "acc50": ("final", "acc50"),
        "miou": ("final", "miou"),
        **{f"step{t}_miou": (t, "miou") for t in range(ious.shape[1])},
    }
    levels = {name: metrics.step_score(*which)(ious) for name, which in which_scores.items()}
    if ious.shape[1] > 1:
        levels["oracle_acc50"] = metrics.step_score("oracle", "acc50")(ious)
        levels["degradation_per_step"] = metrics.degradation_per_step(ious)
        levels["share_stay"] = (abs(ious[:, -1] - ious[:, 0]) <= metrics.SAME).astype(float)
    return levels


def _worst_step(filled, bare, resampling: Resampling):
    """Yield what the untrained loop loses at its worst step, and the share of it that the bare image loses there.

    The worst step is one refinement for all samples: the one with the lowest Acc@0.5, which the truth tells.
    """
    if not filled or len(filled[0]["steps"]) < 2:
        return
    worst = 1 + int(metrics.is_right(metrics.iou_matrix(filled)[:, 1:]).mean(axis=0).argmin())
    first, there = metrics.step_score("step0", "acc50"), metrics.step_score(worst, "acc50")
    cell = metrics.paired_difference(filled, filled, there, resampling, first)
    same = {"b": "base_ivt", "step": worst, "seed": resampling.seed}
    yield {"name": "base_ivt worst step - base_ivt step 0", "a": "base_ivt", "metric": "acc50", **same, **cell}
    if bare and len(bare[0]["steps"]) > worst:
        cell = metrics.paired_ratio(bare, filled, lambda ious: first(ious) - there(ious), resampling)
        name = "base_ivt_bare loss / base_ivt loss at its worst step"
        yield {"name": name, "a": "base_ivt_bare", "metric": "acc50_loss_ratio", **same, **cell}

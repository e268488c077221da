"""The content of results.json: every method's metrics, paired differences, and the targets they are held to.

The final step is a method's result. Whatever was chosen with the ground truth has "oracle" in its name.
"""

import math
import os
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from ivt_utils import closer, confidence, controls, metrics, selection
from ivt_utils.methods import METHODS, SINGLE, TRAINED, longer
from ivt_utils.mirage import SAMPLED
from ivt_utils.runtime import hardware
from ivt_utils.runtime.store import (
    PROBE,
    ROOT,
    SEEDS,
    ArtefactError,
    check_stage,
    checksum,
    damaged_line,
    finished_stages,
    read_json,
    read_jsonl,
)
from ivt_utils.schema import Cell, Rollout

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
    seed,
    n_resamples,
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
    rollouts = {name: cut(rollouts[name]) if name in SINGLE else rollouts[name] for name in names}
    methods = {
        name: {
            "n": len(items),
            "n_images": len({r["image_id"] for r in items}),
            "seed": seed,
            "wall_seconds": wall_seconds.get(name),
            "answers_per_sample": len(items[0]["steps"]),
            "metrics": metrics.score(items, seed, n_resamples),
            "rules": None,
            **(mirage or {}).get(name, {}),
        }
        for name, items in rollouts.items()
    }
    return {
        "schema": 1,
        "profile": profile_name,
        "seed": seed,
        "n_resamples": n_resamples,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "versions": dict(versions),
        "n_test": len(rollouts[names[0]]),
        "methods": methods,
        "differences": list(_differences(rollouts, seed, n_resamples)),
        "ablations": [dict(row) for row in ablations],
        "closer": [dict(row) for row in looks],
        "second_turn": [dict(row) for row in second_turn],
        "learning_curve": dict(curves or {}),
        "seeds": seed_rows((seeds or {}) | {seed: rollouts | (seeds or {}).get(seed, {})}, rollouts),
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


def by_name(rows) -> dict[tuple[str, str], dict]:
    """Return rows of "differences" or "seeds" by their name and metric; of two rows the later one."""
    return {(row["name"], row["metric"]): row for row in rows}


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
        yield {"name": f"{a} degradation - {b} degradation", **same}, metrics.degradation, metrics.degradation
        yield {"name": f"{a} degradation - a fifth of {b} degradation", **same}, metrics.degradation, _fifth


def _mended(steps: dict[str, int]) -> list[tuple[str, str]]:
    return [pair for pair in MENDED if all(steps.get(name, 1) > 1 for name in pair)]


def _fifth(ious):
    return metrics.degradation(ious) / 5


def _differences(rollouts, seed, n_resamples):
    chance = {"seed": seed, "n_resamples": n_resamples}
    steps = {name: len(items[0]["steps"]) for name, items in rollouts.items()}
    for told, *scores in _compared(steps):
        cell = metrics.paired_difference(rollouts[told["a"]], rollouts[told["b"]], *scores, **chance)
        yield told | cell | {"seed": seed}
    for a, b in _mended(steps):
        told = {"name": f"{a} degradation / {b} degradation", "a": a, "b": b, "metric": "degradation_ratio"}
        cell = metrics.paired_ratio(rollouts[a], rollouts[b], metrics.degradation, **chance)
        yield told | cell | {"seed": seed}
    yield from _worst_step(rollouts.get("base_ivt"), rollouts.get("base_ivt_bare"), chance)


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
    for seed, found in trained.items():
        own = {name: ious_of(found[name]) for name in TRAINED if name in found}
        for name, ious in own.items():
            for metric, scores in _levels(ious).items():
                scored.setdefault((name, name, None, metric), {})[seed] = scores
        known = fixed | own
        for told, score_a, score_b in _compared({name: ious.shape[1] for name, ious in known.items()}):
            if told["a"] in own:
                gains = score_a(known[told["a"]]) - score_b(known[told["b"]])
                scored.setdefault(tuple(told[key] for key in ROW), {})[seed] = gains
        for key, gains in _rules(found, known, ious_of):
            scored.setdefault(key, {})[seed] = gains
    rows = []
    for key, each in scored.items():
        if len(each) > 1:
            row = dict(zip(ROW, key, strict=True))
            share = row["b"] is None and row["metric"] != "degradation_per_step"  # or a mean of IoUs
            row |= metrics.over_seeds(list(each.values()), images, share)
            rows.append(row | {"seeds": {str(seed): float(scores.mean()) for seed, scores in each.items()}})
    return rows


def _rules(found: dict[str, list[Rollout]], ious: dict[str, np.ndarray], ious_of):
    """Yield the key and the gains of what can be shipped after SFT without a threshold, and of SFT over its rivals."""
    first, final = (metrics.step_score(step, "acc50") for step in ("step0", "final"))
    for name in ("sft_ivt", "sft_ivt_long"):
        if name in found:
            chosen = first(ious_of(selection.choose(found[name], selection.medoid)))
            yield (f"{name} {CONSENSUS} - {name} step 0", name, name, "acc50"), chosen - first(ious[name])
            if name == "sft_ivt" and "base_single" in ious:
                gains = chosen - first(ious["base_single"])
                yield (f"{name} {CONSENSUS} - base_single", name, "base_single", "acc50"), gains
    if SAMPLED in found and "sft_ivt" in found:
        sampled = ious_of(selection.choose(found[SAMPLED], selection.medoid))
        key = ("sft_ivt final - consensus of as many sampled answers", "sft_ivt", SAMPLED, "acc50")
        yield key, final(ious["sft_ivt"]) - first(sampled)
    if closer.TAUGHT in found and "sft_ivt" in found:
        both = ious["sft_ivt"], ious_of(found[closer.TAUGHT])
        for metric in ("acc50", "miou"):
            ours, taught = (metrics.step_score("final", metric)(each) for each in both)
            yield (f"sft_ivt final - {closer.TAUGHT}", "sft_ivt", closer.TAUGHT, metric), ours - taught


def _levels(ious) -> dict[str, np.ndarray]:
    asked: dict[str, tuple[str | int, str]] = {
        "step0_acc50": ("step0", "acc50"),
        "acc50": ("final", "acc50"),
        "miou": ("final", "miou"),
        **{f"step{t}_miou": (t, "miou") for t in range(ious.shape[1])},
    }
    levels = {name: metrics.step_score(*which)(ious) for name, which in asked.items()}
    if ious.shape[1] > 1:
        levels["oracle_acc50"] = metrics.step_score("oracle", "acc50")(ious)
        levels["degradation_per_step"] = metrics.degradation(ious)
        levels["share_stay"] = (abs(ious[:, -1] - ious[:, 0]) <= metrics.SAME).astype(float)
    return levels


def _worst_step(filled, bare, chance):
    """Yield what the untrained loop loses at its worst step, and the share of it that the bare image loses there.

    The worst step is one refinement for all samples: the one with the lowest Acc@0.5, which the truth tells.
    """
    if not filled or len(filled[0]["steps"]) < 2:
        return
    worst = 1 + int(metrics.is_right(metrics.iou_matrix(filled)[:, 1:]).mean(axis=0).argmin())
    first, there = metrics.step_score("step0", "acc50"), metrics.step_score(worst, "acc50")
    cell = metrics.paired_difference(filled, filled, there, first, **chance)
    same = {"b": "base_ivt", "step": worst, "seed": chance["seed"]}
    yield {"name": "base_ivt worst step - base_ivt step 0", "a": "base_ivt", "metric": "acc50", **same, **cell}
    if bare and len(bare[0]["steps"]) > worst:
        cell = metrics.paired_ratio(bare, filled, lambda ious: first(ious) - there(ious), **chance)
        name = "base_ivt_bare loss / base_ivt loss at its worst step"
        yield {"name": name, "a": "base_ivt_bare", "metric": "acc50_loss_ratio", **same, **cell}


def verdict(cell: Cell | None, least: float = -math.inf, most: float = math.inf, strict: bool = False) -> str | None:
    """Return what the interval of a cell says of the claim that its value lies from `least` to `most`.

    "reached" where the whole interval lies inside the claim, "not reached" where all of it lies outside, "open" where
    it holds both or where there is no interval, None without a cell: not run. A limit of the interval that equals one
    of the claim is inside, or outside where the claim is `strict` ("above 0").
    """
    if cell is None:
        return None
    slack = 1e-9 if strict else -1e-9  # whatever the last bit of a limit is
    lower, upper = metrics.side(cell, least + slack), metrics.side(cell, most - slack)
    if (lower, upper) == ("above", "below"):
        return "reached"
    return "not reached" if lower == "below" or upper == "above" else "open"


def targets(results: dict) -> list[dict]:
    """Return the course's targets, each {"key", "claim", "unit", "value", "low", "high", "n", "trainings", "verdict"}.

    "verdict" is that of the function of this name, by the interval; None when a method that it needs was not run.
    "trainings": over how many seeds the interval speaks, where several were trained; None: one training, or none.
    "unit": "share", "difference" of shares, "ratio", "IoU".
    """
    methods = {name: found["metrics"] for name, found in results["methods"].items()}
    compared = by_name((*results["differences"], *results.get("seeds", [])))  # of several trainings, where there are

    def difference(name, metric="acc50"):
        return compared.get((name, metric))

    def level(name, metric):
        return difference(name, metric) or methods.get(name, {}).get(metric)

    def target(key, claim, unit, cell, *limits, **strict):
        shown = {name: cell[name] if cell else None for name in ("value", "low", "high", "n")}
        trainings = len(cell["seeds"]) if cell and "seeds" in cell else None
        return {
            "key": key,
            "claim": claim,
            "unit": unit,
            **shown,
            "trainings": trainings,
            "verdict": verdict(cell, *limits, **strict),
        }

    fall = difference("base_ivt worst step - base_ivt step 0")
    worst = f"worst step (step {fall['step']}, chosen with the truth)" if fall else "worst step"
    parsed = [
        step["parsed"]
        for name in ("base_ivt", "base_ivt_long")
        if name in methods
        for step in methods[name]["per_step"]
    ]
    order = ("not reached", "open", "reached")
    least = min(parsed, key=lambda cell: (order.index(verdict(cell, 0.99)), cell["value"]), default=None)
    part = " degradation - a fifth of "
    mended = difference(f"sft_grpo_ivt{part}sft_ivt degradation", "degradation_per_step")
    fifth = "IoU lost a step: SFT + GRPO's minus a fifth of SFT's, at most 0"
    if mended and verdict(level("sft_ivt", "degradation_per_step"), 0, strict=True) != "reached":
        mended = mended | {"low": None, "high": None}
        fifth += "; SFT's own loss is not above 0 by its interval, so there is nothing to mend"
    curve = results.get("learning_curve", {}).get("grpo", {})
    gains = {row["name"]: row for row in results.get("closer", []) if row["seed"] == "mean"}
    gains = [gains[name]["acc50"] | {"seeds": gains[name]["seeds"]} for name in closer.GAINS if name in gains]
    smaller = min(gains, key=lambda cell: cell["value"], default=None)
    each = {verdict(cell, 0, strict=True) for cell in gains}
    look = next((found for found in order if found in each), None)
    return [
        target(
            "a",
            f"base + IVT at its {worst}: Acc@0.5 at least 20 points below step 0",
            "difference",
            fall,
            -math.inf,
            -0.2,
        ),
        target(
            "b",
            "of that fall, the loop with the bare image loses less than a quarter",
            "ratio",
            difference("base_ivt_bare loss / base_ivt loss at its worst step", "acc50_loss_ratio"),
            -math.inf,
            0.25,
            strict=True,
        ),
        target(
            "c",
            "the untrained loop, every step of the short and of the long one: at least 99 % of the answers "
            "parse; shown: the step for which this holds least",
            "share",
            least,
            0.99,
        ),
        target(
            "d",
            "base, single shot: Acc@0.5 from 75 to 88 %",
            "share",
            methods.get("base_single", {}).get("final", {}).get("acc50"),
            0.75,
            0.88,
        ),
        target(
            "e",
            "SFT + IVT, oracle best step: Acc@0.5 at least 2.4 points above single shot",
            "difference",
            difference("sft_ivt oracle best step - base_single", "oracle_acc50"),
            0.024,
        ),
        target(
            "f",
            "SFT + IVT, step 0: Acc@0.5 not below single shot",
            "difference",
            difference("sft_ivt step 0 - base_single"),
            0,
        ),
        target("g", fifth, "IoU", mended, -math.inf, 0),
        target(
            "h",
            "IoU lost a step in the long loop: SFT + GRPO less than SFT",
            "IoU",
            difference("sft_grpo_ivt_long degradation - sft_ivt_long degradation", "degradation_per_step"),
            -math.inf,
            0,
            strict=True,
        ),
        target(
            "i",
            "SFT + GRPO + IVT: at least 50 % of the samples end with the IoU of step 0 (the paper: 64 %)",
            "share",
            level("sft_grpo_ivt", "share_stay"),
            0.5,
        ),
        target(
            "j",
            "learning curve of GRPO: mean IoU of the final answers in its last quarter above that in its first",
            "IoU",
            curve.get("difference"),
            0,
            strict=True,
        ),
        target(
            "k",
            "SFT + GRPO + IVT, final: Acc@0.5 at most one point below single shot",
            "difference",
            difference("sft_grpo_ivt final - base_single"),
            -0.01,
        ),
        target(
            "l",
            "a closer look (ours): last answer above single shot and above its own first one; shown: the "
            "smaller of the two",
            "difference",
            smaller,
        )
        | {"verdict": look},
        target(
            "m",
            "IoU lost a step in the long loop, GRPO from SFT that keeps what fits: minus a fifth of SFT's, at most 0",
            "IoU",
            difference(f"sft_keep_grpo_ivt_long{part}sft_keep_ivt_long degradation", "degradation_per_step"),
            -math.inf,
            0,
        ),
        target(
            "n",
            "the same student: at least 50 % of the samples end the long loop with the IoU of step 0",
            "share",
            level("sft_keep_grpo_ivt_long", "share_stay"),
            0.5,
        ),
    ]


def _answers(rollouts) -> list:
    return [(rollout["id"], [step["box"] for step in rollout["steps"]]) for rollout in rollouts]


def read_rollouts(path: Path) -> list[Rollout]:
    """Return the rollouts of a JSONL file; an ArtefactError names file and line where one is damaged."""
    rollouts = read_jsonl(path)
    if not rollouts:
        raise damaged_line(path, 1, "the file is empty")
    for number, rollout in enumerate(rollouts, start=1):
        try:
            metrics.check_rollout(rollout)
        except ValueError as error:
            raise damaged_line(path, number, str(error).rstrip(".")) from None
    return rollouts


def read_stage(root: Path, name: str, noted_only: bool = False) -> list[Rollout] | None:
    """Return the rollouts of a stage of a run, None where it was not run; an ArtefactError as in `check_stage`."""
    path = root / "rollouts" / f"{name}.jsonl"
    return read_rollouts(check_stage(root, path, noted_only)) if path.exists() else None


def curves_from(root: Path, *, seed: int, n_resamples: int) -> dict[str, dict]:
    """Return {adapter: `metrics.curve_gain` of its learning curve} of those in `CURVES` that a run has trained.

    An adapter without a learning curve is left out. ArtefactError for a damaged one.
    """
    found = {}
    for name in CURVES:
        folder = root / "adapters" / name
        if not (folder / PROBE).exists():
            continue
        path = check_stage(root, folder) / PROBE
        try:
            curve = read_json(path)
            found[name] = metrics.curve_gain(curve["rows"], curve["image_ids"], seed, n_resamples)
        except (KeyError, IndexError, TypeError, ValueError):
            raise ArtefactError(f"{path} is not a learning curve; delete its folder and run its stage again.") from None
    return found


def second_turn_from(root: Path, base: list[Rollout], *, seed: int, n_resamples: int) -> list[dict]:
    """Return the rows of `controls.second_turn_rows` from the stages of notebook 1.

    [] where one of them was not run, or was after other first answers than those of `base`.
    """
    answered = {turn: read_stage(root, controls.second_turn_stage(*turn)) or [] for turn in controls.SECOND_TURNS}
    first = _answers(metrics.first_steps(base))
    if not all(found and _answers(metrics.first_steps(found)) == first for found in answered.values()):
        return []
    return controls.second_turn_rows(answered, seed=seed, n_resamples=n_resamples)


def seeds_from(root: Path, known: dict[str, list[Rollout]], seed: int) -> dict[int, dict[str, list[Rollout]]]:
    """Return {seed: {method: rollouts}} of the runs that `stages.seeds` left in a run with the rollouts `known`.

    A short loop that is not there is taken from the long one. Of the run itself, whose seed is `seed`, there are the
    sampled answers. Each seed also has its rival under `closer.TAUGHT`, where `closer.run_closer` has trained it.
    ArtefactError where a file is damaged or about other samples.
    """
    sampled = read_stage(root, SAMPLED)
    found = {seed: {SAMPLED: sampled} if sampled else {}}
    folders = {path.name: path for path in (root / SEEDS).glob("*") if path.is_dir()}
    odd = [path for name, path in folders.items() if name == str(seed) or not name.isdigit() or name != str(int(name))]
    if odd:
        raise ArtefactError(
            f"{odd[0]} is not the folder of another seed: its name must be a number that no other has, "
            f"such as {seed + 1}; rename or remove it."
        )
    for name in sorted(folders, key=int):
        folder = folders[name]
        found[int(name)] = rollouts = {}
        for name in (*TRAINED, SAMPLED):
            answers, long = (read_stage(folder, stage, noted_only=True) for stage in (name, longer(name)))
            if answers is None and long is not None and name in known:
                answers = metrics.first_steps(long, len(known[name][0]["steps"]))
            if answers is None:
                continue
            same = all({r["id"] for r in answers} == {r["id"] for r in items} for items in known.values())
            if not same or name in known and len(answers[0]["steps"]) != len(known[name][0]["steps"]):
                raise ArtefactError(
                    f"{folder} has answers to other samples than {root}, or in loops of another length "
                    f"({name}); delete it and run ivt seeds again."
                )
            rollouts[name] = answers
    for number, rollouts in found.items():
        if taught := read_stage(root, closer.stage("test", "first", number)):
            rollouts[closer.TAUGHT] = taught
    return found


def closer_from(root: Path, split: str = "test", *, seed: int, n_resamples: int) -> list[dict]:
    """Return the rows of `closer.closer_rows` from what `closer.run_closer` left in a run; [] where it left nothing."""
    names = sorted(path.stem for path in (root / "rollouts").glob("*.jsonl"))
    answers = {key: read_stage(root, name) or [] for key, name in closer.stages(names, split).items()}
    return closer.closer_rows(answers, seed=seed, n_resamples=n_resamples)


def mirage_from(root: Path, name: str, rollouts: list[Rollout], values: dict, *, seed: int, n_resamples: int) -> dict:
    """Return what notebook 6 tells of a method, from its stages: {"rules", "calibration", "refinement", "controls"}.

    Each as the function of that name in `selection`, `confidence`, `metrics` and `controls` gives it; {} where the
    notebook was not run, or was with other answers than these. `values`: the profile's, as run.json keeps them.
    """
    chance = {"seed": seed, "n_resamples": n_resamples}
    parts = (f"{kind}_{name}{split}" for kind in ("confidence", "sampled") for split in ("", "_val"))
    asked = [read_stage(root, part) for part in parts]
    if not all(asked) or _answers(asked[0]) != _answers(rollouts):
        return {}
    labels = controls.names(values["control_shifts"])
    shown = {label: read_stage(root, controls.stage(name, label)) or [] for label in labels}
    return {
        "rules": selection.rule_rows(*asked, values["thresholds"], **chance),
        "calibration": confidence.calibration(asked[0], **chance),
        "refinement": metrics.refinement(rollouts, **chance),
        "controls": controls.control_rows(shown, **chance) if all(shown.values()) else [],
    }


def machine(student: str | None) -> dict:
    """Return {"processor", "threads", "student_sha256"}: with others, the same training gives other weights.

    PyTorch takes a thread for each core that this process may use, unless OMP_NUM_THREADS says otherwise. `student`: a
    profile's; the checksum is that of its shipped weights, None for one of the Hub.
    """
    weights = ROOT / (student or "") / "model.safetensors"
    return {
        "processor": hardware.processor(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or hardware.usable_cores(),
        "student_sha256": checksum(weights) if weights.exists() else None,
    }


def batch_sizes(stages: dict) -> dict[str, list[str]]:
    """Return {batch size: names of the stages whose rollouts were answered in such batches}, from a run's stages.json.

    A short loop that is the beginning of a long one is not counted, nor are the trajectories, which no student writes.
    """
    found: dict[str, list[str]] = {}
    for key, noted in sorted(stages.items()):
        kind, _, name = key.partition("/")
        asked = kind == "rollouts" and not name.startswith("trajectories") and f"{kind}/{longer(name)}" not in stages
        if asked and "batch_size" in noted:
            found.setdefault(str(noted["batch_size"]), []).append(name)
    return dict(sorted(found.items(), key=lambda size: int(size[0])))


def results_from(root: Path, *, versions, commit, names=tuple(METHODS)) -> dict:
    """Return the results of a run, recomputed without a model from <root>/rollouts/<name>.jsonl.

    Profile, seed and number of resamples stand in run.json, wall seconds and checksums in stages.json, the ablations
    in tables/ablations.json, what the rules of notebook 6 need in rollouts/confidence_* and sampled_*, the closer looks
    in rollouts/closer_test_*, the second turns in rollouts/second_*, the learning curves in adapters/<name>/probe.json;
    only run.json and one method must be there, and what was asked after other answers than these is left out.
    A student of the Hub whose stages were answered in batches of several sizes has its `batch_sizes` among the results.
    ArtefactError for anything damaged.
    """
    root = Path(root)
    stages = finished_stages(root)
    run = read_json(root / "run.json")
    try:
        n_resamples = run["n_resamples"] if "n_resamples" in run else run["values"]["resamples"]
        chance = {"profile_name": run["profile"], "seed": run["seed"], "n_resamples": n_resamples}
        values = {name: run["values"][name] for name in ("control_shifts", "thresholds")} if "values" in run else None
    except (KeyError, TypeError):
        raise ArtefactError(f"{root / 'run.json'} lacks profile, seed, resamples or values; start anew.") from None
    found = {name: answers for name in names if (answers := read_stage(root, name))}
    seconds = {name: stages.get(f"rollouts/{name}", {}).get("seconds") for name in found}
    if not found:
        raise ArtefactError(f"There are no predictions in {root / 'rollouts'}; run the notebooks first.")
    limits = {"seed": chance["seed"], "n_resamples": n_resamples}
    mirage = {name: mirage_from(root, name, found[name], values, **limits) for name in found if values}
    table = root / "tables" / "ablations.json"
    ablations = read_json(check_stage(root, table)) if table.exists() else []
    if not isinstance(ablations, list) or not all(isinstance(row, dict) for row in ablations):
        raise ArtefactError(f"{table} is not a list of rows; delete it and run notebook 05 again.")
    results = build_results(
        found,
        **chance,
        wall_seconds=seconds,
        versions=versions,
        commit=commit,
        ablations=ablations,
        mirage=mirage,
        looks=closer_from(root, **limits),
        second_turn=second_turn_from(root, found.get("base_ivt", []), **limits),
        curves=curves_from(root, **limits),
        seeds=seeds_from(root, found, chance["seed"]),
    )
    results |= {"machine": machine(run.get("values", {}).get("student"))}
    if results["machine"]["student_sha256"] is None and len(sizes := batch_sizes(stages)) > 1:
        results["batch_sizes"] = sizes
    return results

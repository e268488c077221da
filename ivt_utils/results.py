"""The content of results.json: every method's metrics, paired differences, and the targets they are held to.

The final step is a method's result. Whatever was chosen with the ground truth has "oracle" in its name.
"""

import json
from datetime import UTC, datetime
from pathlib import Path

from ivt_utils import closer, confidence, controls, metrics, selection
from ivt_utils.artefacts import ArtefactError, checksum, read_json

METHODS = {
    "base_single": "base, single shot",
    "base_ivt": "base + IVT, no training",
    "base_ivt_bare": "base + loop, bare image",
    "sft_ivt": "SFT + IVT",
    "sft_grpo_ivt": "SFT + GRPO + IVT",
    "grpo_single": "GRPO, single step, no IVT",
    "sft_keep_ivt": "SFT that keeps what fits + IVT",
    "sft_keep_grpo_ivt": "SFT that keeps what fits + GRPO + IVT",
    "base_ivt_long": "base + IVT, long loop",
    "sft_ivt_long": "SFT + IVT, long loop",
    "sft_grpo_ivt_long": "SFT + GRPO + IVT, long loop",
}
SINGLE = ("base_single", "grpo_single")  # scored on step 0 alone
COMPARISONS = (  # (a, its step, b, its step): a - b, paired
    ("base_ivt", "final", "base_single", "final"),
    ("base_ivt_bare", "final", "base_single", "final"),
    ("base_ivt", "final", "base_ivt_bare", "final"),
    ("sft_ivt", "final", "base_single", "final"),
    ("sft_ivt", "step0", "base_single", "final"),
    ("sft_ivt", "oracle", "base_single", "final"),
    ("sft_ivt", "final", "sft_ivt", "step0"),
    ("sft_grpo_ivt", "final", "base_single", "final"),
    ("sft_grpo_ivt", "final", "sft_ivt", "final"),
    ("sft_grpo_ivt", "final", "sft_grpo_ivt", "step0"),
    ("grpo_single", "final", "base_single", "final"),
)
STEP_NAMES = {"step0": "step 0", "final": "final", "oracle": "oracle best step"}


def build_results(
    rollouts_by_method, *, profile_name, seed, n_resamples, wall_seconds, versions, commit, ablations=(), mirage=None,
    looks=(),
) -> dict:  # fmt: skip
    """Return the content of results.json from the rollouts of each method, all about the same samples.

    Without "base_single", step 0 of "base_ivt" takes its place: the same greedy decoding. Equal input
    gives equal values; created, wall_seconds, commit and versions may differ. ValueError for bad rollouts.
    `mirage`: {method: what `mirage_from` returns} of the methods that notebook 6 has asked; `looks`: rows of
    `closer.closer_rows`.
    """
    rollouts = dict(rollouts_by_method)
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
            "metrics": metrics.evaluate(items, seed, n_resamples),
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
    }


def _differences(rollouts, seed, n_resamples):
    chance = {"seed": seed, "n_resamples": n_resamples}
    for a, step_a, b, step_b in COMPARISONS:
        if a not in rollouts or b not in rollouts:
            continue
        left, right = (n if n in SINGLE else f"{n} {STEP_NAMES[s]}" for n, s in ((a, step_a), (b, step_b)))
        for metric in ("acc50", "miou"):
            scores = metrics.step_score(step_a, metric), metrics.step_score(step_b, metric)
            cell = metrics.paired_difference(rollouts[a], rollouts[b], *scores, **chance)
            kind = f"oracle_{metric}" if "oracle" in (step_a, step_b) else metric
            yield {"name": f"{left} - {right}", "a": a, "b": b, "metric": kind, **cell, "seed": seed}
    a, b = pair = ("sft_grpo_ivt", "sft_ivt")
    if all(name in rollouts and len(rollouts[name][0]["steps"]) > 1 for name in pair):
        both = rollouts[a], rollouts[b], metrics.degradation
        for sign, metric, compare in (
            ("-", "degradation_per_step", metrics.paired_difference),
            ("/", "degradation_ratio", metrics.paired_ratio),
        ):
            name = f"{a} degradation {sign} {b} degradation"
            yield {"name": name, "a": a, "b": b, "metric": metric, **compare(*both, **chance), "seed": seed}


def targets(results: dict) -> list[dict]:
    """Return the course's targets, each {"key", "claim", "unit", "value", "low", "high", "n", "reached"}.

    `reached` compares the measured value with the claim (its interval, in (d) when SFT does not degrade), and
    is None when a method that it needs was not run. `unit`: "share", "difference" of shares, "ratio", "IoU".
    """
    methods = results["methods"]
    compared = {(d["name"], d["metric"]): d for d in results["differences"]}

    def difference(name, metric):
        return compared.get((name, metric))

    def target(key, claim, unit, cell, holds):
        limits = {name: cell[name] if cell else None for name in ("value", "low", "high", "n")}
        reached = None if limits["value"] is None else holds(cell)
        return {"key": key, "claim": claim, "unit": unit, **limits, "reached": reached}

    slack = 1e-9  # a value on the limit counts, whatever its last bit
    base = methods.get("base_single", {}).get("metrics", {}).get("final", {})
    sft = methods.get("sft_ivt", {}).get("metrics", {}).get("degradation_per_step")
    if sft and sft["value"] <= 0:
        grpo = target(
            "d", "SFT does not degrade; final mean IoU of SFT + GRPO above SFT's, interval above 0", "IoU",
            difference("sft_grpo_ivt final - sft_ivt final", "miou"),
            lambda c: c["low"] is not None and c["low"] > 0)  # fmt: skip
    else:
        grpo = target(
            "d", "IoU lost per step by SFT + GRPO at most 1/5 of SFT's", "ratio",
            difference("sft_grpo_ivt degradation / sft_ivt degradation", "degradation_ratio"),
            lambda c: c["value"] <= 0.2 + slack)  # fmt: skip
    gains = [row for row in results.get("closer", []) if row["name"] in closer.GAINS]
    shown = next((row["acc50"] for row in gains if row["seed"] == "mean" and row["name"] == closer.GAINS[1]), None)
    above = all((row["acc50"]["low"] or 0) > 0 for row in gains)
    return [
        target("a", "base + IVT, final: Acc@0.5 at least 20 points below single shot", "difference",
               difference("base_ivt final - base_single", "acc50"), lambda c: c["value"] <= -0.2 + slack),
        target("b", "SFT + IVT, oracle best step: Acc@0.5 at least 2.4 points above single shot",
               "difference", difference("sft_ivt oracle best step - base_single", "oracle_acc50"),
               lambda c: c["value"] >= 0.024 - slack),
        target("c", "SFT + IVT, step 0: Acc@0.5 not below single shot", "difference",
               difference("sft_ivt step 0 - base_single", "acc50"), lambda c: c["value"] >= -slack),
        grpo,
        target("e", "base, single shot: Acc@0.5 from 75 to 88 %", "share", base.get("acc50"),
               lambda c: 0.75 - slack <= c["value"] <= 0.88 + slack),
        target("f", "base, single shot: at least 99 % of the answers parse", "share", base.get("parsed"),
               lambda c: c["value"] >= 0.99 - slack),
        target("g", "a closer look (ours): last answer above single shot and above its own first one, every interval "
               "above 0; shown: over the first one, mean of the seeds", "difference", shown, lambda c: above),
    ]  # fmt: skip


def _answers(rollouts) -> list:
    return [(rollout["id"], [step["box"] for step in rollout["steps"]]) for rollout in rollouts]


def read_rollouts(path: Path) -> list[dict]:
    """Return the rollouts of a JSONL file; an ArtefactError names file and line where one is damaged."""
    rollouts = []
    for number, line in enumerate(Path(path).read_bytes().removesuffix(b"\n").split(b"\n"), start=1):
        where = f"{path} is damaged in line {number}; delete the file and run its stage again"
        try:
            rollout = json.loads(line)
        except (ValueError, RecursionError):
            raise ArtefactError(f"{where}: this is not JSON.") from None
        try:
            metrics.check_rollout(rollout)
        except ValueError as error:
            raise ArtefactError(f"{where}: {error}") from None
        rollouts.append(rollout)
    return rollouts


def read_stage(root: Path, name: str) -> list[dict] | None:
    """Return the rollouts of a stage of a run, None where it was not run; an ArtefactError for a damaged file."""
    path, note = root / "rollouts" / f"{name}.jsonl", root / "stages.json"
    if not path.exists():
        return None
    noted = read_json(note).get(f"rollouts/{name}", {}) if note.exists() else {}
    if "sha256" in noted and noted["sha256"] != checksum(path):
        raise ArtefactError(f"{path} is damaged (checksum); delete it and run its stage again.")
    return read_rollouts(path)


def closer_from(root: Path, split: str = "test", *, seed: int, n_resamples: int) -> list[dict]:
    """Return the rows of `closer.closer_rows` from what `closer.run_closer` left in a run; [] where it left nothing."""
    start = f"closer_{split}_"
    names = sorted(path.stem for path in (root / "rollouts").glob(f"{start}*.jsonl"))
    answers = {name.removeprefix(start): read_stage(root, name) for name in names}
    return closer.closer_rows(answers, seed=seed, n_resamples=n_resamples)


def mirage_from(root: Path, name: str, rollouts: list[dict], values: dict, *, seed: int, n_resamples: int) -> dict:
    """Return what notebook 6 tells of a method, from its stages: {"rules", "calibration", "refinement", "controls"}.

    Each as the function of that name in `selection`, `confidence`, `metrics` and `controls` gives it; {} where the
    notebook was not run, or was with other answers than these. `values`: the profile's, as run.json keeps them.
    """
    chance = {"seed": seed, "n_resamples": n_resamples}
    parts = (f"{kind}_{name}{split}" for kind in ("confidence", "sampled") for split in ("", "_val"))
    asked = [read_stage(root, part) for part in parts]
    if not all(asked) or _answers(asked[0]) != _answers(rollouts):
        return {}
    shown = {label: read_stage(root, controls.stage(name, label)) for label in controls.names(values["control_shifts"])}
    return {
        "rules": selection.rule_rows(*asked, values["thresholds"], **chance),
        "calibration": confidence.calibration(asked[0], **chance),
        "refinement": metrics.refinement(rollouts, **chance),
        "controls": controls.control_rows(shown, **chance) if all(shown.values()) else [],
    }


def results_from(root: Path, *, versions, commit, names=tuple(METHODS)) -> dict:
    """Return the results of a run, recomputed without a model from <root>/rollouts/<name>.jsonl.

    Profile, seed and number of resamples stand in run.json, wall seconds and checksums in stages.json, the ablations
    in tables/ablations.json, what the rules of notebook 6 need in rollouts/confidence_* and sampled_*, the closer looks
    in rollouts/closer_test_*; the last four may be absent, and confidence in other answers than these is left out.
    ArtefactError for anything damaged.
    """
    root = Path(root)
    stages = read_json(root / "stages.json") if (root / "stages.json").exists() else {}
    run = read_json(root / "run.json")
    try:
        n_resamples = run["n_resamples"] if "n_resamples" in run else run["values"]["resamples"]
        chance = {"profile_name": run["profile"], "seed": run["seed"], "n_resamples": n_resamples}
    except (KeyError, TypeError):
        raise ArtefactError(f"{root / 'run.json'} lacks profile, seed or resamples; start anew.") from None
    found = {name: answers for name in names if (answers := read_stage(root, name))}
    seconds = {name: stages.get(f"rollouts/{name}", {}).get("seconds") for name in found}
    if not found:
        raise ArtefactError(f"There are no predictions in {root / 'rollouts'}; run the notebooks first.")
    limits = {"seed": chance["seed"], "n_resamples": n_resamples}
    mirage = {name: mirage_from(root, name, found[name], run["values"], **limits) for name in found if "values" in run}
    table = root / "tables" / "ablations.json"
    ablations = read_json(table) if table.exists() else []
    if not isinstance(ablations, list) or not all(isinstance(row, dict) for row in ablations):
        raise ArtefactError(f"{table} is not a list of rows; delete it and run notebook 05 again.")
    return build_results(
        found, **chance, wall_seconds=seconds, versions=versions, commit=commit, ablations=ablations, mirage=mirage,
        looks=closer_from(root, **limits),
    )  # fmt: skip

"""The results of a run, read from its folder and recomputed without a model."""

import os
from pathlib import Path

from ivt_utils import closer, confidence, controls, metrics, selection
from ivt_utils.methods import METHODS, TRAINED, longer
from ivt_utils.metrics import Resampling
from ivt_utils.mirage import SAMPLED
from ivt_utils.runtime import hardware
from ivt_utils.runtime.files import ROOT, ArtefactError, checksum, damaged_line, read_json, read_jsonl
from ivt_utils.runtime.store import PROBE, SEEDS, check_stage, finished_stages
from ivt_utils.schema import Rollout
from ivt_utils.show.results import CURVES, build_results


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


def curves_from(root: Path, resampling: Resampling) -> dict[str, dict]:
    """Return {adapter: `metrics.curve_gain` of its learning curve} of those in `CURVES` that a run has trained.

    An adapter without a learning curve is left out. ArtefactError for a damaged one.
    """
    curves = {}
    for name in CURVES:
        folder = root / "adapters" / name
        if not (folder / PROBE).exists():
            continue
        path = check_stage(root, folder) / PROBE
        try:
            curve = read_json(path)
            curves[name] = metrics.curve_gain(curve["rows"], curve["image_ids"], resampling)
        except (KeyError, IndexError, TypeError, ValueError):
            raise ArtefactError(f"{path} is not a learning curve; delete its folder and run its stage again.") from None
    return curves


def second_turn_from(root: Path, base: list[Rollout], resampling: Resampling) -> list[dict]:
    """Return the rows of `controls.second_turn_rows` from the stages of notebook 1.

    [] where one of them was not run, or was after other first answers than those of `base`.
    """
    answers = {turn: read_stage(root, controls.second_turn_stage(*turn)) or [] for turn in controls.SECOND_TURNS}
    first = _answers(metrics.first_steps(base))
    if not all(rollouts and _answers(metrics.first_steps(rollouts)) == first for rollouts in answers.values()):
        return []
    return controls.second_turn_rows(answers, resampling)


def seeds_from(root: Path, own_rollouts: dict[str, list[Rollout]], seed: int) -> dict[int, dict[str, list[Rollout]]]:
    """Return {seed: {method: rollouts}} of the runs that `stages.seeds` left in a run whose own are `own_rollouts`.

    A short loop that is not there is taken from the long one. Of the run itself, whose seed is `seed`, there are the
    sampled answers. Each seed also has its rival under `closer.TAUGHT`, where `closer.run_closer` has trained it.
    ArtefactError where a file is damaged or about other samples.
    """
    sampled = read_stage(root, SAMPLED)
    by_seed = {seed: {SAMPLED: sampled} if sampled else {}}
    folders = {path.name: path for path in (root / SEEDS).glob("*") if path.is_dir()}
    odd = [path for name, path in folders.items() if name == str(seed) or not name.isdigit() or name != str(int(name))]
    if odd:
        raise ArtefactError(
            f"{odd[0]} is not the folder of another seed: its name must be a number that no other has, "
            f"such as {seed + 1}; rename or remove it."
        )
    for name in sorted(folders, key=int):
        folder = folders[name]
        by_seed[int(name)] = rollouts = {}
        for name in (*TRAINED, SAMPLED):
            answers, long = (read_stage(folder, stage, noted_only=True) for stage in (name, longer(name)))
            if answers is None and long is not None and name in own_rollouts:
                answers = metrics.first_steps(long, len(own_rollouts[name][0]["steps"]))
            if answers is None:
                continue
            same = all({r["id"] for r in answers} == {r["id"] for r in items} for items in own_rollouts.values())
            if not same or name in own_rollouts and len(answers[0]["steps"]) != len(own_rollouts[name][0]["steps"]):
                raise ArtefactError(
                    f"{folder} has answers to other samples than {root}, or in loops of another length "
                    f"({name}); delete it and run ivt seeds again."
                )
            rollouts[name] = answers
    for number, rollouts in by_seed.items():
        if rival := read_stage(root, closer.stage("test", "first", number)):
            rollouts[closer.TAUGHT] = rival
    return by_seed


def closer_from(root: Path, resampling: Resampling, split: str = "test") -> list[dict]:
    """Return the rows of `closer.closer_rows` from what `closer.run_closer` left in a run; [] where it left nothing."""
    names = sorted(path.stem for path in (root / "rollouts").glob("*.jsonl"))
    answers = {key: read_stage(root, name) or [] for key, name in closer.stages(names, split).items()}
    return closer.closer_rows(answers, resampling)


def mirage_from(root: Path, name: str, rollouts: list[Rollout], values: dict, resampling: Resampling) -> dict:
    """Return what notebook 6 tells of a method, from its stages: {"rules", "calibration", "refinement", "controls"}.

    Each as the function of that name in `selection`, `confidence`, `metrics` and `controls` gives it; {} where the
    notebook was not run, or was with other answers than these. A served student has no calibration, for nobody asked
    for its confidence. `values`: the profile's, as run.json keeps them.
    """
    confident = read_stage(root, f"confidence_{name}")
    on_val = f"confidence_{name}_val" if confident else f"val_{name}"
    answers = [
        confident or rollouts,
        *(read_stage(root, part) for part in (on_val, f"sampled_{name}", f"sampled_{name}_val")),
    ]
    if not all(answers) or _answers(answers[0]) != _answers(rollouts):
        return {}
    labels = controls.names(values["control_shifts"])
    controlled = {label: read_stage(root, controls.stage(name, label)) or [] for label in labels}
    return {
        "rules": selection.rule_rows(*answers, values["thresholds"], resampling),
        "calibration": confidence.calibration(confident, resampling) if confident else [],
        "refinement": metrics.refinement(rollouts, resampling),
        "controls": controls.control_rows(controlled, resampling) if all(controlled.values()) else [],
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


def batch_sizes(root: Path) -> dict[str, list[str]]:
    """Return {batch size: names of the stages whose rollouts were answered in such batches}, from a run and its seeds.

    A short loop that is the beginning of a long one is not counted, nor are the trajectories, which no student writes.
    """
    names: dict[str, list[str]] = {}
    for folder in (root, *sorted((root / SEEDS).glob("*/"))):
        stages, seed = finished_stages(folder), "" if folder == root else f" (seed {folder.name})"
        for key, noted in sorted(stages.items()):
            kind, _, name = key.partition("/")
            begins = f"{kind}/{longer(name)}" in stages
            if kind == "rollouts" and "batch_size" in noted and not begins and not name.startswith("trajectories"):
                names.setdefault(str(noted["batch_size"]), []).append(name + seed)
    return dict(sorted(names.items(), key=lambda size: int(size[0])))


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
        profile_name, resampling = run["profile"], Resampling(run["seed"], n_resamples)
        values = {name: run["values"][name] for name in ("control_shifts", "thresholds")} if "values" in run else None
    except (KeyError, TypeError):
        raise ArtefactError(f"{root / 'run.json'} lacks profile, seed, resamples or values; start anew.") from None
    rollouts = {name: answers for name in names if (answers := read_stage(root, name))}
    seconds = {name: stages.get(f"rollouts/{name}", {}).get("seconds") for name in rollouts}
    if not rollouts:
        raise ArtefactError(f"There are no predictions in {root / 'rollouts'}; run the notebooks first.")
    mirage = {name: mirage_from(root, name, rollouts[name], values, resampling) for name in rollouts if values}
    table = root / "tables" / "ablations.json"
    ablations = read_json(check_stage(root, table)) if table.exists() else []
    if not isinstance(ablations, list) or not all(isinstance(row, dict) for row in ablations):
        raise ArtefactError(f"{table} is not a list of rows; delete it and run notebook 05 again.")
    results = build_results(
        rollouts,
        profile_name=profile_name,
        resampling=resampling,
        wall_seconds=seconds,
        versions=versions,
        commit=commit,
        ablations=ablations,
        mirage=mirage,
        looks=closer_from(root, resampling),
        second_turn=second_turn_from(root, rollouts.get("base_ivt", []), resampling),
        curves=curves_from(root, resampling),
        seeds=seeds_from(root, rollouts, resampling.seed),
    )
    results |= {"machine": machine(run.get("values", {}).get("student"))}
    if (engine := run.get("values", {}).get("engine", "local")) != "local":
        results["engine"] = engine
    if results["machine"]["student_sha256"] is None and len(sizes := batch_sizes(root)) > 1:
        results["batch_sizes"] = sizes
    return results

"""The ablations: what each choice of the recipe is worth, on the first validation samples, as paired differences.

The reference is the SFT student of the main run. A variant is trained as it was and for as many optimizer steps, with
one choice changed. Nothing here touches the test split.
"""

import math

from ivt_utils import metrics
from ivt_utils.harvest import perturbed, trajectory
from ivt_utils.loop import evaluate
from ivt_utils.records import first
from ivt_utils.runtime.files import read_jsonl
from ivt_utils.schema import Rollout
from ivt_utils.selection import sign_flip_p
from ivt_utils.sft import train_sft, trajectories_dataset
from ivt_utils.student import load_student
from ivt_utils.teacher import geometric_trace

REFERENCE = "reference: the main SFT student"
KEPT = "training: a box that fits is kept"  # notebook 3's variant, trained there


def sft_variants(trajectories: list[Rollout], profile, seed: int) -> dict[str, list[Rollout]]:
    """Return, by what is changed, the trajectories of each variant that is trained here, from those of the main run.

    The distorted truths have the geometric teacher's traces, whatever teacher wrote those of the main run.
    """
    trace = geometric_trace if profile.trace else None
    return {
        "training: errors that are distorted truths": [
            trajectory(perturbed(t, seed, profile.grid), profile.turns, profile.grid, trace) for t in trajectories
        ],
        "training: no traces": [trajectory(t, profile.turns, profile.grid, None) for t in trajectories],
    }


def optimizer_steps(profile, trajectories: int) -> int:
    """Return how many optimizer steps the main run's SFT takes on so many trajectories."""
    return math.ceil(profile.sft_epochs * math.ceil(trajectories / profile.sft_batch))


def run_ablations(run, train, val) -> list[dict]:
    """Return one row for the reference and one for each change, over the same samples.

    A row: {"name" (what is changed), "acc50" and "miou" (cells of the final step), "value", "low", "high", "n" (its
    final mean IoU minus the reference's, paired), "p" (of `selection.sign_flip_p`, not corrected), "seed"}. Rows
    "training: ..." are students of their own, rows "loop: ..." the reference in another loop. Every training and every
    evaluation is a stage of `run`, so an interrupted call goes on where it stopped.
    """
    profile, seed = run.profile, run.seed
    train_ids, val = set(train["id"]), first(val, profile.ablation_test)
    trajectories = [t for t in read_jsonl(run.find("rollouts/trajectories.jsonl")) if t["id"] in train_ids]
    steps = optimizer_steps(profile, len(trajectories))
    adapter, adapter_keep = run.find("adapters/sft"), run.find("adapters/sft_keep")
    resampling = metrics.Resampling(seed, profile.resamples)

    def measured(name, adapter, **changes):
        return run.rollouts(
            f"ablation_{_slug(name)}",
            lambda: evaluate(load_student(profile, adapter), val, profile, seed, name, **changes),
        )

    def trained(name, variant):
        return run.adapter(
            f"ablation_{_slug(name)}",
            lambda folder: train_sft(
                load_student(profile),
                trajectories_dataset(train, variant, profile.style),
                folder,
                profile,
                seed,
                steps,
            ),
        )

    long = measured("reference", adapter, turns=max(profile.turns, profile.long_turns))
    reference = metrics.first_steps(long, profile.turns + 1)
    rollouts_by_name = {REFERENCE: reference}
    for name, variant in sft_variants(trajectories, profile, seed).items():
        rollouts_by_name[name] = measured(name, trained(name, variant))
    rollouts_by_name[KEPT] = measured(KEPT, adapter_keep)
    for turns in range(len(long[0]["steps"])):
        if turns != profile.turns:
            rollouts_by_name[f"loop: T = {turns}"] = metrics.first_steps(long, turns + 1)
    for name, style in (("loop: the box as an outline", "outline"), ("loop: no box is drawn", "none")):
        rollouts_by_name[name] = measured(name, adapter, style=style)

    def row(name, rollouts):
        images, ious = [r["image_id"] for r in rollouts], metrics.iou_matrix(rollouts)
        score = metrics.step_score("final", "miou")
        return {
            "name": name,
            "acc50": metrics.mean_interval(metrics.is_right(ious[:, -1]), images, resampling),
            "miou": metrics.mean_interval(score(ious), images, resampling),
            **metrics.paired_difference(rollouts, reference, score, resampling),
            "p": sign_flip_p(rollouts, reference, score, resampling),
            "seed": seed,
        }

    return [row(name, rollouts) for name, rollouts in rollouts_by_name.items()]


def _slug(name: str) -> str:
    return "_".join("".join(c if c.isalnum() else " " for c in name).split())

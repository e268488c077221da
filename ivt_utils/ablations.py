"""The ablations: what each choice of the recipe is worth, on the first validation samples, as paired differences.

Trainings are shorter than the main run's, and all of the same number of steps (the profile says how many), so rows
compare with a reference trained the same way, not with the main results. Nothing here touches the test split.
"""

import random

from ivt_utils import metrics
from ivt_utils.grpo import prompts_dataset, train_grpo
from ivt_utils.harvest import keep_errors, perturbed, trajectory
from ivt_utils.loop import evaluate
from ivt_utils.sft import train_sft, trajectories_dataset
from ivt_utils.student import load_student
from ivt_utils.teacher import geometric_trace

MOST_TURNS = 4


def sft_variants(answers: list[dict], profile, seed: int) -> dict[str, list[dict]]:
    """Return the training trajectories of each SFT variant; "reference" is the recipe of the paper."""
    def build(errors, trace=geometric_trace):
        return [trajectory(e, profile.turns, profile.grid, trace) for e in errors]

    errors = keep_errors(answers, profile.harvest_max_iou)
    shuffled = random.Random(seed).sample(errors, len(errors))
    return {
        "reference": build(errors),
        "perturbed ground truth": build([perturbed(e, seed, profile.grid) for e in errors]),
        "no trace": build(errors, None),
        "a quarter of the data": build(shuffled[: len(errors) // 4]),
        "IoU filter 0.5": build(keep_errors(answers, 0.5)),
    }


def run_ablations(run, train, val, answers: list[dict], sft_adapter) -> list[dict]:
    """Return one row an ablation: a paired difference in final mean IoU, with n, seed and interval.

    Every training and every evaluation is a stage of `run`, so an interrupted call goes on where it stopped.
    """
    profile, seed = run.profile, run.seed
    val = val.select(range(min(profile.ablation_test, len(val))))

    def measured(name, adapter, **changes):
        return run.rollouts(f"ablation_{name}", lambda: evaluate(
            load_student(profile, adapter), val, profile, seed, f"ablation: {name}", **changes))  # fmt: skip

    def sft(name, trajectories):
        return run.adapter(f"ablation_{_slug(name)}", lambda folder: train_sft(
            load_student(profile), trajectories_dataset(train, trajectories, profile.style), folder, profile, seed,
            profile.ablation_sft_steps))  # fmt: skip

    def grpo(name, **changes):
        start = None if changes.get("turns") == 0 else sft_adapter
        return run.adapter(f"ablation_{_slug(name)}", lambda folder: train_grpo(
            load_student(profile, start, trainable=True), prompts, folder, profile, seed,
            steps=profile.ablation_grpo_steps, **changes))  # fmt: skip

    def row(ablation, variant, against, a, b):
        score = metrics.step_score("final", "miou")
        cell = metrics.paired_difference(a, b, score, seed=seed, n_resamples=profile.resamples)
        return {"name": ablation, "variant": variant, "against": against, "metric": "final mean IoU", "seed": seed,
                "answers": len(a[0]["steps"]), **cell}  # fmt: skip

    rows, prompts = [], prompts_dataset(train)
    variants = sft_variants(answers, profile, seed)
    finals = {name: measured(_slug(name), sft(name, t)) for name, t in variants.items()}
    groups = {"origin of the errors": ("perturbed ground truth",), "trace": ("no trace",),
              "training size": ("a quarter of the data",), "IoU filter": ("IoU filter 0.5",)}  # fmt: skip
    for ablation, names in groups.items():
        rows += [row(ablation, name, "reference", finals[name], finals["reference"]) for name in names]

    long = measured("turns", sft_adapter, turns=MOST_TURNS)
    shown = metrics.first_steps(long, profile.turns + 1)
    for turns in range(MOST_TURNS + 1):
        if turns != profile.turns:
            part = metrics.first_steps(long, turns + 1)
            rows.append(row("refinements T", f"T = {turns}", f"T = {profile.turns}", part, shown))
    for style in ("outline", "none"):
        rows.append(row("overlay (at test)", style, "filled", measured(style, sft_adapter, style=style), shown))

    bonus = measured("grpo", grpo("grpo"))
    rows.append(row("reward", "no format bonus", "format bonus",
                    measured("grpo_no_bonus", grpo("grpo no bonus", format_bonus=0.0)), bonus))  # fmt: skip
    single = measured("grpo_single", grpo("grpo single", turns=0), turns=0)
    rows.append(row("single-step GRPO", "GRPO on one answer, no loop", "SFT + GRPO, final", single, bonus))
    return rows


def _slug(name: str) -> str:
    return name.replace(" ", "_").replace(".", "")

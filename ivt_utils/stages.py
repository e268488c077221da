"""The stages of the six notebooks without their story: for scripts, and for several processes at once.

Each function makes the stages of the same names as its notebook does, with the same calls; the notebook then finds them
finished. What an earlier one would have made is made here too, or taken from where `Run.find` finds it.
"""

from ivt_utils.ablations import run_ablations
from ivt_utils.artefacts import ArtefactError, read_jsonl
from ivt_utils.datasets import load_split
from ivt_utils.grpo import prompts_dataset, train_grpo
from ivt_utils.harvest import keep_errors, trajectory
from ivt_utils.loop import evaluate
from ivt_utils.mirage import ADAPTERS, measure
from ivt_utils.sft import train_sft, trajectories_dataset
from ivt_utils.student import load_student
from ivt_utils.teacher import geometric_trace


def evaluation(run) -> None:
    """Notebooks 1 and 2: the base student on the test split, with and without a box, and on the training split."""
    profile, test = run.profile, load_split(run.profile, "test")
    student = load_student(profile)
    if profile.hub_student and "rollouts/base_ivt" not in run.stages():
        first_look(student, test.select(range(min(profile.batch_size, len(test)))), profile)
    run.rollouts("base_ivt", lambda: evaluate(student, test, profile, run.seed, "box shown"))
    run.rollouts("base_ivt_bare", lambda: evaluate(student, test, profile, run.seed, "bare image", style="none"))
    own_answers(run, load_split(profile, "train"), student)


def first_look(student, records, profile) -> None:
    """Show what the student answers to one batch; an ArtefactError when hardly any answer has the form asked for.

    Whoever pays by the hour should not learn of it at the end.
    """
    found = evaluate(student, records, profile, turns=0)
    good = sum(rollout["steps"][0]["box"] is not None for rollout in found)
    for rollout in found[:3]:
        print(f"“{rollout['expression']}” -> {rollout['steps'][0]['text']}")
    if good < len(found) / 2:
        raise ArtefactError(f"Only {good} of the first {len(found)} answers hold a box in the form asked for (one is "
                            f"{found[0]['steps'][0]['text']!r}); look at boxes.parse_answer first.")  # fmt: skip


def own_answers(run, train, student=None) -> list[dict]:
    """Notebook 2: return the base student's own step-0 answers on the training split."""
    return run.rollouts("train_step0", lambda: evaluate(
        student or load_student(run.profile), train, run.profile, run.seed, "step 0", turns=0))  # fmt: skip


def harvest(run, train) -> list[dict]:
    """Notebook 2: return the trajectories that start from the student's own errors on the training split."""
    profile = run.profile
    errors = keep_errors(own_answers(run, train), profile.harvest_max_iou)
    trace = geometric_trace if profile.trace else None
    return run.rollouts("trajectories", lambda: [
        trajectory(error, profile.turns, profile.grid, trace) for error in errors])  # fmt: skip


def sft(run) -> None:
    """Notebook 3: the adapter of SFT, and its answers on the test split."""
    profile, train = run.profile, load_split(run.profile, "train")
    dataset = trajectories_dataset(train, harvest(run, train), profile.style)
    adapter = run.adapter("sft", lambda folder: train_sft(load_student(profile), dataset, folder, profile, run.seed))
    _test(run, "sft_ivt", adapter)


def grpo(run) -> None:
    """Notebook 4: the adapters of GRPO, with and without the loop, and their answers on the test split."""
    profile, start = run.profile, run.find("adapters/sft")
    prompts = prompts_dataset(load_split(profile, "train"))
    adapter = run.adapter("grpo", lambda folder: train_grpo(
        load_student(profile, start, trainable=True), prompts, folder, profile, run.seed))  # fmt: skip
    single = run.adapter("grpo_single", lambda folder: train_grpo(
        load_student(profile), prompts, folder, profile, run.seed, turns=0))  # fmt: skip
    _test(run, "sft_grpo_ivt", adapter)
    _test(run, "grpo_single", single, turns=0)


def ablations(run) -> None:
    """Notebook 5: every ablation, and the table of them."""
    train, val = load_split(run.profile, "train"), load_split(run.profile, "val")
    first, start = read_jsonl(run.find("rollouts/train_step0.jsonl")), run.find("adapters/sft")
    run.rows("ablations", lambda: run_ablations(run, train, val, first, start))


def mirage(run) -> None:
    """Notebook 6: confidence, sampled answers and controls of each student."""
    test, val = load_split(run.profile, "test"), load_split(run.profile, "val")
    for name in ADAPTERS:
        measure(run, name, read_jsonl(run.find(f"rollouts/{name}.jsonl")), test, val)


def _test(run, name: str, adapter, **changes) -> None:
    run.rollouts(name, lambda: evaluate(
        load_student(run.profile, adapter), load_split(run.profile, "test"), run.profile, run.seed, name, **changes,
    ))  # fmt: skip


STAGES = {"eval": evaluation, "sft": sft, "grpo": grpo, "ablations": ablations, "mirage": mirage}

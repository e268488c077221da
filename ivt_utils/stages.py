"""The stages of the six notebooks without their story: for scripts, and for several processes at once.

Each function makes the stages of the same names as its notebook does, with the same calls; the notebook then finds them
finished. What an earlier one would have made is made here too, or taken from where `Run.find` finds it.
"""

from ivt_utils.ablations import run_ablations
from ivt_utils.artefacts import read_jsonl
from ivt_utils.datasets import load_split
from ivt_utils.grpo import prompts_dataset, train_grpo
from ivt_utils.harvest import keep_errors, trajectory
from ivt_utils.loop import evaluate
from ivt_utils.mirage import ADAPTERS, measure
from ivt_utils.sft import train_sft, trajectories_dataset
from ivt_utils.student import load_student
from ivt_utils.teacher import geometric_trace


def answers(run) -> None:
    """Notebooks 1 and 2: the base student on the test split, with and without a box, and the harvest."""
    profile, test = run.profile, load_split(run.profile, "test")
    student = load_student(profile)
    run.rollouts("base_ivt", lambda: evaluate(student, test, profile, run.seed, "box shown"))
    run.rollouts("base_ivt_bare", lambda: evaluate(student, test, profile, run.seed, "bare image", style="none"))
    harvest(run, student)


def harvest(run, student=None) -> list[dict]:
    """Notebook 2: return the trajectories that start from the student's own errors on the training split."""
    profile, train = run.profile, load_split(run.profile, "train")
    trace = geometric_trace if profile.trace else None
    return run.rollouts("trajectories", lambda: [
        trajectory(error, profile.turns, profile.grid, trace) for error in errors(run, train, student)])  # fmt: skip


def errors(run, train, student=None) -> list[dict]:
    """Return the student's own step-0 answers on the training split that the filter of the harvest keeps."""
    first = run.rollouts("train_step0", lambda: evaluate(
        student or load_student(run.profile), train, run.profile, run.seed, "step 0", turns=0))  # fmt: skip
    return keep_errors(first, run.profile.harvest_max_iou)


def sft(run) -> None:
    """Notebook 3: the adapter of SFT, and its answers on the test split."""
    profile, train = run.profile, load_split(run.profile, "train")
    dataset = trajectories_dataset(train, harvest(run), profile.style)
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


STAGES = {"eval": answers, "sft": sft, "grpo": grpo, "ablations": ablations, "mirage": mirage}

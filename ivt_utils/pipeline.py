"""The stages of the six notebooks without their story: for scripts, and for several processes at once.

Each function makes the stages of the same names as its notebook does, with the same calls; the notebook then finds them
finished. What an earlier one would have made is made here too, or taken from where `Run.find` finds it.
"""

from ivt_utils.ablations import run_ablations
from ivt_utils.closer import run_closer
from ivt_utils.grpo import probe_records, prompts_dataset, train_grpo
from ivt_utils.harvest import keep_errors, trajectory
from ivt_utils.loop import both_lengths, evaluate, sampled_answers
from ivt_utils.methods import ASKED, METHODS
from ivt_utils.metrics import iou_matrix
from ivt_utils.mirage import SAMPLED, measure, second_turns
from ivt_utils.records import first, load_split
from ivt_utils.runtime.files import ArtefactError, read_jsonl
from ivt_utils.runtime.store import SEEDS, Run, finished_stages
from ivt_utils.schema import Rollout
from ivt_utils.sft import read_log, train_sft, trajectories_dataset
from ivt_utils.student import Student, load_student
from ivt_utils.teacher import geometric_trace


def evaluation(run, served: dict[str | None, Student] | None = None) -> None:
    """Notebooks 1 and 2: the base student on the test split, with and without a box, and on the training split.

    `served`: the students that answer elsewhere, by the adapters they carry, None for the base student. Those with
    adapters are scored on the test split, too, for they are not trained here.
    """
    profile, test = run.profile, load_split(run.profile, "test")
    student = served[None] if served else load_student(profile)
    if (served or profile.hub_student) and "rollouts/base_ivt" not in run.stages():
        first_look(student, first(test, profile.batch_size), profile)
    base = both_lengths(run, "base_ivt", lambda: student, test)
    bare = run.rollouts("base_ivt_bare", lambda: evaluate(student, test, profile, run.seed, "bare image", style="none"))
    second_turns(run, student, test, base, bare)
    own_answers(run, load_split(profile, "train"), student)
    for name, method in METHODS.items():
        tuned = served.get(method.adapter) if served and method.adapter else None
        if tuned and method.single:
            run.rollouts(name, lambda name=name, tuned=tuned: evaluate(tuned, test, profile, run.seed, name, turns=0))
        elif tuned and not method.long:
            both_lengths(run, name, lambda tuned=tuned: tuned, test)


def first_look(student, records, profile) -> None:
    """Show what the student answers to one batch, and their mean IoU.

    An ArtefactError when hardly any answer has the form asked for, or the boxes hardly meet the true ones: whoever pays
    by the hour should not learn of it at the end.
    """
    answers = evaluate(student, records, profile, turns=0)
    good = sum(rollout["steps"][0]["box"] is not None for rollout in answers)
    for rollout in answers[:3]:
        print(f"“{rollout['expression']}” -> {rollout['steps'][0]['text']}")
    if good < len(answers) / 2:
        raise ArtefactError(
            f"Only {good} of the first {len(answers)} answers hold a box in the form asked for (one is "
            f"{answers[0]['steps'][0]['text']!r}); look at boxes.parse_answer first."
        )
    mean = float(iou_matrix(answers).mean())
    print(f"Mean IoU of these {len(answers)} answers: {mean:.3f}.")
    if mean < profile.least_first_iou:
        raise ArtefactError(
            f"The boxes of the first {len(answers)} answers hardly meet the true ones (mean IoU {mean:.3f}, below "
            f"least_first_iou of {profile.least_first_iou:g}): look at the scale and the order of the coordinates"
            + (
                ", then compare the student in 4 bits with load_in_4bit = False in ivt_utils/profiles.py."
                if profile.load_in_4bit
                else "."
            )
        )


def own_answers(run, train, student=None) -> list[Rollout]:
    """Notebook 2: return the base student's own step-0 answers on the training split."""
    return run.rollouts(
        "train_step0",
        lambda: evaluate(student or load_student(run.profile), train, run.profile, run.seed, "step 0", turns=0),
    )


def harvest(run, train, keep: bool = False) -> list[Rollout]:
    """Notebook 2: return the trajectories that start from the student's own errors on the training split.

    `keep`: those of notebook 3's variant, in which a box that fits stays.
    """
    profile = run.profile
    errors = keep_errors(own_answers(run, train), profile.harvest_max_iou)
    trace = geometric_trace if profile.trace else None
    return run.rollouts(
        "trajectories_keep" if keep else "trajectories",
        lambda: [trajectory(error, profile.turns, profile.grid, trace, keep) for error in errors],
    )


def sft(run) -> None:
    """Notebook 3: the adapters of SFT on the straight line and of its variant, and their answers on the test split."""
    profile, train = run.profile, load_split(run.profile, "train")

    def trained(name, keep):
        dataset = trajectories_dataset(train, harvest(run, train, keep), profile.style)
        return run.adapter(name, lambda folder: train_sft(load_student(profile), dataset, folder, profile, run.seed))

    straight, adapter_keep, test = trained("sft", False), trained("sft_keep", True), load_split(profile, "test")
    for name, adapter in (("sft_ivt", straight), ("sft_keep_ivt", adapter_keep)):
        both_lengths(run, name, lambda adapter=adapter: load_student(profile, adapter), test)


def grpo(run, steps: int | None = None) -> None:
    """Notebook 4: the adapters of GRPO, with and without the loop, and their answers on the test split.

    `steps`: in place of the profile's, for the student of the straight line and the one without a loop; so the
    reference is trained longer. The student that keeps what fits learns fast: it has the profile's steps.
    """
    profile, straight, keeps = run.profile, run.find("adapters/sft"), run.find("adapters/sft_keep")
    test, prompts = load_split(profile, "test"), prompts_dataset(load_split(profile, "train"))
    probe = probe_records(profile)

    def trained(name, start, steps=None, **changes):
        steps_done = trained_steps(run.root, name)
        if steps and steps_done not in (None, steps):
            raise ArtefactError(
                f"{run.root} has adapters/{name} already, after {steps_done} steps and not {steps}: leave "
                "out --steps, or name another --run-dir."
            )
        return run.adapter(
            name,
            lambda folder: train_grpo(
                load_student(profile, start, trainable=bool(start)),
                prompts,
                folder,
                profile,
                run.seed,
                steps=steps,
                probe=probe,
                **changes,
            ),
        )

    adapter, adapter_keep = trained("grpo", straight, steps), trained("grpo_keep", keeps)
    single = trained("grpo_single", None, steps, turns=0)
    for name, policy in (("sft_grpo_ivt", adapter), ("sft_keep_grpo_ivt", adapter_keep)):
        both_lengths(run, name, lambda policy=policy: load_student(profile, policy), test)
    _test(run, "grpo_single", single, turns=0)


def trained_steps(root, adapter: str) -> int | None:
    """Return after how many optimizer steps the adapter of a run was finished; None where it is not."""
    return len(read_log(root / "adapters" / adapter)) if f"adapters/{adapter}" in finished_stages(root) else None


def seeds(run, numbers, steps: int | None = None) -> None:
    """Train the students of notebooks 3 and 4 and the closer look with several seeds, and score them on the test split.

    The seed of `run` is the run itself; each other one gets a run of its own in its folder `SEEDS`. `steps`: as in
    `grpo`. No seed changes the untrained student, so its answers are those of `run`.
    """
    others = [path for path in (run.root / SEEDS).glob("*") if path.is_dir()]
    for root in [run.root, *others]:
        finished, steps_wanted, steps_done = (
            finished_stages(root),
            steps or run.profile.grpo_steps,
            trained_steps(root, "grpo"),
        )
        if steps_done not in (None, steps_wanted):
            raise ArtefactError(
                f"{root} has GRPO of {steps_done} steps, and {steps_wanted} are asked for, so they cannot be "
                f"compared: say --steps {steps_done}, or name another --run-dir."
            )
        if "rollouts/sft_ivt_long" in finished and "adapters/sft" not in finished:
            raise ArtefactError(
                f"{root} has the answers of a training that came without its adapters. "
                "Another training must not mix with them: name another --run-dir."
            )
    evaluation(run)
    answers = own_answers(run, load_split(run.profile, "train"))
    for number in numbers:
        own = run if number == run.seed else Run(run.profile, number, run.root / SEEDS / str(number))
        print(f"Seed {number}: SFT, GRPO and their answers, in {own.root}.", flush=True)
        own.rollouts("train_step0", lambda: answers)
        sft(own)
        _sampled(own)
        grpo(own, steps)
    run_closer(run, numbers, load_split(run.profile, "train"), load_split(run.profile, "test"))


def _sampled(run) -> None:
    """Let the student after SFT give as many sampled first answers to the test split as its loop gives."""
    profile = run.profile
    run.rollouts(
        SAMPLED,
        lambda: sampled_answers(
            load_student(profile, run.find("adapters/sft")),
            load_split(profile, "test"),
            profile,
            run.seed,
            SAMPLED,
        ),
    )


def ablations(run) -> None:
    """Notebook 5: every ablation, and the table of them."""
    train, val = load_split(run.profile, "train"), load_split(run.profile, "val")
    run.rows("ablations", lambda: run_ablations(run, train, val))


def mirage(run, served: dict[str | None, Student] | None = None) -> None:
    """Notebook 6: confidence, sampled answers and controls of each student; `served`: as in `evaluation`."""
    test, val = load_split(run.profile, "test"), load_split(run.profile, "val")
    for name in ASKED:
        student = served.get(METHODS[name].adapter) if served else None
        if student or not served:
            measure(run, name, read_jsonl(run.find(f"rollouts/{name}.jsonl")), test, val, student)


def _test(run, name: str, adapter, **changes) -> None:
    run.rollouts(
        name,
        lambda: evaluate(
            load_student(run.profile, adapter),
            load_split(run.profile, "test"),
            run.profile,
            run.seed,
            name,
            **changes,
        ),
    )


STAGES = {"eval": evaluation, "sft": sft, "grpo": grpo, "ablations": ablations, "mirage": mirage}

"""What notebook 6 asks of each student: confidence, sampled answers and controls, every one a stage of a run.

With the stages there, tables and figures need no model.
"""

from ivt_utils import confidence, controls, selection
from ivt_utils.loop import answer_again, evaluate, sampled_answers
from ivt_utils.methods import METHODS
from ivt_utils.metrics import Resampling, first_steps
from ivt_utils.records import first
from ivt_utils.runtime.files import ArtefactError
from ivt_utils.schema import Rollout
from ivt_utils.student import Student, load_student

SAMPLED = "sampled_sft_ivt"  # the stage of notebook 6: as many sampled first answers as the loop of SFT gives


def second_turns(run, student, test, base: list[Rollout], bare: list[Rollout]) -> dict[tuple[str, str], list[Rollout]]:
    """Notebook 1: return the base student's answers to each of `controls.SECOND_TURNS`, rollouts of two steps.

    `base`, `bare`: its loops with the box filled and with the bare image, which hold two of the six.
    """
    profile, own = run.profile, [rollout["steps"][0]["box"] for rollout in base]
    rollouts_by_turn = {("feedback", "none"): first_steps(bare, 2), ("feedback", "filled"): first_steps(base, 2)}

    def answered(words, style):
        return rollouts_by_turn.get((words, style)) or answer_again(
            student, test, base, own, profile, style=style, words=words, progress=f"second turn: {words}, {style}"
        )

    return {
        turn: run.rollouts(controls.second_turn_stage(*turn), lambda turn=turn: answered(*turn))
        for turn in controls.SECOND_TURNS
    }


def measure(run, name: str, rollouts: list[Rollout], test, val, served: Student | None = None) -> dict:
    """Return {"rules": rows of `selection.rule_rows`, "confident": the rollouts with confidence, "controls"}.

    `rollouts`: those of method `name` on `test`. "controls": for each control of `controls.shown_boxes` the rollouts of
    step 0 and the answer after it. Thresholds come from the first samples of `val`, as many as ablations take.
    `served`: a student that answers elsewhere. Nobody sees its logits, so its rollouts come back without confidence.
    """
    profile, seed = run.profile, run.seed
    student, adapter = served, None if served else run.find(f"adapters/{METHODS[name].adapter}")

    def loaded():
        nonlocal student
        student = student or load_student(profile, adapter)
        return student

    def sampled(stage, records):
        return run.rollouts(
            f"sampled_{stage}", lambda: sampled_answers(loaded(), records, profile, seed, f"sampled: {stage}")
        )

    def answered(label, boxes):
        if label == controls.OWN:  # the loop has shown it already
            pairs = [(rollout, *rollout["steps"][:2]) for rollout in rollouts]
            return [{**rollout, "steps": [own, {**again, "shown": own["box"]}]} for rollout, own, again in pairs]
        return answer_again(loaded(), test, rollouts, boxes, profile, style=profile.style, progress=f"control: {label}")

    def control(label, boxes):
        return run.rollouts(controls.stage(name, label), lambda: answered(label, boxes))

    def loop_on_val():
        return evaluate(loaded(), val, profile, seed, f"val: {name}")

    def asked(stage, records, answers):
        return run.rollouts(
            f"confidence_{stage}",
            lambda: confidence.with_confidence(
                loaded(),
                records,
                answers(),
                style=profile.style,
                batch_size=profile.batch_size,
                progress=f"confidence: {stage}",
            ),
        )

    val = first(val, profile.ablation_test)
    if served:
        confident, on_val = rollouts, run.rollouts(f"val_{name}", loop_on_val)
    else:
        confident, on_val = asked(name, test, lambda: rollouts), asked(f"{name}_val", val, loop_on_val)
    if [r["steps"][-1]["box"] for r in confident] != [r["steps"][-1]["box"] for r in rollouts]:
        raise ArtefactError(
            f"{run.root} holds confidence in another student's answers; delete confidence_*, sampled_* "
            "and control_* in its folder rollouts and run again."
        )
    answers = sampled(name, test), sampled(f"{name}_val", val)
    boxes_by_control = controls.shown_boxes(rollouts, profile.control_shifts, seed, profile.grid)
    controlled = {label: control(label, boxes) for label, boxes in boxes_by_control.items()}
    resampling = Resampling(seed, profile.resamples)
    rules = selection.rule_rows(confident, on_val, *answers, profile.thresholds, resampling)
    return {"rules": rules, "confident": confident, "controls": controlled}

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
from ivt_utils.student import load_student

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


def without_logits(run, name: str, rollouts: list[Rollout], test, val, loaded) -> tuple[tuple, dict]:
    """Return the sampled answers to `test` and `val`, and the "controls" of `measure`: a served student gives both.

    `rollouts`: those of method `name` on `test`. `loaded()` returns the student, where it is needed.
    """
    profile, seed = run.profile, run.seed

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

    answers = sampled(name, test), sampled(f"{name}_val", first(val, profile.ablation_test))
    boxes_by_control = controls.shown_boxes(rollouts, profile.control_shifts, seed, profile.grid)
    return answers, {k: control(k, boxes) for k, boxes in boxes_by_control.items()}


def measure(run, name: str, rollouts: list[Rollout], test, val) -> dict:
    """Return {"rules": rows of `selection.rule_rows`, "confident": the rollouts with confidence, "controls"}.

    `rollouts`: those of method `name` on `test`. "controls": for each control of `controls.shown_boxes` the rollouts of
    step 0 and the answer after it. Thresholds come from the first samples of `val`, as many as ablations take.
    """
    profile, seed = run.profile, run.seed
    adapter = run.find(f"adapters/{METHODS[name].adapter}")
    student = None

    def loaded():
        nonlocal student
        student = student or load_student(profile, adapter)
        return student

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
    confident = asked(name, test, lambda: rollouts)
    on_val = asked(f"{name}_val", val, lambda: evaluate(loaded(), val, profile, seed, f"val: {name}"))
    if [r["steps"][-1]["box"] for r in confident] != [r["steps"][-1]["box"] for r in rollouts]:
        raise ArtefactError(
            f"{run.root} holds confidence in another student's answers; delete confidence_*, sampled_* "
            "and control_* in its folder rollouts and run again."
        )
    answers, controlled = without_logits(run, name, rollouts, test, val, loaded)
    resampling = Resampling(seed, profile.resamples)
    rules = selection.rule_rows(confident, on_val, *answers, profile.thresholds, resampling)
    return {"rules": rules, "confident": confident, "controls": controlled}

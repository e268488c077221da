"""The stages as scripts: a look at the first answers before anything is spent; the rest is in the notebooks' tests."""

import re
from dataclasses import replace

import pytest

from ivt_utils import controls, pipeline
from ivt_utils.boxes import snap
from ivt_utils.micro.model import GRID
from ivt_utils.protocol import answer_text
from ivt_utils.runtime.files import ArtefactError, read_jsonl
from ivt_utils.runtime.store import SEEDS, Run

GOOD, BAD = '{"bbox_2d": [10, 20, 30, 40]}', "10, 20, 30, 40"


def right(records, number: int) -> str:
    """The answer that is right for one of the records."""
    return answer_text(snap(records[number]["bbox"], GRID))


def test_the_first_answers_are_shown_with_their_mean_iou(scripted, records, tiny_profile, capsys):
    pipeline.first_look(scripted(lambda turn, i: right(records, i) if i % 2 else BAD), records, tiny_profile)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 and records[1]["expression"] in said[1] and right(records, 1) in said[1]
    assert "6 answers" in said[3] and 0.35 < float(re.search(r"\d\.\d+", said[3])[0]) <= 0.5


def test_boxes_that_miss_stop_at_once_though_their_form_is_right(scripted, records, tiny_profile):
    """As boxes in pixels would, or those of a student whose eyes are blind."""
    with pytest.raises(ArtefactError) as caught:
        pipeline.first_look(scripted(lambda turn, i: GOOD), records, replace(tiny_profile, load_in_4bit=True))
    message = str(caught.value)
    assert "first 6 answers hardly meet the true ones" in message and "load_in_4bit" in message and "\n" not in message
    with pytest.raises(ArtefactError) as caught:  # nobody here knows the precision of a served student
        pipeline.first_look(scripted(lambda turn, i: GOOD), records, replace(tiny_profile, load_in_4bit=False))
    assert str(caught.value).endswith("the order of the coordinates.")
    lenient = replace(tiny_profile, least_first_iou=0.0)
    pipeline.first_look(scripted(lambda turn, i: GOOD), records, lenient)
    assert not lenient.changed(tiny_profile.recipe())  # it may be lowered in the middle of a run


def test_a_student_that_answers_in_another_form_stops_at_once_with_one_sentence(scripted, records, tiny_profile):
    with pytest.raises(ArtefactError) as caught:
        pipeline.first_look(scripted(lambda turn, i: BAD), records, tiny_profile)
    message = str(caught.value)
    assert message.startswith("Only 0 of the first 6 answers") and BAD in message and "\n" not in message


@pytest.mark.parametrize("hub", [True, False])
def test_only_a_student_of_the_hub_is_looked_at_and_once(hub, tmp_path, tiny_profile, monkeypatch, scripted):
    looked = []
    monkeypatch.setattr(type(tiny_profile), "hub_student", property(lambda self: hub))
    monkeypatch.setattr(pipeline, "load_student", lambda profile: scripted(lambda turn, i: GOOD))
    monkeypatch.setattr(pipeline, "first_look", lambda student, records, profile: looked.append(len(records)))
    run = Run(tiny_profile, 0, tmp_path)
    for _ in range(2):
        pipeline.evaluation(run)
    assert looked == [tiny_profile.batch_size] * hub
    second = {controls.second_turn_stage(*turn) for turn in controls.SECOND_TURNS}
    wanted = {"base_ivt_long", "base_ivt", "base_ivt_bare", "train_step0", *second}
    assert set(run.stages()) == {f"rollouts/{name}" for name in wanted}


@pytest.mark.slow
def test_each_seed_has_a_run_of_its_own_and_the_runs_own_seed_is_the_run(tiny_profile, tmp_path, monkeypatch):
    called, run = [], Run(tiny_profile, 0, tmp_path)
    answers, others = [{"id": "a"}], tmp_path / SEEDS / "2"
    monkeypatch.setattr(pipeline, "evaluation", lambda run: called.append("eval"))
    monkeypatch.setattr(pipeline, "own_answers", lambda run, train: run.rollouts("train_step0", lambda: answers))
    monkeypatch.setattr(pipeline, "sft", lambda run: called.append(("sft", run.seed, run.root)))
    monkeypatch.setattr(pipeline, "grpo", lambda run, steps: called.append(("grpo", run.seed, steps)))
    monkeypatch.setattr(pipeline, "run_closer", lambda run, seeds, *data: called.append(("closer", seeds, len(data))))
    pipeline.seeds(run, [0, 2], steps=7)
    own = ("sft", 0, tmp_path), ("grpo", 0, 7)
    assert called == ["eval", *own, ("sft", 2, others), ("grpo", 2, 7), ("closer", [0, 2], 2)]
    assert read_jsonl(others / "rollouts" / "train_step0.jsonl") == answers  # no seed changes the untrained student


def test_a_finished_training_of_other_steps_is_not_taken_for_the_one_asked_for(tiny_profile, tmp_path, monkeypatch):
    run = Run(tiny_profile, 0, tmp_path)
    for name in ("sft", "sft_keep", "grpo"):
        run.adapter(name, lambda folder: (folder / "training_log.json").write_text('[{"loss": 0}, {"loss": 0}]'))
    with pytest.raises(ArtefactError, match="adapters/grpo already, after 2 steps and not 7: leave out --steps"):
        pipeline.grpo(run, 7)

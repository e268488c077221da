"""The ablations: which students they train, on what and for how long, and rows against the main run's own student."""

from dataclasses import replace

import pytest
from datasets import Dataset

from ivt_utils import ablations, protocol
from ivt_utils.boxes import iou
from ivt_utils.harvest import trajectory
from ivt_utils.runtime.store import Run

TRUTH = [100, 100, 300, 300]
NEAR, FAR = (120, 110, 310, 300), (240, 240, 440, 440)


@pytest.fixture
def trajectories():
    """Seven of the main run: the errors of the first five are small."""
    rollouts = [
        {
            "id": f"t{i}-0",
            "image_id": f"t{i}",
            "subset": "s",
            "expression": "the star",
            "truth": TRUTH,
            "steps": [{"text": protocol.answer_text(box), "box": box}],
        }
        for i, box in enumerate([NEAR] * 5 + [FAR] * 2)
    ]
    return [trajectory(rollout, 2, 10) for rollout in rollouts]


@pytest.mark.slow
def test_each_variant_changes_one_thing(trajectories, tiny_profile):
    distorted, untold = ablations.sft_variants(trajectories, tiny_profile, 0).values()
    for changed, own in zip(distorted, trajectories, strict=True):
        first, theirs = changed["steps"][0]["box"], own["steps"][0]["box"]
        assert first != tuple(theirs) and iou(first, TRUTH) == pytest.approx(iou(theirs, TRUTH), abs=0.06)
        assert changed["steps"][-1]["box"] == own["steps"][-1]["box"] and "It is" in changed["steps"][1]["text"]
    for changed, own in zip(untold, trajectories, strict=True):
        assert [step["box"] for step in changed["steps"]] == [step["box"] for step in own["steps"]]
        assert all(step["text"] == protocol.answer_text(step["box"]) for step in changed["steps"])


@pytest.mark.parametrize("epochs, count, steps", [(1, 8, 2), (1, 9, 3), (2, 9, 6), (0.5, 9, 2)])
def test_a_variant_is_trained_as_long_as_the_main_student(epochs, count, steps, tiny_profile):
    assert ablations.optimizer_steps(replace(tiny_profile, sft_epochs=epochs, sft_batch=4), count) == steps


@pytest.fixture
def made(trajectories, tiny_profile, tmp_path, monkeypatch):
    """A run without a model, the records of its splits, and a list of what it trains and evaluates."""
    done, boxes = [], {2: TRUTH}  # an answer is right at the last step of the usual loop alone

    def train(student, dataset, folder, profile, seed, steps):
        folder.joinpath("adapter").write_text("")
        done.append((len(dataset), steps))

    def evaluate(adapter, val, profile, seed, name, turns=2, style="filled"):
        done.append((adapter.name, turns, style))
        return [
            {
                "id": f"v{i}-0",
                "image_id": f"v{i}",
                "subset": "s",
                "expression": "the star",
                "truth": TRUTH,
                "steps": [{"text": "", "box": list(boxes.get(step, FAR))} for step in range(turns + 1)],
            }
            for i in range(len(val))
        ]

    monkeypatch.setattr(ablations, "train_sft", train)
    monkeypatch.setattr(ablations, "evaluate", evaluate)
    monkeypatch.setattr(ablations, "load_student", lambda profile, adapter=None: adapter)
    run = Run(replace(tiny_profile, long_turns=4, ablation_test=5, resamples=200), 0, tmp_path)
    run.rollouts("trajectories", lambda: [*trajectories, {**trajectories[0], "id": "of another split"}])
    for name in ("sft", "sft_keep"):
        run.adapter(name, lambda folder: (folder / "adapter").write_text(""))
    train_split = Dataset.from_list([{"id": t["id"]} for t in trajectories])
    return run, train_split, Dataset.from_list([{"id": f"v{i}-0"} for i in range(9)]), done


def test_the_reference_is_the_main_student_and_only_two_are_trained(made):
    run, train, val, done = made
    rows = ablations.run_ablations(run, train, val)
    assert [part for part in done if len(part) == 2] == [(7, 4), (7, 4)]  # 7 trajectories in batches of 2
    asked = [part for part in done if len(part) == 3]
    assert asked[0] == ("sft", 4, "filled") and asked[3:] == [
        ("sft_keep", 2, "filled"),
        ("sft", 2, "outline"),
        ("sft", 2, "none"),
    ]
    assert all(name.startswith("ablation_training") for name, *_ in asked[1:3])
    assert [row["name"] for row in rows] == list(dict.fromkeys(row["name"] for row in rows)) and len(rows) == 10
    before = run.stages()
    assert ablations.run_ablations(run, train, val) == rows and run.stages() == before


def test_every_row_is_a_level_and_a_paired_difference_from_the_reference(made):
    run, train, val, _ = made
    rows = {row["name"]: row for row in ablations.run_ablations(run, train, val)}
    reference = rows.pop(ablations.REFERENCE)
    assert reference["acc50"]["value"] == reference["miou"]["value"] == 1 and reference["value"] == 0
    for name, row in rows.items():
        assert row["n"] == row["acc50"]["n"] == 5 and row["seed"] == 0 and 0 < row["p"] <= 1
        worse = name in ("loop: T = 0", "loop: T = 1", "loop: T = 3", "loop: T = 4")
        assert row["value"] == row["miou"]["value"] - 1 == pytest.approx(iou(FAR, TRUTH) - 1 if worse else 0), name
        assert row["low"] <= row["value"] <= row["high"] and (row["p"] < 1) == worse

"""Controls: which boxes are shown in place of the student's own, and the answer that follows."""

import math
from dataclasses import replace

import pytest

from ivt_utils import controls, loop, protocol
from ivt_utils.boxes import iou, snap, valid
from ivt_utils.metrics import Resampling
from ivt_utils.overlay import draw_box
from ivt_utils.profiles import get_profile


@pytest.fixture
def rollouts(records):
    boxes = [(100, 200, 300, 400), (110, 220, 330, 440), None, (500, 500, 900, 800), (0, 0, 50, 90), (10, 10, 900, 990)]
    return [
        {
            **{k: v for k, v in r.items() if k != "image"},
            "truth": r["bbox"],
            "steps": [{"text": protocol.answer_text(box) if box else "none", "box": box}],
        }
        for r, box in zip(records, boxes, strict=True)
    ]


def test_each_control_shows_what_its_name_says(rollouts):
    made = controls.shown_boxes(rollouts, (0.1, 0.5), seed=0, grid=10)
    assert made == controls.shown_boxes(rollouts, (0.1, 0.5), seed=0, grid=10) and len(made) == 7
    assert made != controls.shown_boxes(rollouts, (0.1, 0.5), seed=1, grid=10)
    own = [r["steps"][0]["box"] for r in rollouts]
    assert made["own box"] == own and made["no box"] == [None] * 6
    for name, boxes in made.items():
        assert boxes[2] is None  # step 0 held no box
        assert all(box is None or valid(box) for box in boxes), name
    for i, box in enumerate(own):
        if box is None:
            continue
        assert made[controls.TRUTH][i] == snap(rollouts[i]["truth"], 10)
        other = made["another sample's box"][i]
        assert other in own and other != box
        random_box = made["random box"][i]
        assert [round((b - a) / 10) for a, b in zip(random_box, random_box[2:], strict=False)] == pytest.approx(
            [round((b - a) / 10) for a, b in zip(box, box[2:], strict=False)], abs=1
        )


def test_a_moved_box_is_moved_by_its_share():
    box, truth = (300, 300, 500, 700), [300, 300, 500, 700]
    rollouts = [{"id": str(i), "image_id": str(i), "truth": truth, "steps": [{"box": box}]} for i in range(20)]
    moved = controls.shown_boxes(rollouts, (0.25,), seed=0)["own box, moved by 25%"]
    for x1, y1, x2, y2 in moved:
        assert (x2 - x1, y2 - y1) == pytest.approx((200, 400), abs=1)
        assert math.hypot((x1 - 300) / 200, (y1 - 300) / 400) == pytest.approx(0.25, abs=0.01)
    assert len(set(moved)) > 15 and all(0.4 < iou(b, truth) < 0.8 for b in moved)


def test_the_next_answer_is_given_after_the_shown_box(rollouts, records, monkeypatch):
    chats = []

    def generate(student, batch, *_):
        chats.extend(batch)
        return [protocol.answer_text((1, 2, 3, 4)) if i else "nothing" for i in range(len(batch))]

    monkeypatch.setattr(loop, "generate", generate)
    shown = [None, (0, 0, 10, 10), (5, 5, 20, 20), None, (7, 7, 9, 9), (1, 1, 999, 999)]
    made = loop.answer_again("student", records, rollouts, shown, replace(get_profile("micro"), batch_size=4))
    assert [r["steps"][0] for r in made] == [r["steps"][0] for r in rollouts]
    assert [r["steps"][1]["shown"] for r in made] == shown
    assert [r["steps"][1]["box"] for r in made] == [None, *[(1, 2, 3, 4)] * 3, None, (1, 2, 3, 4)]  # two batches
    for chat, rollout, record, box in zip(chats, rollouts, records, shown, strict=True):
        own = rollout["steps"][0]
        wanted = protocol.feedback(draw_box(record["image"], box), own["box"])
        assert [m["role"] for m in chat] == ["user", "assistant", "user"]
        assert chat[1] == protocol.answer(own["text"])
        assert chat[2]["content"][1] == wanted["content"][1]
        assert chat[2]["content"][0]["image"].tobytes() == wanted["content"][0]["image"].tobytes()


def test_the_row_of_a_control_tells_what_was_shown_and_what_followed(rollouts):
    def after(shown, answer):
        return [{**r, "steps": [r["steps"][0], {"text": "", "box": answer(r), "shown": shown(r)}]} for r in rollouts]

    def truth(r):
        return snap(r["truth"])

    rows = controls.control_rows(
        {controls.OWN: after(truth, lambda r: r["steps"][0]["box"]), "none": after(lambda r: None, truth)},
        Resampling(0, 50),
    )
    assert [row["control"] for row in rows] == [controls.OWN, "none"]
    wrong = 1 - rows[0]["acc50"]["value"]  # what a right answer in place of the own one gains, sample by sample
    assert rows[0]["difference"]["value"] == 0 and rows[1]["difference"]["value"] == pytest.approx(wrong) and wrong > 0
    assert rows[0]["shown"]["value"] > 0.95 and rows[0]["shown"]["n"] == 6
    assert rows[0]["follow"]["value"] == pytest.approx(rows[0]["miou"]["value"], abs=0.02)
    assert rows[1]["shown"]["value"] is None and rows[1]["follow"]["value"] is None and rows[1]["acc50"]["value"] == 1


def test_the_rows_of_the_second_turn_by_hand():
    """Step 0 is right in three of four; the answer is the same, another right one, a wrong one, and none."""
    truth, near, far = [0, 0, 100, 100], [0, 0, 100, 80], [500, 500, 600, 600]
    pairs = [(truth, truth), (truth, near), (truth, far), (far, None)]
    rollouts = [
        {
            "id": str(i),
            "image_id": str(i),
            "subset": "s",
            "truth": truth,
            "steps": [{"text": "", "box": box} for box in pair],
        }
        for i, pair in enumerate(pairs)
    ]
    still = [{**r, "steps": [r["steps"][0]] * 2} for r in rollouts]
    rows = controls.second_turn_rows({("feedback", "filled"): rollouts, ("question", "none"): still}, Resampling(0, 50))
    assert [(row["words"], row["style"]) for row in rows] == [("feedback", "filled"), ("question", "none")]
    moved, same = (
        {key: row[key]["value"] for key in ("acc50", "miou", "parsed", "same", "difference")} for row in rows
    )
    assert moved == pytest.approx({"acc50": 0.5, "miou": 1.8 / 4, "parsed": 0.75, "same": 0.25, "difference": -0.25})
    assert same == {"acc50": 0.75, "miou": 0.75, "parsed": 1, "same": 1, "difference": 0}
    assert rows[1]["difference"] == {"value": 0, "low": 0, "high": 0, "n": 4}  # paired: equal in every resample


def test_two_answers_without_a_box_are_not_the_same_box():
    nothing = [
        {
            "id": str(i),
            "image_id": str(i),
            "subset": "s",
            "truth": [0, 0, 9, 9],
            "steps": [{"text": "", "box": None}] * 2,
        }
        for i in range(3)
    ]
    (row,) = controls.second_turn_rows({("feedback", "none"): nothing}, Resampling(0, 50))
    assert row["same"]["value"] == row["parsed"]["value"] == row["acc50"]["value"] == 0


def test_each_second_turn_has_a_stage_of_its_own():
    stages = [controls.second_turn_stage(*turn) for turn in controls.SECOND_TURNS]
    assert len(set(stages)) == 6 and stages[0] == "second_feedback_none"

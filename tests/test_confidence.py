"""Confidence: against a likelihood computed token by token, a batch against one by one, and known calibrations."""

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu, pearsonr

from ivt_utils import confidence, protocol
from ivt_utils.metrics import Resampling
from ivt_utils.overlay import draw_box

BOXES = [(100, 200, 300, 400), (110, 220, 330, 440)]


@pytest.fixture
def rollouts(records):
    """Two steps a record, the second with a trace; the third record's first answer does not parse."""
    made = []
    for record in records:
        steps = [
            {"text": protocol.answer_text(BOXES[0]), "box": BOXES[0]},
            {"text": protocol.answer_text(BOXES[1], "It is too high: move down."), "box": BOXES[1]},
        ]
        made.append({**{k: v for k, v in record.items() if k != "image"}, "truth": record["bbox"], "steps": steps})
    made[2]["steps"][0] = {"text": "no box", "box": None}
    labelled = '{"bbox_2d": [100, 200, 300, 400], "label": "a cup, {red}"}'  # the box does not begin at the last brace
    made[3]["steps"][0] = {"text": labelled, "box": BOXES[0]}
    return made


def one_by_one(student, record, steps, turn):
    """The two numbers of one step, from the whole chat and a softmax at each token of the answer."""
    chat = protocol.transcript(record["image"], record["expression"], steps[: turn + 1], draw_box)
    tokenizer = student.processor.tokenizer

    def run(chat, begun="", **options):
        text = student.processor.apply_chat_template([chat], tokenize=False, **options)[0] + begun
        images = [part["image"] for message in chat for part in message["content"] if "image" in part]
        inputs = student.processor(text=[text], images=images, return_tensors="pt")
        with torch.inference_mode():
            return inputs["input_ids"][0], student.model(**inputs).logits[0].log_softmax(-1)

    ids, likelihoods = run(chat)
    start = max(i for i, token in enumerate(ids) if "bbox_2d" in tokenizer.decode(token))
    end = max(i for i, token in enumerate(ids) if token == tokenizer.eos_token_id)
    likelihood = np.mean([likelihoods[i - 1, ids[i]].item() for i in range(start, end + 1)])
    box = steps[turn]["box"]
    asked = [*chat, protocol.feedback(draw_box(record["image"], box), box)]
    _, after = run(asked, "It", add_generation_prompt=True)
    fits, opens = after[-1, tokenizer.convert_tokens_to_ids([" fits", " is"])].exp().tolist()
    return likelihood, fits / (fits + opens)


def test_a_batch_gives_the_numbers_of_each_chat_alone(tiny_student, records, rollouts):
    found = confidence.with_confidence(tiny_student, records, rollouts, style="filled", batch_size=4)
    assert [{**r, "steps": None} for r in found] == [{**r, "steps": None} for r in rollouts]
    for i, record in enumerate(records):
        for turn in range(2):
            step, own = found[i]["steps"][turn], rollouts[i]["steps"]
            assert {k: step[k] for k in ("text", "box")} == own[turn]
            if own[turn]["box"] is None:
                assert step["likelihood"] is None and step["fits"] is None
                continue
            wanted = one_by_one(tiny_student, record, own, turn)
            assert (step["likelihood"], step["fits"]) == pytest.approx(wanted, abs=1e-4)
            assert step["likelihood"] < 0 < step["fits"] < 1
    assert "likelihood" not in rollouts[0]["steps"][0]


# --- calibration


def made_up(*steps):
    """Two samples an image; each of `steps` is (what is said of each sample's box, whether that box is right)."""

    def step(said, right):
        box = (100, 100, 300, 300) if right else (600, 600, 700, 700)
        return {"box": box, "fits": said, "likelihood": said - 1}

    return [
        {
            "id": f"{i}",
            "image_id": f"{i // 2}",
            "subset": "s",
            "truth": [100, 100, 300, 300],
            "steps": [step(says[i], rights[i]) for says, rights in steps],
        }
        for i in range(len(steps[0][0]))
    ]


def found(*steps, n_resamples=20):
    return confidence.calibration(made_up(*steps), Resampling(0, n_resamples))


def test_calibration_is_that_of_scipy_at_each_step():
    rng = np.random.default_rng(0)
    steps = [(said, rng.uniform(size=400) < said) for said in rng.uniform(size=(2, 400)).round(2)]
    rows = found(*steps, n_resamples=200)
    assert [row["step"] for row in rows] == [0, 1]
    for row, (said, right) in zip(rows, steps, strict=True):
        assert row["right"]["value"] == pytest.approx(right.mean())
        assert row["said"]["value"] == pytest.approx(said.mean())
        auroc = mannwhitneyu(said[right], said[~right]).statistic / (right.sum() * (~right).sum())
        for signal in confidence.SIGNALS:
            assert row[signal]["r"]["value"] == pytest.approx(pearsonr(said, right).statistic)
            assert row[signal]["auroc"]["value"] == pytest.approx(auroc)
            for cell in row[signal].values():
                assert cell["low"] < cell["value"] < cell["high"] and cell["n"] == 400


def test_a_resample_counts_a_box_as_often_as_its_image_is_drawn():
    rng = np.random.default_rng(1)
    said = rng.uniform(size=40).round(1)
    right, times = rng.uniform(size=40) < said, rng.integers(0, 3, 40)
    again, theirs = np.repeat(said, times), np.repeat(right, times)
    auroc = mannwhitneyu(again[theirs], again[~theirs]).statistic / (theirs.sum() * (~theirs).sum())
    assert confidence._auroc(said, right, times[None])[0] == pytest.approx(auroc)
    assert confidence._pearson(said, right, times[None])[0] == pytest.approx(pearsonr(again, theirs).statistic)


def test_steps_that_each_know_something_would_know_nothing_together():
    """Simpson's paradox: at step 1 fewer boxes are right, and the student is surer of all."""
    first = [0.1] * 2 + [0.2] * 8, [False] * 2 + [True] * 8
    second = [0.8] * 8 + [0.9] * 2, [False] * 8 + [True] * 2
    rows = found(first, second)
    pooled = found((first[0] + second[0], first[1] + second[1]))[0]
    assert all(row["fits"]["auroc"]["value"] == 1 for row in rows) and pooled["fits"]["auroc"]["value"] < 0.5


def test_calibration_of_students_that_are_always_right_or_always_as_sure():
    nothing = {"value": None, "low": None, "high": None, "n": 4}
    always = found(([0.2, 0.4, 0.6, 0.8], [True] * 4))[0]
    assert always["fits"] == always["likelihood"] == {"r": nothing, "auroc": nothing}
    flat = found(([0.1] * 8, [True, False] * 4))[0]["fits"]
    assert flat["r"]["value"] is None and flat["auroc"]["value"] == 0.5


def test_a_limit_is_not_given_where_a_resample_holds_one_kind_only():
    cell = found(([0.2, 0.4, 0.6, 0.8], [False, False, True, True]))[0]["fits"]["r"]
    assert cell["value"] > 0 and cell["low"] is cell["high"] is None


def test_steps_without_a_box_say_nothing():
    rollouts = made_up(([0.1, 0.9, 0.5], [False, True, True]), ([0.1] * 3, [True] * 3))
    for rollout, step in ((rollouts[2], 0), *((r, 1) for r in rollouts)):
        rollout["steps"][step] = {"box": None, "fits": None, "likelihood": None}
    rows = confidence.calibration(rollouts, Resampling(0, 20))
    assert rows[0]["fits"]["auroc"]["n"] == rows[0]["right"]["n"] == 2
    assert rows[1]["right"]["value"] is rows[1]["likelihood"]["r"]["value"] is None
    assert rows[1]["fits"]["auroc"]["n"] == rows[1]["said"]["n"] == 0

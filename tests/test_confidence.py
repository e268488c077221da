"""Confidence: against a likelihood computed token by token, a batch against one by one, and known calibrations."""

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu, pearsonr

from ivt_utils import confidence, protocol
from ivt_utils.render import draw_box

BOXES = [(100, 200, 300, 400), (110, 220, 330, 440)]


@pytest.fixture
def rollouts(records):
    """Two steps a record, the second with a trace; the third record's first answer does not parse."""
    made = []
    for record in records:
        steps = [{"text": protocol.answer_text(BOXES[0]), "box": BOXES[0]},
                 {"text": protocol.answer_text(BOXES[1], "It is too high: move down."), "box": BOXES[1]}]  # fmt: skip
        made.append({**{k: v for k, v in record.items() if k != "image"}, "truth": record["bbox"], "steps": steps})
    made[2]["steps"][0] = {"text": "no box", "box": None}
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
    found = confidence.with_confidence(tiny_student, records, rollouts, batch_size=4)
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


def made_up(says, rights):
    """One step a sample, two samples an image, with a box that is right or not."""
    truth = [100, 100, 300, 300]
    return [
        {"id": f"{i}", "image_id": f"{i // 2}", "subset": "s", "truth": truth,
         "steps": [{"box": (100, 100, 300, 300) if right else (600, 600, 700, 700), "fits": said}]}
        for i, (said, right) in enumerate(zip(says, rights, strict=True))
    ]  # fmt: skip


def test_calibration_is_that_of_scipy_and_its_bins_count():
    rng = np.random.default_rng(0)
    said = rng.uniform(size=400)
    right = rng.uniform(size=400) < said
    found = confidence.calibration(made_up(said.tolist(), right), seed=0, n_resamples=200)
    assert found["r"]["value"] == pytest.approx(pearsonr(said, right).statistic)
    auroc = mannwhitneyu(said[right], said[~right]).statistic / (right.sum() * (~right).sum())
    assert found["auroc"]["value"] == pytest.approx(auroc)
    for name in ("r", "auroc"):
        assert found[name]["low"] < found[name]["value"] < found[name]["high"] and found[name]["n"] == 400
    assert sum(b["right"]["n"] for b in found["bins"]) == 400 and len(found["bins"]) == 10
    for k, b in enumerate(found["bins"]):
        assert k / 10 <= b["fits"] <= (k + 1) / 10 and b["right"]["low"] - 0.1 <= b["fits"] <= b["right"]["high"] + 0.1


def test_calibration_of_students_that_are_always_right_or_always_as_sure():
    always = confidence.calibration(made_up([0.2, 0.4, 0.6, 0.8], [True] * 4), seed=0, n_resamples=20)
    assert always["r"]["value"] is None and always["auroc"] == {"value": None, "low": None, "high": None, "n": 4}
    flat = confidence.calibration(made_up([0.5] * 8, [True, False] * 4), seed=0, n_resamples=20)
    assert flat["r"]["value"] is None and flat["auroc"]["value"] == 0.5


def test_steps_without_a_box_say_nothing():
    rollouts = made_up([0.1, 0.9, 0.5], [False, True, True])
    rollouts[2]["steps"][0] = {"box": None, "fits": None}
    assert confidence.calibration(rollouts, seed=0, n_resamples=20)["auroc"]["n"] == 2

"""How sure the student is: of an answer it gave, and of a box that it is shown (the paper's second version).

The paper asks the model whether the drawn box fits. Our traces answer that question anyway: "It fits: keep it." or "It
is ...". So the student's verification is the probability of the first against the second as its next words. A student
that was never trained with traces has not learned what they mean.
"""

from os.path import commonprefix
from typing import Any

import numpy as np

from ivt_utils import metrics, protocol
from ivt_utils.boxes import answer_start
from ivt_utils.loop import continued, each_image_once, remember
from ivt_utils.metrics import Resampling
from ivt_utils.overlay import draw_box, load_image
from ivt_utils.records import numbered
from ivt_utils.runtime.distributed import each_batch
from ivt_utils.runtime.hardware import memory_advice
from ivt_utils.schema import Rollout
from ivt_utils.student import Student

SIGNALS = ("fits", "likelihood")


def with_confidence(
    student: Student, records, rollouts: list[Rollout], *, style: str, batch_size: int, progress: str = ""
) -> list[Rollout]:
    """Return the rollouts with two numbers more at each step, None where the step has no box.

    "likelihood": mean log-probability (nats a token) of the box that was answered there, without its trace, so that
    steps can be compared. "fits": probability 0..1 of "It fits" against "It is" after the feedback that shows the
    box. Nothing is generated.
    """
    tokenizer = student.processor.tokenizer
    fits, opens = (tokenizer(text)["input_ids"] for text in (protocol.TRACE_FITS, protocol.TRACE_OPENS))
    shared = len(commonprefix([fits, opens]))
    lead, pair = tokenizer.decode(fits[:shared]), [fits[shared], opens[shared]]
    images = numbered(records)

    def ask(start, stop):
        batch = rollouts[start:stop]
        images_of_batch = [load_image(records[images[rollout["id"]]]["image"]) for rollout in batch]
        steps: list[list[Any]] = [[dict(step) for step in rollout["steps"]] for rollout in batch]
        chats = [[protocol.question(image, r["expression"])] for image, r in zip(images_of_batch, batch, strict=True)]
        earlier = {}
        for turn in range(len(steps[0])):
            for chat, image, own in zip(chats, images_of_batch, steps, strict=True):
                box = own[turn]["box"]
                chat += [protocol.answer(own[turn]["text"]), protocol.feedback(draw_box(image, box, style), box)]
            for own, (likelihood, fits) in zip(steps, _confidence(student, chats, lead, pair, earlier), strict=True):
                own[turn] |= {"likelihood": likelihood, "fits": fits} if own[turn]["box"] else dict.fromkeys(SIGNALS)
        return [{**rollout, "steps": own} for rollout, own in zip(batch, steps, strict=True)]

    return each_batch(ask, len(rollouts), batch_size, progress)


def calibration(rollouts, resampling: Resampling) -> list[dict]:
    """Return, for each step, how well "fits" and "likelihood" tell its right boxes (IoU >= 0.5) from its wrong ones.

    A row: {"step", "right" (share of right boxes), "said" (mean of "fits"), "fits" and "likelihood", each {"r",
    "auroc"}}, all cells of `metrics`. "r" is Pearson's correlation with correctness; "auroc" the chance that a right
    box has the higher value (Mann and Whitney). "n" counts the step's boxes. A value is None where all boxes are right
    or all wrong, and so are the limits where that happens in a resample. Steps are not pooled: see notebook 6.
    """
    rows = []
    for step, ious in enumerate(metrics.iou_matrix(rollouts).T):
        has_box = np.array([r["steps"][step]["box"] is not None for r in rollouts])
        right, images = metrics.is_right(ious) & has_box, [r["image_id"] for r in rollouts]
        fits, likelihood = (np.array([r["steps"][step][name] or 0.0 for r in rollouts]) for name in SIGNALS)
        share, verification = metrics.intervals([right, fits * has_box], [has_box] * 2, images, resampling)
        signals = {
            name: _tells(values[has_box], right[has_box], np.array(images)[has_box], resampling)
            for name, values in zip(SIGNALS, (fits, likelihood), strict=True)
        }
        rows.append({"step": step, "right": share, "said": verification, **signals})
    return rows


def _tells(values, right, images, resampling: Resampling) -> dict:
    """Return the cells "r" and "auroc" of one signal at one step, from an array each."""
    count = len(set(images))
    image = np.unique(images, return_inverse=True)[1]
    draws = np.random.default_rng(resampling.seed).integers(0, max(count, 1), (resampling.n_resamples, count))
    # How often each box counts: once in the first row, in a resample as often as its image is drawn.
    weights = np.array([np.ones(count), *(np.bincount(draw, minlength=count) for draw in draws)])[:, image]
    cells = {}
    for name, statistic in (("r", _pearson(values, right, weights)), ("auroc", _auroc(values, right, weights))):
        low, high = np.percentile(statistic[1:], [2.5, 97.5]) if count > 1 else (np.nan, np.nan)
        limits = {"value": statistic[0], "low": low, "high": high}
        cells[name] = {key: None if np.isnan(v) else float(v) for key, v in limits.items()} | {"n": len(values)}
    return cells


def _pearson(values, right, weights) -> np.ndarray:
    """Return the correlation of values and booleans under each row of weights; NaN where one of them is constant."""
    nothing = np.full(len(weights), np.nan)
    if len(set(values)) < 2:
        return nothing
    x, total = values - values.mean(), weights.sum(axis=1)
    share, mean = weights @ right / total, weights @ x / total
    spread = (weights @ (x * x) / total - mean**2) * share * (1 - share)
    together = weights @ (x * right) / total - mean * share
    return np.divide(together, np.sqrt(spread.clip(min=0)), out=nothing, where=spread > 0)


def _auroc(values, right, weights) -> np.ndarray:
    """Return the chance that a right box has the higher value, under each row of weights; NaN without both kinds.

    `scipy.stats.mannwhitneyu` gives the same, but knows no weights: a call for each resample takes 60 times as long.
    """
    ones, others = values[right][:, None], values[~right]
    higher = (ones > others) + 0.5 * (ones == others)
    weight, against = weights[:, right], weights[:, ~right]
    with np.errstate(invalid="ignore"):
        return ((weight @ higher) * against).sum(axis=1) / (weight.sum(axis=1) * against.sum(axis=1))


def _confidence(student: Student, chats, lead: str, pair: list[int], earlier: dict) -> list[tuple[float, float]]:
    """Return the two numbers of each chat's last answer, which the feedback to it follows: both from one reading.

    `earlier`: as in `loop.generate`, so that a chat that goes on is only read where it is new.
    """
    import torch

    processor, model = student.processor, student.model
    texts = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    images = [[part["image"] for message in chat for part in message["content"] if "image" in part] for chat in chats]
    with each_image_once(processor, earlier):
        inputs = processor(
            text=[text + lead for text in texts],
            images=images,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        ).to(model.device)
    answers = [chat[-2]["content"][0]["text"] for chat in chats]
    boxes = [processor.tokenizer(text[answer_start(text) :])["input_ids"] for text in answers]
    with torch.inference_mode(), memory_advice("asking for confidence", "most_at_once and batch_size", "max_pixels"):
        inputs = dict(continued(student, inputs, earlier) or inputs)
        cached = inputs["past_key_values"].get_seq_length() if "past_key_values" in inputs else 0
        positions = model._prepare_position_ids_for_generation(inputs["input_ids"], inputs)[..., cached:]
        ids, kinds = inputs.pop("input_ids"), inputs.pop("mm_token_type_ids")
        ends = [(row == processor.tokenizer.eos_token_id).nonzero()[-2].item() for row in ids]
        starts = [end - len(box) for end, box in zip(ends, boxes, strict=True)]
        first, last = min(starts) - 1, max(ends)  # the head is asked where answers stand, and at the end, alone
        places = torch.tensor([*range(first, last), ids.shape[1] - 1], device=model.device) - cached
        output = model(
            input_ids=ids[:, cached:], position_ids=positions, use_cache=True, logits_to_keep=places, **inputs
        )
    output.past_key_values.crop(-len(processor.tokenizer(lead)["input_ids"]))  # the next answer may begin otherwise
    remember(earlier, output.past_key_values, ids, inputs["attention_mask"], kinds)
    rows = []
    for row, own, start, end in zip(output.logits.float(), ids, starts, ends, strict=True):
        log_probabilities = torch.log_softmax(row[start - 1 - first : end - first], -1)
        likelihood = log_probabilities.gather(1, own[start : end + 1, None]).mean().item()
        rows.append((likelihood, torch.softmax(row[-1, pair], -1)[0].item()))
    return rows

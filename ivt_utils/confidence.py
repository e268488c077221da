"""How sure the student is: of an answer it gave, and of a box that it is shown (the paper's second version).

The paper asks the model whether the drawn box fits. Our traces answer that question anyway: "It fits: keep it." or "It
is ...". So the student's verification is the probability of the first against the second as its next words. A student
that was never trained with traces has not learnt what they mean.
"""

from os.path import commonprefix

import numpy as np

from ivt_utils import metrics, protocol
from ivt_utils.datasets import numbered
from ivt_utils.distributed import each_batch
from ivt_utils.hardware import memory_advice
from ivt_utils.render import draw_box, load_image
from ivt_utils.student import Student

SIGNALS = ("fits", "likelihood")


def with_confidence(
    student: Student, records, rollouts: list[dict], *, style: str = "filled", batch_size: int = 64, progress: str = ""
) -> list[dict]:
    """Return the rollouts with two numbers more at each step, None where the step has no box.

    "likelihood": mean log-probability (nats a token) of the box that was answered there, without its trace, so that
    steps can be compared. "fits": probability 0..1 of "It fits" against "It is" after the feedback that shows the
    box. Nothing is generated.
    """
    import torch

    tokenizer = student.processor.tokenizer
    fits, opens = (tokenizer(text)["input_ids"] for text in (protocol.TRACE_FITS, protocol.TRACE_OPENS))
    shared = len(commonprefix([fits, opens]))
    lead, pair = tokenizer.decode(fits[:shared]), [fits[shared], opens[shared]]
    images = numbered(records)

    def ask(start, stop):
        batch = rollouts[start:stop]
        shown = [load_image(records[images[rollout["id"]]]["image"]) for rollout in batch]
        steps = [[dict(step) for step in rollout["steps"]] for rollout in batch]
        for turn in range(len(steps[0])):
            chats = [
                protocol.transcript(image, rollout["expression"], own[: turn + 1], lambda i, b: draw_box(i, b, style))
                for image, rollout, own in zip(shown, batch, steps, strict=True)
            ]
            for own, value in zip(steps, answer_likelihoods(student, chats), strict=True):
                own[turn]["likelihood"] = value if own[turn]["box"] else None
            for chat, image, own in zip(chats, shown, steps, strict=True):
                chat.append(protocol.feedback(draw_box(image, own[turn]["box"], style), own[turn]["box"]))
            logits = _logits(student, chats, lead, logits_to_keep=1)[:, -1, pair]
            for own, value in zip(steps, torch.softmax(logits.float(), -1)[:, 0].tolist(), strict=True):
                own[turn]["fits"] = value if own[turn]["box"] else None
        return [{**rollout, "steps": own} for rollout, own in zip(batch, steps, strict=True)]

    return each_batch(ask, len(rollouts), batch_size, progress)


def calibration(rollouts, *, seed: int, n_resamples: int) -> list[dict]:
    """Return, for each step, how well "fits" and "likelihood" tell its right boxes (IoU >= 0.5) from its wrong ones.

    A row: {"step", "right" (share of right boxes), "said" (mean of "fits"), "fits" and "likelihood", each {"r",
    "auroc"}}, all cells of `metrics`. "r" is Pearson's correlation with correctness; "auroc" the chance that a right
    box has the higher value (Mann and Whitney). "n" counts the step's boxes. A value is None where all boxes are right
    or all wrong, and so are the limits where that happens in a resample. Steps are not pooled: see notebook 6.
    """
    rows, chance = [], {"seed": seed, "n_resamples": n_resamples}
    for step, ious in enumerate(metrics.iou_matrix(rollouts).T):
        has_box = np.array([r["steps"][step]["box"] is not None for r in rollouts])
        right, images = (ious >= 0.5) & has_box, [r["image_id"] for r in rollouts]
        fits, likelihood = (np.array([r["steps"][step][name] or 0.0 for r in rollouts]) for name in SIGNALS)
        share, said = metrics.intervals([right, fits * has_box], [has_box] * 2, images, **chance)
        told = {name: _tells(values[has_box], right[has_box], np.array(images)[has_box], **chance)
                for name, values in zip(SIGNALS, (fits, likelihood), strict=True)}  # fmt: skip
        rows.append({"step": step, "right": share, "said": said, **told})
    return rows


def _tells(values, right, images, *, seed: int, n_resamples: int) -> dict:
    """Return the cells "r" and "auroc" of one signal at one step, from an array each."""
    count = len(set(images))
    image = np.unique(images, return_inverse=True)[1]
    draws = np.random.default_rng(seed).integers(0, max(count, 1), (n_resamples, count))
    # How often each box counts: once in the first row, in a resample as often as its image is drawn.
    weights = np.array([np.ones(count), *(np.bincount(draw, minlength=count) for draw in draws)])[:, image]
    cells = {}
    for name, found in (("r", _pearson(values, right, weights)), ("auroc", _auroc(values, right, weights))):
        low, high = np.percentile(found[1:], [2.5, 97.5]) if count > 1 else (np.nan, np.nan)
        limits = {"value": found[0], "low": low, "high": high}
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
    """Return the chance that a right box has the higher value, under each row of weights; NaN without both kinds."""
    ones, others = values[right][:, None], values[~right]
    higher = (ones > others) + 0.5 * (ones == others)
    weight, against = weights[:, right], weights[:, ~right]
    with np.errstate(invalid="ignore"):
        return ((weight @ higher) * against).sum(axis=1) / (weight.sum(axis=1) * against.sum(axis=1))


def answer_likelihoods(student: Student, chats: list[list[dict]]) -> list[float]:
    """Return the mean log-probability (nats a token) of each chat's last box: its JSON and the end of the turn."""
    import torch

    tokenizer = student.processor.tokenizer
    texts = [chat[-1]["content"][0]["text"] + "<|im_end|>" for chat in chats]
    sizes = [len(tokenizer(text[max(0, text.rfind("{")) :])["input_ids"]) for text in texts]
    answers = [torch.tensor(tokenizer(text)["input_ids"][-n:]) for text, n in zip(texts, sizes, strict=True)]
    longest = max(map(len, answers))
    # The chat before its last answer, then the answer, with the padding on the left: boxes end at the last position.
    logits = _logits(student, [chat[:-1] for chat in chats], texts, logits_to_keep=longest + 1)
    likelihoods = torch.log_softmax(logits.float(), -1)
    means = []
    for row, ids in zip(likelihoods, answers, strict=True):
        at = row[-len(ids) - 1 : -1]
        means.append(at.gather(1, ids[:, None].to(at.device)).mean().item())
    return means


def _logits(student: Student, chats, continuation, **options):
    """Return the logits of the chats, each continued by the assistant with the text (or its own text) given."""
    import torch

    processor = student.processor
    continuations = [continuation] * len(chats) if isinstance(continuation, str) else continuation
    texts = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    images = [[part["image"] for message in chat for part in message["content"] if "image" in part] for chat in chats]
    inputs = processor(
        text=[text + more for text, more in zip(texts, continuations, strict=True)], images=images, padding=True,
        padding_side="left", return_tensors="pt",
    ).to(student.model.device)  # fmt: skip
    with torch.inference_mode(), memory_advice("asking for confidence", "batch_size", "max_pixels"):
        return student.model(**inputs, **options).logits

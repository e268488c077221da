"""How sure the student is: of an answer it gave, and of a box that it is shown (the paper's second version).

The paper asks the model whether the drawn box fits. Our traces answer that question anyway: "It fits: keep it." or "It
is ...". So the student's verification is the probability of the first against the second as its next words. A student
that was never trained with traces has not learnt what they mean; its numbers are reported all the same.
"""

import warnings
from os.path import commonprefix

import numpy as np
from scipy.stats import DegenerateDataWarning, bootstrap, rankdata

from ivt_utils import metrics, protocol
from ivt_utils.datasets import numbered
from ivt_utils.distributed import each_batch
from ivt_utils.hardware import memory_advice
from ivt_utils.render import draw_box, load_image
from ivt_utils.student import Student


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


def calibration(rollouts, *, bins: int = 10, seed: int, n_resamples: int) -> dict:
    """Return how well "fits" tells a right box (IoU >= 0.5) from a wrong one, over all steps that have a box.

    "r": Pearson's correlation with correctness; "auroc": the chance that a right box has the higher "fits" (Mann and
    Whitney); both cells with a 95% bootstrap interval by image, None where all boxes are right or all wrong. "bins":
    for each tenth of "fits" its mean and the share that is right, cells; "n" counts steps.
    """
    ious = metrics.iou_matrix(rollouts)
    rows = [(step["fits"], value >= 0.5, rollout["image_id"]) for rollout, values in zip(rollouts, ious, strict=True)
            for step, value in zip(rollout["steps"], values, strict=True) if step["box"]]  # fmt: skip
    if not rows:
        return {"bins": [], **dict.fromkeys(("r", "auroc"), {"value": None, "low": None, "high": None, "n": 0})}
    said, right, images = (np.array(column) for column in zip(*rows, strict=True))
    place = np.minimum((said * bins).astype(int), bins - 1)
    within = [place == k for k in range(bins) if (place == k).any()]
    shares = metrics.intervals([right & w for w in within], within, images, seed=seed, n_resamples=n_resamples)
    found = {"bins": [{"fits": float(said[w].mean()), "right": share} for w, share in zip(within, shares, strict=True)]}
    members = [np.flatnonzero(images == image) for image in np.unique(images)]
    for name, score in (("r", _pearson), ("auroc", _auroc)):

        def of_images(chosen, score=score):
            at = np.concatenate([members[i] for i in chosen])
            return score(said[at], right[at])

        value, low, high = of_images(range(len(members))), np.nan, np.nan
        if len(members) > 1 and not np.isnan(value):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DegenerateDataWarning)
                low, high = bootstrap(
                    (np.arange(len(members)),), of_images, vectorized=False, n_resamples=n_resamples,
                    method="percentile", rng=np.random.default_rng(seed),
                ).confidence_interval  # fmt: skip
        limits = {"value": value, "low": low, "high": high}
        found[name] = {k: None if np.isnan(v) else float(v) for k, v in limits.items()} | {"n": len(said)}
    return found


def _pearson(said, right) -> float:
    varies = right.any() and not right.all() and np.ptp(said) > 0
    return np.corrcoef(said, right)[0, 1] if varies else np.nan


def _auroc(said, right) -> float:
    ones = right.sum()
    if ones in (0, len(right)):
        return np.nan
    return (rankdata(said)[right].sum() - ones * (ones + 1) / 2) / (ones * (len(right) - ones))


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

"""A VLM as teacher (section 3 of the paper): it writes the traces, over any OpenAI-compatible API.

What it writes is checked against the boxes. A refused answer is asked for again, and in the end the geometric teacher
stands in. Every answer is kept under the content of its request, so an interrupted run pays for nothing twice.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from ivt_utils import protocol
from ivt_utils.harvest import trajectory
from ivt_utils.overlay import draw_box, load_image
from ivt_utils.paper_scale.served import Endpoint, data_url, kept
from ivt_utils.paper_scale.trace_check import objection, tidy
from ivt_utils.records import numbered
from ivt_utils.runtime.files import ArtefactError
from ivt_utils.schema import Record, Rollout
from ivt_utils.teacher import geometric_trace

FIRST = 20  # rollouts after which a teacher without one accepted answer is stopped
FINE = {"quality": 95, "subsampling": 0}  # of a JPEG
PROMPT = (
    "Someone looks for this object: {expression}. The first image is the plain one; in the second one, the box that "
    "they have drawn is shown in red. For you alone, as [x1, y1, x2, y2] in thousandths of the image, x to the right "
    "and y down: the red box is {box}, and it should become {truth}. In one or two sentences, write what they should "
    "think on seeing the red box: what it covers, what is wrong with it, and what to do. Name the largest error, and "
    "use only these words for errors and changes: {words}. Speak of the box as a whole, not of its edges. Write no "
    "digits, no coordinates, no JSON, and nothing that shows that you know the box it should become."
)
AGAIN = " Your last answer was refused, for it {refused}. Write another one."


def first_accepted(image, expression: str, box, truth, profile, model: str, answer_to) -> tuple[str | None, int]:
    """Return the first answer that stands up to `objection`, or None, and how many tries are left to be asked for.

    `answer_to(key, text, images)` returns an answer or, when there is none yet, None. The key is the SHA-256 of all
    that the answer depends on: model, text, the pixels of both images, sampling values, and the number of the try.
    """
    images, refused = (image, draw_box(image, box)), ""
    numbers = {name: str([round(v) for v in values]) for name, values in (("box", box), ("truth", truth))}
    words = "; ".join(f"{problem}: {advice}" for problem, advice in protocol.PROBLEMS.items())
    for attempt in range(profile.teacher_tries):
        text = PROMPT.format(expression=expression, words=words, **numbers)
        text += AGAIN.format(refused=refused) if refused else ""
        values = [model, text, attempt, profile.teacher_tokens, profile.teacher_temperature, image.size]
        digest = hashlib.sha256(json.dumps(values).encode())
        for shown in images:
            digest.update(shown.tobytes())
        answer = answer_to(digest.hexdigest(), text, images)
        if answer is None:
            return None, profile.teacher_tries - attempt
        refused = objection(answer, box, truth)
        if not refused:
            return tidy(answer), 0
    return None, 0


class VlmTeacher(Endpoint):
    """A VLM behind an OpenAI-compatible API."""

    # A hosted filter dislikes this image or text, or the server has no room for it: true of every try.
    empty = ("content_", "context_length")

    def trace_for(self, record: Record, stood_in: list | None = None):
        """Return the teacher of one record, with the signature of `geometric_trace`.

        Where the VLM has no acceptable answer, the geometric teacher gives the trace, and the box goes to `stood_in`.
        """
        image = bounded(record, self.profile)

        def trace(box, truth) -> str:
            expression = record["expression"]
            answer, _ = first_accepted(image, expression, box, truth, self.profile, self.model, self.answer_to)
            if answer is None and stood_in is not None:
                stood_in.append(box)
            return geometric_trace(box, truth) if answer is None else answer

        return trace

    def answer_to(self, key: str, text: str, images) -> str:
        """Return the VLM's answer to a request, as `answered` does; what is no chat completion counts as empty."""

        def request():
            parts = [{"type": "image_url", "image_url": {"url": data_url(image, "JPEG", **FINE)}} for image in images]
            return {
                "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}],
                "max_completion_tokens": self.profile.teacher_tokens,
                "temperature": self.profile.teacher_temperature,
            }

        return self.answered(key, request) or ""


def bounded(record, profile):
    """Return a record's image, at most `profile.max_pixels` large, as the student sees it."""
    image = load_image(record["image"])
    excess = image.width * image.height / profile.max_pixels if profile.max_pixels else 1
    return image if excess <= 1 else image.resize([int(side / excess**0.5) for side in image.size])


def teach(
    rollouts: list[Rollout], records, profile, *, base_url: str, model: str, cache: Path, progress: str = ""
) -> list[dict]:
    """Return one trajectory a rollout, in order, with the model's name ("teacher") and the number of traces that the
    geometric teacher had to give ("stood_in").

    `profile.teacher_workers` requests at a time. An ArtefactError says what stopped the teacher.
    """
    from tqdm.auto import tqdm

    teacher, numbers = VlmTeacher(profile, base_url=base_url, model=model, cache=cache), numbered(records)
    settings = {name: getattr(profile, name) for name in ("teacher_tokens", "teacher_tries", "teacher_temperature")}

    def taught(rollout):
        stood_in: list = []
        with teacher.lock:  # images are read from disk one at a time
            trace = teacher.trace_for(records[numbers[rollout["id"]]], stood_in)
        taught = trajectory(rollout, profile.turns, profile.grid, trace)
        return {**taught, "teacher": model, "stood_in": len(stood_in), **settings}

    pool = ThreadPoolExecutor(profile.teacher_workers)
    try:
        futures = [pool.submit(taught, rollout) for rollout in rollouts]
        finished = tqdm(as_completed(futures), progress, len(rollouts), unit="rollout", disable=not progress)
        good = 0
        for number, future in enumerate(finished, 1):
            result = future.result()
            good += result["stood_in"] < len(result["steps"]) - 1
            if number == FIRST and not good:
                raise ArtefactError(
                    f"Not one answer about the first {FIRST} rollouts stood up to the check; look at "
                    f"them in {cache}, take another model, or raise teacher_tokens."
                )
        return [future.result() for future in futures]
    finally:  # requests that are under way are waited for, and their answers kept
        teacher.stopped.set()
        pool.shutdown(cancel_futures=True)
        teacher.client.close()


def budget(rollouts: list[Rollout], records, profile, model: str, cache: Path) -> str:
    """Return what `teach` is about to ask for, in one line: traces, requests and tokens, as far as can be told before.

    Tokens are estimated: one for 32 x 32 pixels of an image, one for four letters, and as many as an answer may have.
    """
    numbers, traces, known, fewest, most, tokens = numbered(records), 0, 0, 0, 0, 0
    for rollout in rollouts:
        record, shown = records[numbers[rollout["id"]]], {}
        trajectory(rollout, profile.turns, profile.grid, lambda box, truth, to=shown: to.update({tuple(box): truth}))
        image, asked = bounded(record, profile), []

        def answer_to(key, text, images, asked=asked):
            asked.append(text)
            return kept(cache, key)

        for box, truth in shown.items():
            _, left = first_accepted(image, record["expression"], box, truth, profile, model, answer_to)
            traces, known, fewest, most = traces + 1, known + (not left), fewest + (left > 0), most + left
            if left:
                tokens += 2 * image.width * image.height // 1024 + len(asked[-1]) // 4 + profile.teacher_tokens
    each = round(tokens / fewest) if fewest else 0
    return (
        f"{traces} traces for {len(rollouts)} rollouts, {known} of them in the cache: {fewest} to {most} requests "
        f"to {model}, of about {each} tokens, {fewest * each:,} to {most * each:,} in all."
    )

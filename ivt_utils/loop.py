"""The closed loop (section 3 of the paper): answer, see the box drawn on the image, answer again, T times.

One committed answer a step. An answer that does not parse has no box and scores 0; the next feedback then shows the
bare image and says so.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ivt_utils import protocol
from ivt_utils.boxes import Box, parse_answer, snap
from ivt_utils.methods import longer
from ivt_utils.metrics import first_steps
from ivt_utils.overlay import draw_box, load_image
from ivt_utils.records import numbered
from ivt_utils.runtime.distributed import each_batch
from ivt_utils.runtime.hardware import memory_advice
from ivt_utils.schema import Record, Rollout
from ivt_utils.student import Student, read_chats


@dataclass(frozen=True)
class Turn:
    """How a loop asks again.

    `ask(chat, image, expression, last, shown)` returns the chat that is answered next: `chat` is the one that was
    answered last, with the step `last` {"text", "box"}; `shown` is the box to show, 0..1000, or None.
    `read(text, shown)` returns the box of the answer in the whole image, or None.
    """

    ask: Callable[..., list[dict]]
    read: Callable[[str, Box | None], Box | None]


def feedback_turn(style: str = "filled", words: str = "feedback") -> Turn:
    """Return the turn of the paper: the chat goes on with the image on which the box is drawn.

    `words`: "feedback", or "question" for the first question again.
    """

    def ask(chat, image, expression, last, shown):
        drawn = draw_box(image, shown, style)
        again = protocol.question(drawn, expression) if words == "question" else protocol.feedback(drawn, last["box"])
        return [*chat, protocol.answer(last["text"]), again]

    return Turn(ask, lambda text, shown: parse_answer(text))


def run_loop(
    student: Student,
    records,
    *,
    turns: int,
    style: str,
    next_turn: Turn | None = None,
    batch_size: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    progress: str = "",
    first: list[Rollout] | None = None,
    shown: list | None = None,
) -> list[Rollout]:
    """Return one rollout a record: {"id", "image_id", "subset", "expression", "truth", "steps"}.

    `steps` holds `turns` + 1 dicts {"text", "box"}; a box is four integers 0..1000, or None. Decoding is greedy when
    `temperature` is 0. The control that shows the image again without a box is `style="none"`.

    `next_turn`: how the loop asks again, in place of the paper's `feedback_turn(style)`. `first`: rollouts whose step 0
    is taken over, so that only the later steps are asked for; then these are returned, with their new steps. `shown`:
    one box (0..1000) a record, or None for the bare image, that each turn shows in place of the last answer's.
    """
    if turns < 0:
        raise ValueError(f"A loop has 0 or more refinements, not {turns}.")
    ask_again = next_turn or feedback_turn(style)
    numbers = {} if first is None else numbered(records)
    places = range(len(records)) if first is None else [numbers[rollout["id"]] for rollout in first]

    def answer(start, stop):
        batch = [records[place] for place in places[start:stop]]
        begun = [_rollout(record) for record in batch] if first is None else first[start:stop]
        images = [load_image(record["image"]) for record in batch]
        chats = [[protocol.question(image, r["expression"])] for image, r in zip(images, batch, strict=True)]
        steps, boxes, earlier = [rollout["steps"][:1] for rollout in begun], [None] * len(batch), {}
        for count in range(len(steps[0]), turns + 1):
            if count:
                boxes = shown[start:stop] if shown else [own[-1]["box"] for own in steps]
                turns_asked = zip(chats, images, batch, steps, boxes, strict=True)
                chats = [
                    ask_again.ask(chat, image, record["expression"], own[-1], box)
                    for chat, image, record, own, box in turns_asked
                ]
            texts = generate(student, chats, max_new_tokens, temperature, seed + start + count, earlier)
            for own, box, text in zip(steps, boxes, texts, strict=True):
                own.append({"text": text, "box": ask_again.read(text, box) if count else parse_answer(text)})
        return [{**rollout, "steps": own} for rollout, own in zip(begun, steps, strict=True)]

    return each_batch(answer, len(places), batch_size, progress)


def evaluate(student: Student, records, profile, seed: int = 0, progress: str = "", **changes) -> list[Rollout]:
    """Return `run_loop` with the profile's values, save for `changes` (turns, style, temperature, ...)."""
    values = {name: getattr(profile, name) for name in ("turns", "style", "batch_size", "max_new_tokens")}
    return run_loop(student, records, seed=seed, progress=progress, **(values | changes))


def both_lengths(run, name: str, student, records) -> list[Rollout]:
    """Return the rollouts of the stage `name`, T = `profile.turns`: the first steps of the stage `<name>_long`.

    Decoding is greedy, so a loop of `profile.long_turns` refinements begins as the shorter one does. `student()` loads
    the student, where it is needed. A profile whose `long_turns` is no more than `turns` has the short loop alone.
    """
    profile = run.profile

    def answered(turns):
        return evaluate(student(), records, profile, run.seed, name, turns=turns)

    if profile.long_turns <= profile.turns:  # there is no longer loop
        return run.rollouts(name, lambda: answered(profile.turns))
    long = run.rollouts(longer(name), lambda: answered(profile.long_turns))
    return run.rollouts(name, lambda: first_steps(long, profile.turns + 1))


def sampled_answers(student: Student, records, profile, seed: int = 0, progress: str = "") -> list[Rollout]:
    """Return rollouts whose steps are as many sampled first answers as the profile's loop gives: T + 1, no loop."""
    each = [
        evaluate(student, records, profile, seed + 1000 * k, progress, turns=0, temperature=profile.temperature)
        for k in range(profile.turns + 1)
    ]
    return [{**same[0], "steps": [rollout["steps"][0] for rollout in same]} for same in zip(*each, strict=True)]


def answer_again(
    student: Student,
    records,
    rollouts: list[Rollout],
    shown: list,
    profile,
    *,
    style: str = "filled",
    words: str = "feedback",
    progress: str = "",
) -> list[Rollout]:
    """Return the rollouts with two steps: their step 0, and the answer to one turn that shows a given box.

    `shown`: one box (0..1000) a rollout, which is drawn on the image of that turn, or None for the bare image.
    `words`: as in `feedback_turn`; those of the feedback stay what they are for a drawn box. The second step also holds
    the box that was shown ("shown"). Greedy decoding.
    """
    rollouts_after = evaluate(
        student,
        records,
        profile,
        progress=progress,
        turns=1,
        next_turn=feedback_turn(style, words),
        first=rollouts,
        shown=shown,
    )
    for rollout, box in zip(rollouts_after, shown, strict=True):
        rollout["steps"][1]["shown"] = box
    return rollouts_after


def answers_from(student: Student, record: Record, box, profile) -> Rollout:
    """Return the rollout that goes on from a box (0..1000) that somebody else gave as the answer of step 0.

    The box is put on the student's grid. Then come `profile.turns` refinements by the student; greedy decoding.
    """
    box = snap(box, student.grid)
    start = _rollout(record) | {"steps": [{"text": protocol.answer_text(box), "box": box}]}
    return evaluate(student, [record], profile, first=[start])[0]


def generate(
    student: Student,
    chats: list[list[dict]],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    earlier: dict | None = None,
) -> list[str]:
    """Return the next answer of each chat, as text without special tokens.

    `earlier`: an empty dict at the first turn of a loop, and the same one at its later turns. It holds what the model
    has computed of each chat and the processor of each image, so that a chat that goes on is only read where it is new.
    """
    if student.served:
        return student.served(chats, max_new_tokens, temperature, seed)
    import torch

    with each_image_once(student.processor, {} if earlier is None else earlier):
        inputs = read_chats(student, chats)
    sampling = {"do_sample": False}
    if temperature > 0:
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.inference_mode(), memory_advice("answering", "most_at_once and batch_size", "max_pixels"):
        inputs = continued(student, inputs, earlier or {}) or inputs
        output = student.model.generate(
            **inputs, max_new_tokens=max_new_tokens, return_dict_in_generate=True, **sampling
        )
    tokenizer, cache = student.processor.tokenizer, output.past_key_values
    answers = output.sequences[:, inputs["input_ids"].shape[1] :]
    if earlier is not None and cache is not None:
        ends = (answers == tokenizer.eos_token_id) | (answers == tokenizer.pad_token_id)
        words = (~ends).long().cumprod(-1)  # the end of the turn is read with the next one
        remember(
            earlier,
            cache,
            output.sequences,
            torch.cat([inputs["attention_mask"], words], -1),
            torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(words)], -1),
        )
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


@contextmanager
def each_image_once(processor, earlier: dict):
    """Let the processor prepare an image once, however often it stands in the chats of a loop; `earlier` keeps it."""
    import torch
    from transformers import BatchFeature

    prepare, known = processor.image_processor, earlier.setdefault("images", {})  # {id: (image, its pixels, grid)}

    class Prepared:
        def __getattr__(self, name):
            return getattr(prepare, name)

        def __call__(self, images, **options):
            every = [image for chat in images for image in chat]
            fresh = list({id(image): image for image in every if id(image) not in known}.values())
            if fresh:
                made = prepare(fresh, **options)
                grids = made["image_grid_thw"]
                pieces = torch.split(made["pixel_values"], grids.prod(-1).tolist())
                known.update({id(row[0]): row for row in zip(fresh, pieces, grids, strict=True)})
            _, pieces, grids = zip(*(known[id(image)] for image in every), strict=True)
            return BatchFeature({"pixel_values": torch.cat(pieces), "image_grid_thw": torch.stack(grids)})

    processor.image_processor = Prepared()
    try:
        yield
    finally:
        processor.image_processor = prepare


def remember(earlier: dict, cache, input_ids, attention_mask, mm_token_type_ids) -> None:
    """Note in `earlier` what was read of chats: the cache and, of the tensors (chat, token), as much as it covers."""
    length = cache.get_seq_length()
    earlier |= {
        "cache": cache,
        "input_ids": input_ids[:, :length],
        "attention_mask": attention_mask[:, :length],
        "mm_token_type_ids": mm_token_type_ids[:, :length],
    }


def continued(student: Student, inputs, earlier: dict):
    """Return the inputs of chats that go on from `earlier`, with its cache; None where they do not, or it has none.

    What is new of a chat stands behind all that was read, with padding between them, and only its images are encoded.
    """
    import torch

    if "cache" not in earlier:
        return None
    tokenizer, begins = student.processor.tokenizer, student.processor.vision_start_token_id
    counts = (inputs["input_ids"] == begins).sum(-1).tolist()
    grids = torch.split(inputs["image_grid_thw"], counts)
    pixels = torch.split(inputs["pixel_values"], [int(grid.prod(-1).sum()) for grid in grids])
    fresh, images = [], {"pixel_values": [], "image_grid_thw": []}
    for row, (grid, pixel) in enumerate(zip(grids, pixels, strict=True)):
        whole = inputs["attention_mask"][row].bool()
        ids, kinds = inputs["input_ids"][row][whole], inputs["mm_token_type_ids"][row][whole]
        known = earlier["input_ids"][row][earlier["attention_mask"][row].bool()]
        if len(ids) <= len(known) or not torch.equal(ids[: len(known)], known):
            return None
        ids, kinds = ids[len(known) :], kinds[len(known) :]
        fresh.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds})
        grid = grid[len(grid) - int((ids == begins).sum()) :]
        images["image_grid_thw"].append(grid)
        images["pixel_values"].append(pixel[len(pixel) - int(grid.prod(-1).sum()) :])
    width = max(len(row["input_ids"]) for row in fresh)
    filling = {"input_ids": tokenizer.pad_token_id, "attention_mask": 0, "mm_token_type_ids": 0}

    def padded(name, value):
        pad = torch.nn.functional.pad
        return torch.stack([pad(row[name], (width - len(row[name]), 0), value=value) for row in fresh])

    seen = {name: torch.cat(values) for name, values in images.items()}
    return {
        **{name: torch.cat([earlier[name], padded(name, value)], -1) for name, value in filling.items()},
        "image_grid_thw": inputs["image_grid_thw"],
        "past_key_values": earlier["cache"],
        "mm_encoder_outputs": {"image": student.model.get_image_features(**seen, return_dict=True)},
    }


def _rollout(record: Record) -> Rollout:
    """Return the rollout of a record before its first step."""
    truth = [float(str(np.float32(v))) for v in record["bbox"]]  # as few decimals as tell its 32 bits from others
    return {
        "id": record["id"],
        "image_id": record["image_id"],
        "subset": record["subset"],
        "expression": record["expression"],
        "truth": truth,
        "steps": [],
    }

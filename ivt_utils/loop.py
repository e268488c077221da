"""The closed loop (section 3 of the paper): answer, see the box drawn on the image, answer again, T times.

One committed answer a step. An answer that does not parse has no box and scores 0; the next feedback then shows the
bare image and says so.
"""

import numpy as np

from ivt_utils import protocol
from ivt_utils.boxes import from_view, parse_answer, snap, view
from ivt_utils.metrics import first_steps
from ivt_utils.overlay import closer_look, draw_box, load_image
from ivt_utils.records import numbered
from ivt_utils.runtime.distributed import each_batch
from ivt_utils.runtime.hardware import memory_advice
from ivt_utils.student import Student


def run_loop(
    student: Student, records, *, turns: int = 2, style: str = "filled", batch_size: int = 64,
    max_new_tokens: int = 32, temperature: float = 0.0, seed: int = 0, progress: str = "", zoom: float | None = None,
) -> list[dict]:  # fmt: skip
    """Return one rollout a record: {"id", "image_id", "subset", "expression", "truth", "steps"}.

    `steps` holds `turns` + 1 dicts {"text", "box"}; a box is four integers 0..1000, or None. Decoding is greedy when
    `temperature` is 0. The control that shows the image again without a box is `style="none"`.

    A `zoom` makes it another loop (ours, see `closer`): no box is drawn and nothing is remembered; the first question
    is asked again about a closer look around the last box, and `box` is the answer's place in the whole image.
    """
    if turns < 0:
        raise ValueError(f"A loop has 0 or more refinements, not {turns}.")

    def answer(start, stop):
        batch = [records[i] for i in range(start, stop)]
        images = [load_image(record["image"]) for record in batch]
        chats = [[protocol.question(image, r["expression"])] for image, r in zip(images, batch, strict=True)]
        steps: list[list[dict]] = [[] for _ in batch]
        earlier = {} if zoom is None else None
        for turn in range(turns + 1):
            texts = generate(student, chats, max_new_tokens, temperature, seed + start + turn, earlier)
            for record, chat, own, image, text in zip(batch, chats, steps, images, texts, strict=True):
                box = parse_answer(text)
                if zoom is not None and own and box:
                    box = from_view(box, view(own[-1]["box"], zoom))
                own.append({"text": text, "box": box})
                if zoom is not None:
                    chat[:] = [protocol.question(closer_look(image, box, zoom), record["expression"])]
                else:
                    chat += [protocol.answer(text), protocol.feedback(draw_box(image, box, style), box)]
        return [_rollout(record, own) for record, own in zip(batch, steps, strict=True)]

    return each_batch(answer, len(records), batch_size, progress)


def evaluate(student: Student, records, profile, seed: int = 0, progress: str = "", **changes) -> list[dict]:
    """Return `run_loop` with the profile's values, save for `changes` (turns, style, temperature, ...)."""
    values = {name: getattr(profile, name) for name in ("turns", "style", "batch_size", "max_new_tokens")}
    return run_loop(student, records, seed=seed, progress=progress, **(values | changes))


def both_lengths(run, name: str, student, records) -> list[dict]:
    """Return the rollouts of the stage `name`, T = `profile.turns`: the first steps of the stage `<name>_long`.

    Decoding is greedy, so a loop of `profile.long_turns` refinements begins as the shorter one does. `student()` loads
    the student, where it is needed. A profile whose `long_turns` is no more than `turns` has the short loop alone.
    """
    profile = run.profile

    def answered(turns):
        return evaluate(student(), records, profile, run.seed, name, turns=turns)

    if profile.long_turns <= profile.turns:  # there is no longer loop
        return run.rollouts(name, lambda: answered(profile.turns))
    long = run.rollouts(f"{name}_long", lambda: answered(profile.long_turns))
    return run.rollouts(name, lambda: first_steps(long, profile.turns + 1))


def sampled_answers(student: Student, records, profile, seed: int = 0, progress: str = "") -> list[dict]:
    """Return rollouts whose steps are as many sampled first answers as the profile's loop gives: T + 1, no loop."""
    each = [evaluate(student, records, profile, seed + 1000 * k, progress, turns=0, temperature=profile.temperature)
            for k in range(profile.turns + 1)]  # fmt: skip
    return [{**same[0], "steps": [rollout["steps"][0] for rollout in same]} for same in zip(*each, strict=True)]


def answer_again(
    student: Student, records, rollouts: list[dict], shown: list, *, style: str = "filled", words: str = "feedback",
    batch_size: int = 64, max_new_tokens: int = 32, progress: str = "",
) -> list[dict]:  # fmt: skip
    """Return the rollouts with two steps: their step 0, and the answer to a second turn that is made here.

    `shown`: one box (0..1000) a rollout, which is drawn on the image of that turn, or None for the bare image.
    `words`: "feedback", which stays that of a drawn box, or "question": the first question again. The second step also
    holds the box that was shown ("shown"). Greedy decoding.
    """
    numbers, pairs = numbered(records), list(zip(rollouts, shown, strict=True))

    def answer(start, stop):
        batch, chats, answered = pairs[start:stop], [], []
        for rollout, box in batch:
            image, first = load_image(records[numbers[rollout["id"]]]["image"]), rollout["steps"][0]
            question, picture = protocol.question(image, rollout["expression"]), draw_box(image, box, style)
            if words == "question":
                second = protocol.question(picture, rollout["expression"])
            else:
                second = protocol.feedback(picture, first["box"])
            chats.append([question, protocol.answer(first["text"]), second])
        texts = generate(student, chats, max_new_tokens, 0.0, 0)
        for (rollout, box), text in zip(batch, texts, strict=True):
            again = {"text": text, "box": parse_answer(text), "shown": box}
            answered.append({**rollout, "steps": [rollout["steps"][0], again]})
        return answered

    return each_batch(answer, len(rollouts), batch_size, progress)


def answers_from(student: Student, record: dict, box, profile) -> dict:
    """Return the rollout that goes on from a box (0..1000) that somebody else gave as the answer of step 0.

    The box is put on the student's grid. Then come `profile.turns` refinements by the student; greedy decoding.
    """
    image, box = load_image(record["image"]), snap(box, student.grid)
    steps = [{"text": protocol.answer_text(box), "box": box}]
    for _ in range(profile.turns):
        chat = protocol.transcript(image, record["expression"], steps, lambda i, b: draw_box(i, b, profile.style))
        chat.append(protocol.feedback(draw_box(image, box, profile.style), box))
        text = generate(student, [chat], profile.max_new_tokens, 0.0, 0)[0]
        box = parse_answer(text)
        steps.append({"text": text, "box": box})
    return _rollout(record, steps)


def generate(
    student: Student, chats: list[list[dict]], max_new_tokens: int, temperature: float, seed: int,
    earlier: dict | None = None,
) -> list[str]:  # fmt: skip
    """Return the next answer of each chat, as text without special tokens.

    `earlier`: an empty dict at the first turn of a loop, and the same one at its later turns. It holds what the model
    has computed of each chat, so that a chat that goes on is only read where it is new.
    """
    import torch

    inputs = student.processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    ).to(student.model.device)  # fmt: skip
    sampling = {"do_sample": False}
    if temperature > 0:
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with torch.inference_mode(), memory_advice("answering", "batch_size", "max_pixels"):
        if earlier:
            inputs = continued(student, inputs, earlier) or inputs
        output = student.model.generate(
            **inputs, max_new_tokens=max_new_tokens, return_dict_in_generate=True, **sampling)  # fmt: skip
    tokenizer, cache = student.processor.tokenizer, output.past_key_values
    answers = output.sequences[:, inputs["input_ids"].shape[1] :]
    if earlier is not None and cache is not None:
        ends = (answers == tokenizer.eos_token_id) | (answers == tokenizer.pad_token_id)
        words = (~ends).long().cumprod(-1)  # the end of the turn is read with the next one
        remember(
            earlier, cache, output.sequences, torch.cat([inputs["attention_mask"], words], -1),
            torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(words)], -1),
        )  # fmt: skip
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


def remember(earlier: dict, cache, input_ids, attention_mask, mm_token_type_ids) -> None:
    """Note in `earlier` what was read of chats: the cache and, of the tensors (chat, token), as much as it covers."""
    length = cache.get_seq_length()
    earlier |= {
        "cache": cache, "input_ids": input_ids[:, :length], "attention_mask": attention_mask[:, :length],
        "mm_token_type_ids": mm_token_type_ids[:, :length],
    }  # fmt: skip


def continued(student: Student, inputs, earlier: dict):
    """Return the inputs of chats that go on from `earlier`, with its cache; None where one of them does not.

    What is new of a chat stands behind all that was read, with padding between them, and only its images are encoded.
    """
    import torch

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
        "image_grid_thw": inputs["image_grid_thw"], "past_key_values": earlier["cache"],
        "mm_encoder_outputs": {"image": student.model.get_image_features(**seen, return_dict=True)},
    }  # fmt: skip


def _rollout(record: dict, steps: list[dict]) -> dict:
    kept = {key: record[key] for key in ("id", "image_id", "subset", "expression")}
    truth = [float(str(np.float32(v))) for v in record["bbox"]]  # as few decimals as tell its 32 bits from others
    return {**kept, "truth": truth, "steps": steps}

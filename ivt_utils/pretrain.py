"""Training of the micro student from scratch, on scenes made on the fly (never on the benchmark's images).

The student learns to answer: one or several questions about an image, over one or several images in a chat, so that
a second image is nothing new to it. It never sees a box drawn on an image, nor the feedback prompt: those are what
the course teaches. What makes this work on two cores is in `data/student/README.md`.
"""

import json
import random
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from pathlib import Path

from ivt_utils import protocol, scenes, student
from ivt_utils.artefacts import checksum, replace_folder, write_text
from ivt_utils.boxes import snap
from ivt_utils.profiles import STUDENT_RECIPE

AHEAD = 3  # batches made ahead of use; the curriculum's level is fixed when a batch is ordered
_processor = None  # one a worker process


def sample_chat(rng: random.Random, level: int, images: int, questions: int) -> tuple[list[dict], list]:
    """Return one training chat, and the scenes of its images in order.

    It has `images` scenes of at most `level` things and up to `questions` questions on each. A further image is
    another scene or, half of the time, the same one again with new questions.
    """
    messages: list[dict] = []
    shown = []
    scene = subset = picture = None
    for _ in range(images):
        pairs = []
        if scene is not None and rng.random() < 0.5:
            pairs = [pair for _ in range(questions) if (pair := scenes.sample_expression(rng, scene, subset))]
        if not pairs:
            plain = level < STUDENT_RECIPE.plain_below
            subset = "plain" if plain else rng.choice(scenes.SUBSETS)
            scene, pairs = scenes.sample_questions(rng, subset, rng.randint(max(1, level - 3), level), questions)
            pairs = list({target: (text, target) for text, target in pairs}.values())  # no answer twice to copy
            picture = scenes.draw_scene(scene)
        shown.append(scene)
        for i, (expression, target) in enumerate(pairs):
            messages.append(protocol.question(picture if i == 0 else None, expression))
            box = snap(scene.things[target].box, student.GRID)
            messages.append(protocol.answer(protocol.answer_text(box)))
    return messages, shown


def label_cells(scene: scenes.Scene, side: int) -> list[list[float]]:
    """Return what lies under the centre of each of `side` x `side` image tokens: six numbers a token, row by row.

    The colour's and the shape's index from 1 (0: background), and the box of the thing on top, as shares 0..1.
    """
    cells = []
    for row in range(side):
        for column in range(side):
            x, y = (column + 0.5) * 1000 / side, (row + 0.5) * 1000 / side
            under = [t for t in scene.things if t.box[0] <= x <= t.box[2] and t.box[1] <= y <= t.box[3]]
            top = under[-1] if under else None
            cells.append([0, 0, 0, 0, 0, 0] if top is None else [
                list(scenes.COLORS).index(top.color) + 1, scenes.SHAPES.index(top.shape) + 1,
                *(v / 1000 for v in top.box)])  # fmt: skip
    return cells


def make_batch(seed: int, step: int, level: int) -> dict:
    """Return one batch of tensors for a training step; the same for the same (seed, step, level)."""
    import torch

    global _processor
    if _processor is None:
        torch.set_num_threads(1)
        _processor = student.micro_processor()
    rng = random.Random(f"student {seed} {step}")
    # One kind of chat a batch: little padding.
    images, questions = rng.choices(STUDENT_RECIPE.chats, STUDENT_RECIPE.chat_weights)[0]
    pairs = [sample_chat(rng, level, images, questions) for _ in range(STUDENT_RECIPE.batch_size)]
    chats = [chat for chat, _ in pairs]
    texts = _processor.apply_chat_template(chats, tokenize=False)
    pictures = [[part["image"] for m in chat for part in m["content"] if "image" in part] for chat in chats]
    batch = _processor(text=texts, images=pictures, padding=True, padding_side="right", return_tensors="pt")
    batch = {key: batch[key] for key in ("input_ids", "mm_token_type_ids", "pixel_values", "image_grid_thw")}
    side = STUDENT_RECIPE.image_side // STUDENT_RECIPE.patch // 2
    cells = [cell for _, shown in pairs for scene in shown for cell in label_cells(scene, side)]
    return batch | {"cells": torch.tensor(cells)}


def answer_mask(input_ids, tokenizer):
    """Return a bool mask of the tokens the student must learn: each answer, and the end of its turn."""
    import torch

    numbers = [f"{sep}{v}" for sep in ("", ", ") for v in range(0, 1001, student.GRID)]
    ids = tokenizer.convert_tokens_to_ids([*numbers, '{"bbox_2d": [', "]}"])
    mask = torch.isin(input_ids, torch.tensor(ids))
    ends = input_ids == tokenizer.eos_token_id
    ends[:, 1:] &= mask[:, :-1]
    return mask | ends


def train_student(out: Path, seed: int = 0, scratch: Path | None = None, steps: int | None = None) -> Path:
    """Train the micro student and write model, processor, learning curve and card to `out`; resumable.

    A checkpoint goes to `scratch` (default: beside `out`) every few minutes; the same call continues from it.
    """
    import torch

    recipe = STUDENT_RECIPE
    steps = steps or recipe.steps
    scratch = scratch or out.with_name(out.name + ".training")
    processor = student.micro_processor()
    model = student.build_micro(processor, seed)
    model.cells = torch.nn.Linear(recipe.text_width, 6)  # for `_cell_loss`; thrown away at the end
    seen = {}
    model.model.visual.merger.register_forward_hook(lambda _, __, output: seen.update(tokens=output))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )
    state = {"step": 0, "level": recipe.first_things, "seconds": 0.0, "recent": [], "curve": []}
    if (scratch / "state.json").exists():
        state = _load_checkpoint(scratch, model, optimizer)
        print(f"Continuing from step {state['step']} in {scratch}.")
    print(f"Training the micro student: {steps} steps of {recipe.batch_size} chats, about an hour on two cores.")
    recent = deque(state["recent"], maxlen=recipe.window)
    words = torch.tensor(processor.tokenizer.convert_tokens_to_ids([f" {w}" for w in (*scenes.COLORS, *scenes.SHAPES)]))
    tokenizer, started, before, saved = processor.tokenizer, time.time(), state["seconds"], time.time()
    model.train()
    with ProcessPoolExecutor(1) as pool:
        ordered = deque()
        for step in range(state["step"], steps):
            while len(ordered) < AHEAD and step + len(ordered) < steps:
                ordered.append(pool.submit(make_batch, seed, step + len(ordered), state["level"]))
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * _schedule(step / steps, recipe.floor)
            batch = ordered.popleft().result()
            cells = batch.pop("cells")
            if step < recipe.vision_steps:
                model.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
                loss, coordinate, binding = 0.0, 9.9, 9.9
            else:
                loss, coordinate, binding = _loss(model, batch, tokenizer)
            naming, framing = _cell_loss(model, seen["tokens"], cells, words)
            (loss + recipe.cell_weight * (naming + 10 * framing)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
            recent.append([coordinate, binding])
            state.update(step=step + 1, seconds=before + time.time() - started, recent=list(recent))
            if (step + 1) % recipe.window == 0:
                mean, binding = (sum(column) / len(recent) for column in zip(*recent, strict=True))
                state["curve"].append([step + 1, round(mean, 4), state["level"], round(state["seconds"])])
                print(f"step {step + 1}/{steps}  {mean:.3f} nats a coordinate  binding {binding:.2f}  "
                      f"naming {naming.item():.2f}  framing {framing.item():.4f}  {state['level']} things  "
                      f"{state['seconds'] / 60:.1f} min", flush=True)  # fmt: skip
                learnt = mean < recipe.framed_below and binding < recipe.bound_below
                if learnt and state["level"] < recipe.things:
                    state["level"] += 1
            if time.time() - saved > 180 or step + 1 == steps:
                _save_checkpoint(scratch, model, optimizer, state)
                saved = time.time()
    _ship(out, model, processor, state, seed)
    return out


def _loss(model, batch: dict, tokenizer):
    """Return (mean cross-entropy of the answer tokens, nats per coordinate, nats of x1 above y1).

    The first coordinate says which thing is meant, the second only where it is: their difference is what binding
    words to things still costs (ln n for a student that picks one of n things at random).
    Padding is on the right and attention is causal, so no mask is needed; the head sees answer positions only.
    """
    import torch

    mask = answer_mask(batch["input_ids"], tokenizer)
    hidden = model.model(**batch, use_cache=False).last_hidden_state[:, :-1][mask[:, 1:]]
    targets = batch["input_ids"][:, 1:][mask[:, 1:]]
    losses = torch.nn.functional.cross_entropy(model.lm_head(hidden), targets, reduction="none")
    four = losses.detach().view(-1, 7)[:, 1:5].mean(0)  # an answer: opening, four numbers, closing, end of turn
    return losses.mean(), float(four.mean()), float(four[0] - four[1])


def _cell_loss(model, tokens, cells, words):
    """Return (cross-entropy of colour and shape over the image tokens, absolute error of the box where a thing is).

    A token is named by its product with the words' own embeddings, as in contrastive image-text training: what is
    red points the way of " red" before the language model ever looks for it.
    """
    import torch
    from torch.nn.functional import cross_entropy

    rest = model.cells(tokens)
    named = tokens @ model.get_input_embeddings()(words).T
    colors, shapes = named.split([len(scenes.COLORS), len(scenes.SHAPES)], 1)
    naming = cross_entropy(torch.cat([rest[:, :1], colors], 1), cells[:, 0].long())
    naming = naming + cross_entropy(torch.cat([rest[:, 1:2], shapes], 1), cells[:, 1].long())
    thing = cells[:, 0] > 0
    return naming, (rest[thing, 2:] - cells[thing, 2:]).abs().mean()


def _schedule(progress: float, floor: float) -> float:
    """Return the share of the learning rate: constant for the first half, then linear to `floor`."""
    return 1.0 if progress < 0.5 else 1.0 - (1.0 - floor) * (progress - 0.5) * 2


def _save_checkpoint(scratch: Path, model, optimizer, state: dict) -> None:
    from safetensors.torch import save_file

    names = {id(p): name for name, p in model.named_parameters()}
    tensors = {f"model.{name}": p.detach().clone() for name, p in model.named_parameters()}
    for p, values in optimizer.state.items():
        tensors |= {f"adam.{key}.{names[id(p)]}": value.detach().clone() for key, value in values.items()}
    with replace_folder(scratch) as folder:
        save_file(tensors, folder / "checkpoint.safetensors")
        write_text(folder / "state.json", json.dumps(state))


def _load_checkpoint(scratch: Path, model, optimizer) -> dict:
    import torch
    from safetensors.torch import load_file

    tensors = load_file(scratch / "checkpoint.safetensors")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[f"model.{name}"])
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"adam.{key}.{name}" in tensors:  # a parameter without a gradient so far has no state
                    optimizer.state[p][key] = tensors[f"adam.{key}.{name}"]
    return json.loads((scratch / "state.json").read_text())


def _ship(out: Path, model, processor, state: dict, seed: int) -> None:
    """Write the student as a folder that `from_pretrained` reads, with its learning curve."""
    del model.cells
    with replace_folder(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        curve = {"columns": ["step", "nats_per_coordinate", "things", "seconds"], "rows": state["curve"],
                 "seed": seed, "seconds": state["seconds"]}  # fmt: skip
        write_text(folder / "learning_curve.json", json.dumps(curve))
        write_text(folder / "README.md", _card(model, state, seed))
        manifest = {"model.safetensors": checksum(folder / "model.safetensors")}
        write_text(folder / "manifest.json", json.dumps(manifest))


def _card(model, state: dict, seed: int) -> str:
    """Return the model card: what it is, how it was made, what it is good for."""
    size = sum(p.numel() for p in model.parameters())
    values = "\n".join(f"| {f.name} | {getattr(STUDENT_RECIPE, f.name)} |" for f in fields(STUDENT_RECIPE))
    last = state["curve"][-1] if state["curve"] else [state["step"], "-", state["level"], 0]
    return f"""# The micro student

A `Qwen3VLForConditionalGeneration` with {size:,} parameters and a word-level `Qwen3VLProcessor`, trained from
scratch to answer synthetic referring expressions with a box. It knows the words of `ivt_utils/scenes.py` and nothing
else; it is a teaching instrument, not a detector. It has seen chats of several questions and images, but never a box
drawn on an image, nor the feedback prompt, nor an image of the benchmark.

Made by `ivt build student --seed {seed}` in {state["seconds"] / 60:.0f} minutes on two CPU cores:
{state["step"]:,} steps, ending at {last[1]} nats a coordinate on scenes of up to {last[2]} things
(`learning_curve.json`). Its results on the benchmark are in the rows "base" of the project's table.
Licence: Apache-2.0.

| recipe | value |
|---|---|
{values}

What makes it work on two cores: small batches (learning is limited by steps, not by scenes); scenes that grow by
one thing when the loss allows it; an initialisation made for a small width; a smooth code for numbers, so that
neighbouring coordinates are alike from the start; a number and its separator in one token.
"""

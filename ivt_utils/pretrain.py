"""Training of the micro student from scratch, on scenes made on the fly (never on the benchmark's images).

The student learns to answer: one or several questions about an image, over one or several images in a chat, so that
a second image is nothing new to it. It never sees a box drawn on an image, nor the feedback prompt: those are what
the course teaches. What makes this work on two cores is in `data/student/README.md` (`_card` below).
"""

import json
import random
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from pathlib import Path

from ivt_utils import protocol, scenes, student
from ivt_utils.artefacts import note_files, replace_folder, write_text
from ivt_utils.boxes import snap
from ivt_utils.profiles import STUDENT_RECIPE

CURVE = ["step", "things", "seconds", "nats_per_coordinate", "binding", "said", "shown", "naming", "framing"]
LOOP_TOKENS = (*protocol.PHRASES[2:], ".", ":", ' {"bbox_2d": [')  # of feedback and traces: in no chat of this training
AHEAD = 3  # batches made ahead of use; the curriculum's level is fixed when a batch is ordered
_processor = None  # one a worker process


def sample_chat(rng: random.Random, level: int, images: int, questions: int) -> tuple[list[dict], list, list]:
    """Return one training chat, the scenes of its images, and (image, expression, target) of each answer, in order.

    It has `images` scenes of at most `level` things and up to `questions` questions on each. A further image is
    another scene or, half of the time, the same one again with new questions.
    """
    messages: list[dict] = []
    shown, asked = [], []
    scene = subset = picture = None
    for image in range(images):
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
            asked.append((image, expression, target))
    return messages, shown, asked


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


def referent_cells(thing: scenes.Thing, cells: list[list[float]]) -> list[int]:
    """Return the image tokens, of those that `label_cells` describes, under whose centre `thing` lies on top.

    A thing that lies under no centre gets the token at its own centre.
    """
    side = round(len(cells) ** 0.5)
    box = [v / 1000 for v in thing.box]
    column, row = (min(side - 1, int(v * side / 1000)) for v in thing.center)
    return [i for i, cell in enumerate(cells) if cell[0] and cell[2:] == box] or [row * side + column]


def make_batch(seed: int, step: int, level: int) -> tuple[dict, dict]:
    """Return one batch of tensors for a training step, and its labels; the same for the same (seed, step, level).

    The labels: `cells` (image tokens, 6) of `label_cells`, and for each answer in order `said` (answers, words),
    the share of each word in its expression, and `shown` (answers, positions), True at its referent's image tokens.
    """
    import torch

    global _processor
    if _processor is None:
        torch.set_num_threads(1)
        _processor = student.micro_processor()
    rng = random.Random(f"student {seed} {step}")
    # One kind of chat a batch: little padding.
    images, questions = rng.choices(STUDENT_RECIPE.chats, STUDENT_RECIPE.chat_weights)[0]
    if step < STUDENT_RECIPE.vision_steps:
        images, questions = 1, 1
    drawn = [sample_chat(rng, level, images, questions) for _ in range(STUDENT_RECIPE.batch_size)]
    chats = [chat for chat, _, _ in drawn]
    texts = _processor.apply_chat_template(chats, tokenize=False)
    pictures = [[part["image"] for m in chat for part in m["content"] if "image" in part] for chat in chats]
    batch = _processor(text=texts, images=pictures, padding=True, padding_side="right", return_tensors="pt")
    batch = {key: batch[key] for key in ("input_ids", "mm_token_type_ids", "pixel_values", "image_grid_thw")}
    side = STUDENT_RECIPE.image_side // STUDENT_RECIPE.patch // 2
    vocabulary = student.expression_words()
    cells, said, shown = [], [], []
    for ids, (_, chat_scenes, asked) in zip(batch["input_ids"], drawn, strict=True):
        labels = [label_cells(scene, side) for scene in chat_scenes]
        positions = (ids == _processor.image_token_id).nonzero().view(len(labels), side * side)
        for image, expression, target in asked:
            words = _processor.tokenizer.tokenize(expression)
            said.append([words.count(word) / len(words) for word in vocabulary])
            there = torch.zeros(len(ids), dtype=torch.bool)
            there[positions[image, referent_cells(chat_scenes[image].things[target], labels[image])]] = True
            shown.append(there)
        cells += [cell for label in labels for cell in label]
    return batch, {"cells": torch.tensor(cells), "said": torch.tensor(said), "shown": torch.stack(shown)}


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
    model.set_attn_implementation({"text_config": "eager"})  # attention that the guides can read
    loop_ids = processor.tokenizer.convert_tokens_to_ids(list(LOOP_TOKENS))
    initial = model.get_input_embeddings().weight.detach()[loop_ids].clone()
    model.cells = torch.nn.Linear(recipe.text_width, 5)  # for `_cell_loss`; thrown away at the end
    seen = {}
    model.model.visual.merger.register_forward_hook(lambda _, __, output: seen.update(tokens=output))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )
    state = {"step": 0, "level": recipe.first_things, "seconds": 0.0, "recent": [], "curve": []}
    if (scratch / "state.json").exists():
        state = _load_checkpoint(scratch, model, optimizer)
        print(f"Continuing from step {state['step']} in {scratch}.")
    print(f"Training the micro student: {steps} steps of {recipe.batch_size} chats, about half an hour on two cores.")
    recent = deque(state["recent"], maxlen=recipe.window)
    ids = processor.tokenizer.convert_tokens_to_ids
    names = torch.tensor(ids([f" {w}" for w in (*scenes.COLORS, *scenes.SHAPES)]))
    words = torch.tensor(ids(student.expression_words()))
    tokenizer, started, before, saved = processor.tokenizer, time.time(), state["seconds"], time.time()
    model.train()
    with ProcessPoolExecutor(1) as pool:
        ordered = deque()
        for step in range(state["step"], steps):
            while len(ordered) < AHEAD and step + len(ordered) < steps:
                ahead = step + len(ordered)
                level = recipe.things if ahead < recipe.vision_steps else state["level"]
                ordered.append(pool.submit(make_batch, seed, ahead, level))
            blind = step < recipe.vision_steps  # the text model does not take part yet
            for group in optimizer.param_groups:
                group["lr"] = recipe.vision_lr if blind else recipe.lr * _schedule(step, recipe)
            batch, labels = ordered.popleft().result()
            if blind:
                model.model.visual(batch["pixel_values"], grid_thw=batch["image_grid_thw"])
                loss, row = 0.0, [0.0] * 4
            else:
                loss, row = _loss(model, batch, labels, tokenizer, words)
            naming, framing = _cell_loss(model, seen["tokens"], labels["cells"], names)
            (loss + recipe.cell_weight * (naming + 10 * framing)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
            recent.append([*row, naming.item(), framing.item()])
            state.update(step=step + 1, seconds=before + time.time() - started, recent=list(recent))
            if (step + 1) % recipe.window == 0:
                means = [round(sum(column) / len(recent), 4) for column in zip(*recent, strict=True)]
                state["curve"].append([step + 1, level, round(state["seconds"]), *means])
                shown = "  ".join(f"{name} {value:.2f}" for name, value in zip(CURVE[3:], means, strict=True))
                print(f"step {step + 1}/{steps}  {level} things  {state['seconds'] / 60:.1f} min  {shown}", flush=True)
                if not blind and means[0] < recipe.learnt_below and state["level"] < recipe.things:
                    state["level"] += 1
            if time.time() - saved > 180 or step + 1 == steps:
                _save_checkpoint(scratch, model, optimizer, state)
                saved = time.time()
    # A softmax pushes every token that never comes the same way (cosine .99 in the end), so that no later training
    # could tell them apart: each of the loop's tokens gets its initial direction added, at a share of a word's length
    # (at the full length some were said in place of coordinates).
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        length = embeddings[words].norm(dim=1).median() * recipe.loop_share
        embeddings[loop_ids] += length * torch.nn.functional.normalize(initial, dim=1)
    _ship(out, model, processor, state, seed)
    return out


def _loss(model, batch: dict, labels: dict, tokenizer, words):
    """Return the loss of the answers with two guides, and its parts as floats (the columns 3 to 6 of CURVE).

    The first coordinate says which thing is meant, the second only where it is: x1 above y1 is what binding words
    to things still costs (ln n for a student that picks one of n things at random). A small model finds the two
    steps of binding by itself only after many scenes, for neither pays without the other. The guides show each one:
    the words of the expression are to be readable, through their own embeddings, where the answer begins (`said`);
    and from each coordinate one attention head is to look at the referent's image tokens (`shown`).
    """
    import torch

    recipe = STUDENT_RECIPE
    mask = answer_mask(batch["input_ids"], tokenizer)
    output = model.model(**batch, use_cache=False, output_hidden_states=True, output_attentions=True)
    # An answer: opening, four numbers, closing, end of turn; `row`, `at`: (answers, 7) the token before each.
    row, at = mask[:, 1:].nonzero().view(-1, 7, 2).unbind(-1)
    logits = model.lm_head(output.last_hidden_state[row, at]).flatten(0, 1)  # the head sees answers only
    losses = torch.nn.functional.cross_entropy(logits, batch["input_ids"][row, at + 1].flatten(), reduction="none")
    four = losses.detach().view(-1, 7)[:, 1:5].mean(0)
    begin = output.hidden_states[recipe.words_after][row[:, 1], at[:, 1]]
    spoken = (begin @ model.get_input_embeddings()(words).T).log_softmax(-1)
    said = torch.nn.functional.kl_div(spoken, labels["said"], reduction="batchmean")
    looks = output.attentions[recipe.points_in][row[:, 1:5], 0, at[:, 1:5]]  # (answers, 4, positions)
    shown = -(looks * labels["shown"][:, None]).sum(-1).clamp(min=1e-6).log().mean()
    loss = losses.mean() + recipe.word_weight * said + recipe.point_weight * shown
    return loss, [float(v.detach()) for v in (four.mean(), four[0] - four[1], said, shown)]


def _cell_loss(model, tokens, cells, names):
    """Return (cross-entropy of whether, which colour and which shape, absolute error of the box) over image tokens.

    A token is named by its product with the words' own embeddings, as in contrastive image-text training: what is
    red points the way of " red" before the language model ever looks for it. Colour, shape and box (shares 0..1)
    count where a thing is: most tokens are background, and would drown them.
    """
    from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

    thing = cells[:, 0] > 0
    guess = model.cells(tokens)
    named = tokens[thing] @ model.get_input_embeddings()(names).T
    colors, shapes = named.split([len(scenes.COLORS), len(scenes.SHAPES)], 1)
    naming = binary_cross_entropy_with_logits(guess[:, 0], thing.float())
    naming = naming + cross_entropy(colors, cells[thing, 0].long() - 1)
    naming = naming + cross_entropy(shapes, cells[thing, 1].long() - 1)
    return naming, (guess[thing, 1:] - cells[thing, 2:]).abs().mean()


def _schedule(step: int, recipe) -> float:
    """Return the share of the learning rate: constant up to `decay_from`, then linear to `floor`."""
    progress = min(1.0, max(0.0, (step - recipe.decay_from) / recipe.decay_steps))
    return 1.0 - (1.0 - recipe.floor) * progress


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
    model.set_attn_implementation({"text_config": "sdpa"})
    with replace_folder(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        curve = {"columns": CURVE, "rows": state["curve"],
                 "seed": seed, "seconds": state["seconds"]}  # fmt: skip
        write_text(folder / "learning_curve.json", json.dumps(curve))
        write_text(folder / "README.md", _card(model, state, seed))
        note_files(folder, student.FILES)


def _card(model, state: dict, seed: int) -> str:
    """Return the model card: what it is, how it was made, what it is good for."""
    size = sum(p.numel() for p in model.parameters())
    values = "\n".join(f"| {f.name} | {getattr(STUDENT_RECIPE, f.name)} |" for f in fields(STUDENT_RECIPE))
    last = state["curve"][-1] if state["curve"] else [0, state["level"], 0, "-"]
    return f"""# The micro student

A `Qwen3VLForConditionalGeneration` with {size:,} parameters and a word-level `Qwen3VLProcessor`, trained from
scratch to answer synthetic referring expressions with a box. It knows the words of `ivt_utils/scenes.py` and nothing
else; it is a teaching instrument, not a detector. It has seen chats of several questions and images, but never a box
drawn on an image, nor the feedback prompt, nor an image of the benchmark.

Made by `ivt build student --seed {seed}` in {state["seconds"] / 60:.0f} minutes on two CPU cores:
{state["step"]:,} steps, ending at {last[3]} nats a coordinate on scenes of up to {last[1]} things
(`learning_curve.json`). Its results on the benchmark are in the rows "base" of the project's table.
Licence: Apache-2.0.

| recipe | value |
|---|---|
{values}

What makes it work on two cores: small batches (learning is limited by steps, not by scenes); an initialisation made
for a small width; a smooth code for numbers, so that neighbouring coordinates are alike from the start; a number and
its separator in one token; the vision tower first, alone; scenes that grow by one thing when the loss allows it; and
three guides beside the loss of the answers. Image tokens are named by the words' own embeddings, the words of the
expression are to be readable where the answer begins, and one attention head is to look at the referent. Without the
guides, earlier attempts framed boxes well and still chose among the things at random. What only the guides need is
thrown away at the end. The tokens of feedback and traces, which this training never shows, then get the direction they
started with added: it had pushed them all the same way, where no later training could tell them apart.
"""

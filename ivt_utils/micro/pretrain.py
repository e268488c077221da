"""Training of the micro student from scratch, on scenes made on the fly (never on the benchmark's images).

The student learns to answer: one or several questions about an image, over one or several images in a chat, and the
follow-ups that any chat holds (`chats`). It never sees a box drawn on an image, nor the feedback: those are what the
course teaches. What makes this work on two cores is in `data/student/README.md` (`_card` below).
"""

import json
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

from ivt_utils import student
from ivt_utils.micro import model as micro
from ivt_utils.micro import scenes
from ivt_utils.micro.chats import answer_mask, answer_tokens, make_batch
from ivt_utils.profiles import STUDENT_RECIPE
from ivt_utils.runtime.files import note_files, replace_folder, write_text

CURVE = [
    "step",
    "things",
    "seconds",
    "nats_per_coordinate",
    "binding",
    "said",
    "shown",
    "copying",
    "nats_of_copies",
    "naming",
    "framing",
]
AHEAD = 3  # batches made ahead of use; the curriculum's level is fixed when a batch is ordered


def train_student(out: Path, seed: int = 0, scratch: Path | None = None, steps: int | None = None) -> Path:
    """Train the micro student and write model, processor, learning curve and card to `out`; resumable.

    A checkpoint goes to `scratch` (default: beside `out`) every few minutes; the same call continues from it.
    """
    import torch

    recipe = STUDENT_RECIPE
    steps = steps or recipe.steps
    scratch = scratch or out.with_name(out.name + ".training")
    processor = micro.micro_processor()
    model = micro.build_micro(processor, seed)
    model.set_attn_implementation({"text_config": "eager"})  # attention that the guides can read
    model.cells = torch.nn.Linear(recipe.text_width, 5)  # for `_cell_loss`; thrown away at the end
    seen = {}
    model.model.visual.merger.register_forward_hook(lambda _, __, output: seen.update(tokens=output))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )
    state: dict[str, Any] = {"step": 0, "level": recipe.first_things, "seconds": 0.0, "recent": [], "curve": []}
    if (scratch / "state.json").exists():
        state = _load_checkpoint(scratch, model, optimizer)
        print(f"Continuing from step {state['step']} in {scratch}.")
    print(f"Training the micro student: {steps} steps of {recipe.batch_size} chats, about 40 minutes on one core.")
    recent = deque(state["recent"], maxlen=recipe.window)
    ids = processor.tokenizer.convert_tokens_to_ids
    names = torch.tensor(ids([f" {w}" for w in (*scenes.COLORS, *scenes.SHAPES)]))
    words = torch.tensor(ids(micro.expression_words()))
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
                loss, row = 0.0, [0.0] * 6
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
    _ship(out, model, processor, state, seed)
    return out


def _loss(model, batch: dict, labels: dict, tokenizer, words):
    """Return the loss of the answers with three guides, and its parts as floats (the columns 3 to 8 of CURVE).

    The first coordinate says which thing is meant, the second only where it is: x1 above y1 is what binding words
    to things still costs (ln n for a student that picks one of n things at random). A small model finds the two
    steps of binding by itself only after many scenes, for neither pays without the other. The guides show each one:
    the words of the expression are to be readable, through their own embeddings, where the answer begins (`said`);
    and from each coordinate one attention head is to look at the referent's image tokens (`shown`). In a repeated
    answer another head is to look at the same coordinate of the answer before (`copying`) instead.
    """
    import torch

    recipe, again = STUDENT_RECIPE, labels["again"]
    mask = answer_mask(batch["input_ids"], tokenizer)
    output = model.model(**batch, use_cache=False, output_hidden_states=True, output_attentions=True)
    # An answer: opening, four numbers, closing, end of turn; `row`, `at`: (answers, 7) the token before each.
    row, at = mask[:, 1:].nonzero().view(-1, 7, 2).unbind(-1)
    # A softmax would push every token that no answer holds the same way (cosine .99 in the end), so that no later
    # training could tell the words apart: it may not move their rows.
    table = model.lm_head.weight
    sayable = torch.zeros(len(table), 1, dtype=torch.bool)
    sayable[[*answer_tokens(tokenizer), tokenizer.eos_token_id]] = True
    table = torch.where(sayable, table, table.detach())
    logits = output.last_hidden_state[row, at].flatten(0, 1) @ table.T  # the head sees answers only
    losses = torch.nn.functional.cross_entropy(logits, batch["input_ids"][row, at + 1].flatten(), reduction="none")
    nats = losses.detach().view(-1, 7)[:, 1:5]
    four = nats[~again].mean(0)
    begin = output.hidden_states[recipe.words_after][row[:, 1], at[:, 1]][~again]
    spoken = (begin @ model.get_input_embeddings()(words).T).log_softmax(-1)
    said = torch.nn.functional.kl_div(spoken, labels["said"][~again], reduction="batchmean")
    looks = output.attentions[recipe.points_in][row[:, 1:5], :, at[:, 1:5]]  # (answers, 4, heads, positions)
    shown = -(looks[~again][:, :, 0] * labels["shown"][~again, None]).sum(-1).clamp(min=1e-6).log().mean()
    loss = losses.mean() + recipe.word_weight * said + recipe.point_weight * shown
    copying = nats_of_copies = torch.tensor(0.0)
    if again.any():
        before = at[again.nonzero()[:, 0] - 1, 1:5] + 1  # the same coordinate of the answer before
        copied = looks[again][:, :, recipe.copy_head].gather(2, before[..., None])
        copying = -copied.clamp(min=1e-6).log().mean()
        nats_of_copies = nats[again].mean()
        loss = loss + recipe.copy_weight * copying
    parts = four.mean(), four[0] - four[1], said, shown, copying, nats_of_copies
    return loss, [float(v.detach()) for v in parts]


def _cell_loss(model, tokens, cells, names):
    """Return (cross-entropy of whether, which color and which shape, absolute error of the box) over image tokens.

    A token is named by its product with the words' own embeddings, as in contrastive image-text training: what is
    red points the way of " red" before the language model ever looks for it. Color, shape and box (shares 0..1)
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
        curve = {"columns": CURVE, "rows": state["curve"], "seed": seed, "seconds": state["seconds"]}
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
scratch to answer synthetic referring expressions with a box. It knows the words of `ivt_utils/micro/scenes.py`, those
of the follow-ups in `ivt_utils/protocol.py`, and nothing else; it is a teaching instrument, not a detector. It has seen
chats of several questions and images, and two kinds of follow-up: without an image ("Say it again.": the same box),
and with another one ("And in this image?": the same expression there). It has never seen a box drawn on an image, nor
the feedback, nor a phrase of a trace, though the words of both are among the follow-ups'; nor an image of the
benchmark.

Made by `ivt build student --seed {seed}` in {state["seconds"] / 60:.0f} minutes on a CPU:
{state["step"]:,} steps, ending at {last[3]} nats a coordinate on scenes of up to {last[1]} things
(`learning_curve.json`). Its results on the benchmark are in the rows "base" of the project's table.
Licence: Apache-2.0.

| recipe | value |
|---|---|
{values}

What makes it work on two cores: small batches (learning is limited by steps, not by scenes); an initialization made
for a small width; a smooth code for numbers, so that neighboring coordinates are alike from the start; a number and
its separator in one token; the vision tower first, alone; scenes that grow by one thing when the loss allows it; and
guides beside the loss of the answers. Image tokens are named by the words' own embeddings, the words of the expression
are to be readable where the answer begins, and one attention head is to look at the referent. Without the guides,
earlier attempts framed boxes well and still chose among the things at random. What only the guides need is thrown away
at the end.

What makes it copy: asked to say an answer again, another head is to look at the same coordinate of the answer before.
That alone did not do, for a number had only its smooth code, its neighbors were as likely, and the layers drowned what
little there was. So a number also has a direction of its own, the layers start quietly, and that head starts as a
copier: what it looks at, it says (its output map is its value map, transposed). The softmax may not move the rows of
words that no answer holds: it would push them all the same way (cosine .99), and no later training could tell them
apart.
"""

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
from pathlib import Path

from ivt_utils import protocol, scenes, student
from ivt_utils.artefacts import checksum, replace_folder, write_text
from ivt_utils.boxes import snap
from ivt_utils.profiles import STUDENT_RECIPE

AHEAD = 3  # batches made ahead of use; the curriculum's level is fixed when a batch is ordered
_processor = None  # one a worker process


def sample_chat(rng: random.Random, level: int, images: int, questions: int) -> list[dict]:
    """Return one training chat: `images` scenes of at most `level` things, up to `questions` questions on each.

    A further image is another scene or, half of the time, the same one again with new questions.
    """
    messages: list[dict] = []
    scene = subset = picture = None
    for _ in range(images):
        pairs = []
        if scene is not None and rng.random() < 0.5:
            pairs = [pair for _ in range(questions) if (pair := scenes.sample_expression(rng, scene, subset))]
        if not pairs:
            subset = rng.choice(scenes.SUBSETS)
            scene, pairs = scenes.sample_questions(rng, subset, rng.randint(max(1, level - 3), level), questions)
            picture = scenes.draw_scene(scene)
        for i, (expression, target) in enumerate(pairs):
            messages.append(protocol.question(picture if i == 0 else None, expression))
            box = snap(scene.things[target].box, student.GRID)
            messages.append(protocol.answer(protocol.answer_text(box)))
    return messages


def make_batch(seed: int, step: int, level: int) -> dict:
    """Return one batch of tensors for a training step; the same for the same (seed, step, level)."""
    import torch

    global _processor
    if _processor is None:
        torch.set_num_threads(1)
        _processor = student.micro_processor()
    rng = random.Random(f"student {seed} {step}")
    images, questions = rng.choices(STUDENT_RECIPE.chats, STUDENT_RECIPE.chat_weights)[0]
    if level < STUDENT_RECIPE.chats_from:  # one kind of chat a batch: little padding
        images, questions = 1, 1
    chats = [sample_chat(rng, level, images, questions) for _ in range(STUDENT_RECIPE.batch_size)]
    texts = _processor.apply_chat_template(chats, tokenize=False)
    pictures = [[part["image"] for m in chat for part in m["content"] if "image" in part] for chat in chats]
    batch = _processor(text=texts, images=pictures, padding=True, padding_side="right", return_tensors="pt")
    return {key: batch[key] for key in ("input_ids", "mm_token_type_ids", "pixel_values", "image_grid_thw")}


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
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )
    state = {"step": 0, "level": 1, "seconds": 0.0, "recent": [], "curve": []}
    if (scratch / "state.json").exists():
        state = _load_checkpoint(scratch, model, optimizer)
        print(f"Continuing from step {state['step']} in {scratch}.")
    print(f"Training the micro student: {steps} steps of {recipe.batch_size} chats, about 80 minutes on two cores.")
    recent = deque(state["recent"], maxlen=recipe.window)
    tokenizer, started, before, saved = processor.tokenizer, time.time(), state["seconds"], time.time()
    model.train()
    with ProcessPoolExecutor(1) as pool:
        ordered = deque()
        for step in range(state["step"], steps):
            while len(ordered) < AHEAD and step + len(ordered) < steps:
                ordered.append(pool.submit(make_batch, seed, step + len(ordered), state["level"]))
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * _schedule(step / steps, recipe.floor)
            loss, coordinate = _loss(model, ordered.popleft().result(), tokenizer)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad()
            recent.append(coordinate)
            state.update(step=step + 1, seconds=before + time.time() - started, recent=list(recent))
            if (step + 1) % recipe.window == 0:
                mean = sum(recent) / len(recent)
                state["curve"].append([step + 1, round(mean, 4), state["level"], round(state["seconds"])])
                print(f"step {step + 1}/{steps}  {mean:.3f} nats a coordinate  "
                      f"{state['level']} things  {state['seconds'] / 60:.1f} min", flush=True)  # fmt: skip
                threshold = [below for start, below in recipe.next_level_below if step >= start][-1]
                if mean < threshold and state["level"] < recipe.things:
                    state["level"] += 1
            if time.time() - saved > 180 or step + 1 == steps:
                _save_checkpoint(scratch, model, optimizer, state)
                saved = time.time()
    _ship(out, model, processor, state, seed)
    return out


def _loss(model, batch: dict, tokenizer):
    """Return (mean cross-entropy of the answer tokens, nats per coordinate as a float).

    Padding is on the right and attention is causal, so no mask is needed; the head sees answer positions only.
    """
    import torch

    mask = answer_mask(batch["input_ids"], tokenizer)
    hidden = model.model(**batch, use_cache=False).last_hidden_state[:, :-1][mask[:, 1:]]
    targets = batch["input_ids"][:, 1:][mask[:, 1:]]
    losses = torch.nn.functional.cross_entropy(model.lm_head(hidden), targets, reduction="none")
    boxes = (targets == tokenizer.convert_tokens_to_ids("]}")).sum()
    return losses.mean(), float(losses.detach().sum() / (4 * boxes))


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
                optimizer.state[p][key] = tensors[f"adam.{key}.{name}"]
    return json.loads((scratch / "state.json").read_text())


def _ship(out: Path, model, processor, state: dict, seed: int) -> None:
    """Write the student as a folder that `from_pretrained` reads, with its learning curve."""
    with replace_folder(out) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        curve = {"columns": ["step", "nats_per_coordinate", "things", "seconds"], "rows": state["curve"],
                 "seed": seed, "seconds": state["seconds"]}  # fmt: skip
        write_text(folder / "learning_curve.json", json.dumps(curve))
        manifest = {"model.safetensors": checksum(folder / "model.safetensors")}
        write_text(folder / "manifest.json", json.dumps(manifest))

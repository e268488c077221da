"""The chats of the micro student's training from scratch, made on the fly, and their batches.

A chat asks one or several questions over one or several images, and goes on from an answer as chats do: "say it again",
"and in this image?". No chat holds a box drawn on an image, the feedback, or a phrase of a trace.
"""

import itertools
import random
from dataclasses import replace
from typing import Any

from ivt_utils import protocol
from ivt_utils.boxes import snap
from ivt_utils.micro import model as micro
from ivt_utils.micro import scenes
from ivt_utils.profiles import STUDENT_RECIPE

_processor = None  # one a worker process


def sample_chat(rng: random.Random, level: int, images: int, questions: int) -> tuple[list[dict], list, list]:
    """Return one training chat, the scenes of its images, and (image, expression, target, again) of each answer.

    It has `images` scenes of at most `level` things and up to `questions` questions on each. A further image comes
    with the same expression (the old things in other places; the turn is a few phrases, one a line), or with new
    questions, half of the time about the image before. After any answer the user may ask for it again, without an
    image; then `again` is True.
    """
    recipe = STUDENT_RECIPE
    messages: list[dict] = []
    shown, asked = [], []
    scene: Any = None
    subset: Any = None
    picture = form = None
    for image in range(images):
        pairs, phrase = [], None
        if form and rng.random() < recipe.another_share and (moved := moved_scene(rng, scene, form)):
            scene, pairs = moved[0], [(form, moved[1])]
            phrase = "\n".join(rng.sample(protocol.ANOTHER, rng.randint(1, recipe.phrases)))
        elif form and rng.random() < 0.5:
            pairs = [pair for _ in range(questions) if (pair := scenes.sample_form(rng, scene, subset))]
        if not pairs:
            subset = "plain" if level < recipe.plain_below else rng.choice(scenes.SUBSETS)
            scene, pairs = scenes.sample_forms(rng, subset, rng.randint(max(1, level - 3), level), questions)
        if picture is None or scene is not shown[-1]:
            picture = scenes.draw_scene(scene)
        shown.append(scene)
        for i, (form, target) in enumerate(pairs):
            here = picture if i == 0 else None
            expression, box = scenes.to_text(form), snap(scene.things[target].box, micro.GRID)
            messages.append(protocol.follow_up(here, phrase) if phrase else protocol.question(here, expression))
            messages.append(protocol.answer(protocol.answer_text(box)))
            asked.append((image, expression, target, False))
            while rng.random() < recipe.again_share:
                messages += [protocol.follow_up(None, rng.choice(protocol.AGAIN)), messages[-1]]
                asked.append((image, expression, target, True))
    return messages, shown, asked


def moved_scene(rng: random.Random, scene: scenes.Scene, form: scenes.Form, tries: int = 40):
    """Return (scene, index): the same things in other places, where `form` singles out one again; None if not found."""
    for _ in range(tries):
        things: list[scenes.Thing] = []
        for thing in scene.things:
            boxes = (scenes.free_box(rng, thing.side, things) for _ in range(20))
            things += [replace(thing, box=box) for box in itertools.islice(filter(None, boxes), 1)]
        moved = scenes.Scene(tuple(things), scenes.sample_background(rng))
        found = scenes.referents(moved, form, scenes.STRICT)
        if len(found) == 1 and scenes.is_unique(moved, form, found[0]):
            return moved, found[0]
    return None


def label_cells(scene: scenes.Scene, side: int) -> list[list[float]]:
    """Return what lies under the center of each of `side` x `side` image tokens: six numbers a token, row by row.

    The color's and the shape's index from 1 (0: background), and the box of the thing on top, as shares 0..1.
    """
    cells = []
    for row in range(side):
        for column in range(side):
            x, y = (column + 0.5) * 1000 / side, (row + 0.5) * 1000 / side
            under = [t for t in scene.things if t.box[0] <= x <= t.box[2] and t.box[1] <= y <= t.box[3]]
            top = under[-1] if under else None
            cells.append(
                [0, 0, 0, 0, 0, 0]
                if top is None
                else [
                    list(scenes.COLORS).index(top.color) + 1,
                    scenes.SHAPES.index(top.shape) + 1,
                    *(v / 1000 for v in top.box),
                ]
            )
    return cells


def referent_cells(thing: scenes.Thing, cells: list[list[float]]) -> list[int]:
    """Return the image tokens, of those that `label_cells` describes, under whose center `thing` lies on top.

    A thing that lies under no center gets the token at its own center.
    """
    side = round(len(cells) ** 0.5)
    box = [v / 1000 for v in thing.box]
    column, row = (min(side - 1, int(v * side / 1000)) for v in thing.center)
    return [i for i, cell in enumerate(cells) if cell[0] and cell[2:] == box] or [row * side + column]


def make_batch(seed: int, step: int, level: int) -> tuple[dict, dict]:
    """Return one batch of tensors for a training step, and its labels; the same for the same (seed, step, level).

    The labels: `cells` (image tokens, 6) of `label_cells`, and for each answer in order `said` (answers, words),
    the share of each word in its expression, `shown` (answers, positions), True at its referent's image tokens, and
    `again` (answers,), True where it repeats the answer before.
    """
    import torch

    global _processor
    if _processor is None:
        torch.set_num_threads(1)
        _processor = micro.micro_processor()
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
    vocabulary = micro.expression_words()
    cells, said, shown, again = [], [], [], []
    for ids, (_, chat_scenes, asked) in zip(batch["input_ids"], drawn, strict=True):
        labels = [label_cells(scene, side) for scene in chat_scenes]
        positions = (ids == _processor.image_token_id).nonzero().view(len(labels), side * side)
        for image, expression, target, repeated in asked:
            words = _processor.tokenizer.tokenize(expression)
            said.append([words.count(word) / len(words) for word in vocabulary])
            there = torch.zeros(len(ids), dtype=torch.bool)
            there[positions[image, referent_cells(chat_scenes[image].things[target], labels[image])]] = True
            shown.append(there)
            again.append(repeated)
        cells += [cell for label in labels for cell in label]
    labels = {"said": torch.tensor(said), "shown": torch.stack(shown), "again": torch.tensor(again)}
    return batch, {"cells": torch.tensor(cells), **labels}


def answer_tokens(tokenizer) -> list[int]:
    """Return the ids of which answers are made, without the end of the turn."""
    numbers = [f"{sep}{v}" for sep in ("", ", ") for v in range(0, 1001, micro.GRID)]
    return tokenizer.convert_tokens_to_ids([*numbers, '{"bbox_2d": [', "]}"])


def answer_mask(input_ids, tokenizer):
    """Return a bool mask of the tokens the student must learn: each answer, and the end of its turn."""
    import torch

    mask = torch.isin(input_ids, torch.tensor(answer_tokens(tokenizer)))
    ends = input_ids == tokenizer.eos_token_id
    ends[:, 1:] &= mask[:, :-1]
    return mask | ends

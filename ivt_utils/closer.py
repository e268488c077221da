"""A closer look: a loop whose last answer beats its first one, with no choice of a step (ours, not the paper's).

The paper's loop shows the whole image again with the box drawn on it: there is nothing new to see, and the student that
answers has just committed itself. Here its box says where to look. The same question is asked afresh about that part of
the image, enlarged, and the answer is put back in its place. Training starts from the student's own answers, good and
bad alike: at first sight it keeps them, at a closer look it learns the truth.

Values were chosen for the micro student on the validation split, before the test split was scored; other values are
tried with `ivt closer --split val --set zoom=3 --run-dir runs/zoom3`. Rivals were not tuned: they take the same ones.

Controls tell apart what a closer look brings: pixels that the student had not seen, a place to look at, fewer things in
sight; or whether one look at the whole image with more pixels would do. LFPR (arXiv 2608.19553) crops and asks again
without a training.
"""

import re
from functools import partial

import numpy as np
from PIL import Image

from ivt_utils import metrics, protocol
from ivt_utils.boxes import SCALE, from_view, parse_answer, snap, to_view, view
from ivt_utils.controls import OWN, RANDOM, TRUTH, shown_boxes
from ivt_utils.loop import Turn, evaluate, sampled_answers
from ivt_utils.metrics import Resampling
from ivt_utils.overlay import closer_look, load_image
from ivt_utils.records import lazy_dataset, numbered
from ivt_utils.schema import Rollout
from ivt_utils.selection import choose, medoid
from ivt_utils.sft import train_sft
from ivt_utils.student import bound_images, load_student

SHIPPED = "closer_seed0"  # the adapter of a closer look that comes with the course
BASE, FIRST, CLOSER = "base, single shot", "first answer", "closer look"
SAMPLED, TAUGHT = "consensus of sampled first answers", "first answer, trained on the truth"
UNTRAINED = "closer look, untrained"
SEEN, ANYWHERE = "closer look without new pixels", "closer look at a random part"
AROUND_TRUTH = "closer look around the truth (oracle)"
WIDE, WHOLE = (f"first answer, trained on the truth, {more}" for more in ("about as many image tokens", "all pixels"))
VIEWS = {"seen": SEEN, "random": ANYWHERE, "truth": AROUND_TRUTH}  # by the name of their stages
SHARPER = {"wide": WIDE, "whole": WHOLE}
COMPARISONS = (
    *((CLOSER, b) for b in (BASE, FIRST, SAMPLED, TAUGHT, UNTRAINED, *VIEWS.values(), *SHARPER.values())),
    (UNTRAINED, BASE),
    (SEEN, FIRST),
    (FIRST, BASE),
)
GAINS = tuple(f"{CLOSER} - {rival}" for rival in (BASE, FIRST))  # what the course claims


def examples(answers: list[Rollout], zoom: float, least: int, grid: int = 1) -> list[dict]:
    """Return what to learn from the student's own first answers: {"id", "expression", "shown", "text"}.

    Each answer with a box gives itself at first sight ("shown" is None), so that first answers stay what they are; and
    the truth after a closer look around that box ("shown"), unless the truth reaches out of what is seen there, or the
    box is so large that all of the image is: that question is the first one again, and one question has one answer.
    """
    rows = []
    for answer in answers:
        first, truth = answer["steps"][0], answer["truth"]
        if first["box"] is None:
            continue
        row = {"id": answer["id"], "expression": answer["expression"]}
        rows.append({**row, "shown": None, "text": first["text"]})
        x1, y1, x2, y2 = part = view(first["box"], zoom, least)
        whole = part == (0, 0, SCALE, SCALE)
        if not whole and x1 <= truth[0] and y1 <= truth[1] and truth[2] <= x2 and truth[3] <= y2:
            text = protocol.answer_text(to_view(truth, part, grid))
            rows.append({**row, "shown": list(first["box"]), "text": text})
    return rows


def first_examples(answers: list[Rollout], grid: int = 1) -> list[dict]:
    """Return what a rival without a second look learns from the same samples: the truth, at first sight."""
    return [
        {
            "id": a["id"],
            "expression": a["expression"],
            "shown": None,
            "text": protocol.answer_text(snap(a["truth"], grid)),
        }
        for a in answers
    ]


def examples_dataset(records, rows: list[dict], zoom: float, least: int):
    """Return a datasets.Dataset with `messages` and `images`, one row an example, its image read when needed."""
    numbers = numbered(records)

    def chat(row):
        image = load_image(records[numbers[row["id"]]]["image"])
        question = protocol.question(closer_look(image, row["shown"], zoom, least), row["expression"])
        return protocol.split_images([question, protocol.answer(row["text"])])

    return lazy_dataset(rows, chat)


def closer_turn(zoom: float, least: int, as_seen_by=None) -> Turn:
    """Return the turn of our loop: the first question is asked afresh about a closer look around the box that is shown.

    Around no box it is all of the image. The answer is put back in its place. `as_seen_by`: a student; the part is then
    cut out of the image at the size at which this student sees all of it, so that the look shows no new pixels.
    """

    def ask(chat, image, expression, last, shown):
        if as_seen_by:
            image = image.resize(seen_size(as_seen_by, image), Image.Resampling.BICUBIC)
        return [protocol.question(closer_look(image, shown, zoom, least), expression)]

    def read(text, shown):
        box = parse_answer(text)
        return box and from_view(box, view(shown, zoom, least))

    return Turn(ask, read)


def look_at(student, records, rollouts, boxes, profile, *, as_seen: bool = False, progress: str = "") -> list[Rollout]:
    """Return the rollouts with two steps: their step 0, and the answer to a closer look around a given box.

    `boxes`: one (0..1000) a rollout; None: all of the image. `as_seen`: without new pixels. Greedy decoding.
    """
    turn = closer_turn(profile.zoom, profile.least_view, student if as_seen else None)
    return evaluate(student, records, profile, progress=progress, turns=1, next_turn=turn, first=rollouts, shown=boxes)


def seen_size(student, image) -> tuple[int, int]:
    """Return the width and height in pixels to which the student's processor brings an image."""
    processor = student.processor.image_processor
    _, rows, columns = processor(images=[image], return_tensors="pt")["image_grid_thw"][0].tolist()
    return columns * processor.patch_size, rows * processor.patch_size


def stage(split: str, name: str, seed: int | None = None) -> str:
    """Return the name of the stage that holds the answers of a student of `run_closer` on a split."""
    return f"closer_{split}_{name}{'' if seed is None else seed}"


def stages(names, split: str) -> dict[tuple[str, int | None], str]:
    """Return those of the names of stages that are of a split, by what `stage` makes them from: name and seed."""
    names_by_key = {}
    for name in names:
        if of_split := re.fullmatch(rf"closer_{split}_([a-z]+)(\d*)", name):
            names_by_key[of_split[1], int(of_split[2]) if of_split[2] else None] = name
    return names_by_key


def run_closer(run, seeds, train, records, split: str = "test") -> None:
    """Train one student a seed, and let each answer the `records` of a split; `closer_rows` makes the table of it.

    Every training and every evaluation is a stage of `run`, so an interrupted call goes on where it stopped.
    """
    profile = run.profile

    def loaded(adapter=None, name=""):
        student = load_student(profile, adapter)
        if name in SHARPER:
            image = load_image(records[0]["image"])
            width, height = seen_size(student, image)
            bound_images(student.processor, 2 * width * height if name == "wide" else image.width * image.height)
        return student

    def answered(at, records, adapter=None, name="", **changes):
        return run.rollouts(at, lambda: evaluate(loaded(adapter, name), records, profile, run.seed, at, **changes))

    def trained(name, seed, learned):
        def train_it(folder):
            rows = learned(answered("train_step0", train, turns=0), grid=profile.grid)
            dataset = examples_dataset(train, rows, profile.zoom, profile.least_view)
            train_sft(loaded(name=name), dataset, folder, profile, seed, profile.closer_steps)

        return run.adapter(f"closer_{name}{seed}", train_it)

    def sampled(adapter, seed):
        name = stage(split, "sampled", seed)
        run.rollouts(name, lambda: sampled_answers(loaded(adapter), records, profile, seed, name))

    def looked_at(name, seed, adapter, looked, boxes):
        at = stage(split, name, seed)
        run.rollouts(
            at, lambda: look_at(loaded(adapter), records, looked, boxes, profile, as_seen=name == "seen", progress=at)
        )

    look = {"turns": profile.looks, "next_turn": closer_turn(profile.zoom, profile.least_view)}
    answered(stage(split, "untrained"), records, **look)
    for seed in seeds:
        adapter = trained("seed", seed, partial(examples, zoom=profile.zoom, least=profile.least_view))
        looked = answered(stage(split, "seed", seed), records, adapter, **look)
        sampled(adapter, seed)
        views = shown_boxes(looked, (), run.seed, profile.grid)
        for name, box in {"seen": OWN, "random": RANDOM, "truth": TRUTH}.items():
            looked_at(name, seed, adapter, looked, views[box])
        for name in ("first", *SHARPER):  # the rivals that are trained on the truth and answer once
            rival = trained(name, seed, first_examples)
            answered(stage(split, name, seed), records, rival, name, turns=0)


def closer_rows(answers: dict[tuple[str, int | None], list[Rollout]], resampling: Resampling) -> list[dict]:
    """Return the table of what `run_closer` left: a row for each method and comparison, of each seed and of their mean.

    `answers`: its rollouts by name and seed: ("untrained", None), ("seed", 0), ("first", 0), ("sampled", 0) ... A row:
    {"name", "seed" (or "mean": of each sample's score over the seeds), "seeds" (whose scores these are), "answers" (a
    sample; None in a comparison "a - b"), "acc50", "miou": cells of `metrics`, paired by sample in a comparison}. The
    intervals of a seed's rows are over test images, for that training; those of the mean of several are of
    `metrics.over_seeds`.
    [] before any seed is whole.
    """
    numbers_seen = sorted(number for name, number in answers if name == "seed" and number is not None)
    seeds = [n for n in numbers_seen if {("untrained", None), ("first", n), ("sampled", n)} <= answers.keys()]
    if not seeds:  # none is whole
        return []
    controls = {n: label for n, label in (VIEWS | SHARPER).items() if all((n, k) in answers for k in seeds)}
    ordered = {key: sorted(rollouts, key=lambda r: r["id"]) for key, rollouts in answers.items()}
    untrained, rows, ious = ordered["untrained", None], [], {}
    samples = [[(r["id"], r["image_id"], r["truth"]) for r in rollouts] for rollouts in ordered.values()]
    if any(sample != samples[0] for sample in samples):
        raise ValueError("The closer looks are about different samples; run them again.")
    for number in seeds:
        looked, sampled = ordered["seed", number], ordered["sampled", number]
        ours, base = metrics.iou_matrix(looked), metrics.iou_matrix(untrained)
        consensus, truth_taught = (
            metrics.iou_matrix(choose(sampled, medoid)),
            metrics.iou_matrix(ordered["first", number]),
        )
        ious[number] = {
            BASE: base[:, 0],
            FIRST: ours[:, 0],
            CLOSER: ours[:, -1],
            SAMPLED: consensus[:, 0],
            TAUGHT: truth_taught[:, 0],
            UNTRAINED: base[:, -1],
        }
        ious[number] |= {label: metrics.iou_matrix(ordered[name, number])[:, -1] for name, label in controls.items()}
    looks = len(untrained[0]["steps"])
    answers_given = {BASE: 1, FIRST: 1, CLOSER: looks, SAMPLED: len(sampled[0]["steps"]), TAUGHT: 1, UNTRAINED: looks}
    answers_given |= {label: 2 if name in VIEWS else 1 for name, label in controls.items()}
    images = [rollout["image_id"] for rollout in untrained]
    for label, numbers in [*((number, [number]) for number in seeds), ("mean", seeds)]:
        scores = {
            metric: {name: np.array([score(ious[number][name]) for number in numbers]) for name in answers_given}
            for metric, score in (("acc50", metrics.is_right), ("miou", lambda v: v))
        }
        compared = [pair for pair in COMPARISONS if answers_given.keys() >= set(pair)]
        for a, b in [*((name, None) for name in answers_given), *compared]:
            gains = {metric: of[a] * 1.0 - of[b] if b else of[a] for metric, of in scores.items()}
            if len(numbers) > 1:
                cells = {metric: metrics.over_seeds(each, images, not b) for metric, each in gains.items()}
            else:
                cells = {metric: metrics.mean_interval(each[0], images, resampling) for metric, each in gains.items()}
            name = f"{a} - {b}" if b else a
            rows.append(
                {"name": name, "seed": label, "seeds": numbers, "answers": None if b else answers_given[a], **cells}
            )
    return rows

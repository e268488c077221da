"""The closed loop: what is shown after each answer, with scripted answers and with a real model."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from ivt_utils import loop, protocol
from ivt_utils.overlay import ImageError, draw_box, load_image
from ivt_utils.profiles import get_profile
from ivt_utils.records import load_split
from ivt_utils.runtime.store import REFERENCE, Run
from ivt_utils.student import load_student

MICRO = get_profile("micro")
BOXES = [(100, 200, 300, 400), (110, 220, 330, 440), (120, 240, 360, 480), (0, 0, 1000, 1000)]


@pytest.fixture
def play(monkeypatch, records):
    """Run the loop on scripted texts: `play(script, **options)` -> (rollouts, the chats at each call)."""

    def run(script, rows=records, **options):
        shown, turns = [], options.get("turns", 2) + 1

        def generate(student, chats, *_):
            shown.append([list(chat) for chat in chats])
            turn = (len(shown) - 1) % turns
            return [script(turn, i) for i in range(len(chats))]

        monkeypatch.setattr(loop, "generate", generate)
        return loop.evaluate("no student", rows, MICRO, **options), shown

    return run


def fine(turn, i):
    return protocol.answer_text(BOXES[turn], "It fits: keep it." if turn else "")


def images_of(chat) -> list:
    return [part["image"].tobytes() for message in chat for part in message["content"] if part["type"] == "image"]


def texts_of(chat) -> list[str]:
    return [part["text"] for message in chat for part in message["content"] if part["type"] == "text"]


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_t_refinements_give_t_plus_one_steps(play, records, turns):
    rollouts, shown = play(fine, turns=turns)
    assert len(rollouts) == len(records) and len(shown) == turns + 1
    for rollout, record in zip(rollouts, records, strict=True):
        assert {k: rollout[k] for k in ("id", "image_id", "subset", "expression")} == {
            k: record[k] for k in ("id", "image_id", "subset", "expression")
        }
        assert rollout["truth"] == record["bbox"] and set(rollout) == {
            "id",
            "image_id",
            "subset",
            "expression",
            "truth",
            "steps",
        }
        assert [step["box"] for step in rollout["steps"]] == BOXES[: turns + 1]
        assert [step["text"] for step in rollout["steps"]] == [fine(turn, 0) for turn in range(turns + 1)]
    assert json.loads(json.dumps(rollouts))[0]["steps"][0]["box"] == list(BOXES[0])


def test_fewer_than_no_refinements_is_one_sentence(play):
    with pytest.raises(ValueError, match="0 or more refinements, not -1"):
        play(fine, turns=-1)


@pytest.mark.parametrize("style", ["filled", "outline", "none"])
def test_every_feedback_is_the_original_image_with_the_latest_box_alone(play, records, style):
    _, shown = play(fine, style=style)
    for chat, record in zip(shown[2], records, strict=True):
        image = record["image"]
        drawn = [draw_box(image, box, style).tobytes() for box in BOXES[:2]]
        assert images_of(chat) == [image.tobytes(), *drawn]
        assert (drawn[0] == image.tobytes()) == (style == "none")
        assert texts_of(chat) == [
            protocol.PROMPT[0] + record["expression"] + protocol.PROMPT[1],
            fine(0, 0),
            protocol.FEEDBACK,
            fine(1, 0),
            protocol.FEEDBACK,
        ]
        assert [message["role"] for message in chat] == ["user", "assistant", "user", "assistant", "user"]


@pytest.mark.parametrize(
    "failing",
    [
        "I cannot see it.",
        "",
        '{"bbox_2d": [1, 2, 3]}',
        '{"bbox_2d": [1, 2, 3, 4, 5]}',
        '{"bbox_2d": [300, 2, 3, 4]}',
        '{"bbox_2d": [1, 2, 3, 1001]}',
        protocol.answer_text(BOXES[0]) * 2,
        '{"bbox_2d": [NaN, 2, 3, 4]}',
    ],
)
def test_after_an_answer_without_a_box_the_bare_image_is_shown_and_said_so(play, records, failing):
    def script(turn, i):
        return failing if turn == 1 and i % 2 else fine(turn, i)

    rollouts, shown = play(script)
    for i, (rollout, chat) in enumerate(zip(rollouts, shown[2], strict=True)):
        image = records[i]["image"]
        box = None if i % 2 else BOXES[1]
        assert [step["box"] for step in rollout["steps"]] == [BOXES[0], box, BOXES[2]]
        assert rollout["steps"][1]["text"] == texts_of(chat)[3] == script(1, i)  # the answer stays in the chat
        assert images_of(chat)[2] == draw_box(image, box).tobytes()
        assert (images_of(chat)[2] == image.tobytes()) == bool(i % 2)
        assert texts_of(chat)[4] == (protocol.FEEDBACK_NO_BOX if i % 2 else protocol.FEEDBACK)


def test_a_first_answer_without_a_box(play, records):
    rollouts, shown = play(lambda turn, i: fine(turn, i) if turn else "nothing")
    assert [step["box"] for step in rollouts[0]["steps"]] == [None, *BOXES[1:3]]
    assert texts_of(shown[1][0])[2] == protocol.FEEDBACK_NO_BOX
    assert images_of(shown[1][0]) == [records[0]["image"].tobytes()] * 2


@pytest.mark.parametrize("size", [1, 4, 6, 100])
def test_batches_change_nothing(play, records, size):
    def script(turn, i):
        return fine(turn, i)

    rollouts, shown = play(script, batch_size=size)
    assert rollouts == play(script)[0]
    assert [len(chats) for chats in shown] == [len(records[s : s + size]) for s in range(0, 6, size) for _ in range(3)]


def test_no_records_give_no_rollouts(play):
    assert play(fine, rows=[]) == ([], [])


def test_the_records_are_left_alone(play, records):
    before = [(record["image"].tobytes(), list(record["bbox"])) for record in records]
    play(fine)
    assert before == [(record["image"].tobytes(), list(record["bbox"])) for record in records]


def test_an_unreadable_image_is_one_sentence(play, records):
    with pytest.raises(ImageError, match="cannot be read"):
        play(fine, rows=[{**records[0], "image": b"not an image"}])


def test_the_profiles_values_and_changes_to_them(monkeypatch):
    asked = []
    monkeypatch.setattr(loop, "run_loop", lambda student, records, **options: asked.append(options))
    profile = replace(get_profile("micro"), turns=3, style="outline", batch_size=7, max_new_tokens=11)
    loop.evaluate("student", [], profile, seed=5)
    loop.evaluate("student", [], profile, progress="label", turns=0, temperature=0.5)
    values = {"turns": 3, "style": "outline", "batch_size": 7, "max_new_tokens": 11, "seed": 5, "progress": ""}
    assert asked == [values, values | {"turns": 0, "temperature": 0.5, "seed": 0, "progress": "label"}]


# --- with a real model


def test_a_real_model_runs_and_gives_the_same_twice(tiny_student, records):
    first, second = (loop.evaluate(tiny_student, records[:2], MICRO, turns=2, max_new_tokens=8) for _ in range(2))
    assert first == second and [len(rollout["steps"]) for rollout in first] == [3, 3]
    assert all("<|" not in step["text"] for rollout in first for step in rollout["steps"])


def test_sampling_depends_on_its_seed_alone(tiny_student, records):
    def texts(seed):
        rollouts = loop.evaluate(
            tiny_student, records[:2], MICRO, turns=1, max_new_tokens=6, temperature=1.0, seed=seed, progress="sampling"
        )
        return [step["text"] for rollout in rollouts for step in rollout["steps"]]

    assert texts(1) == texts(1) != texts(2)


def test_a_chat_is_answered_in_a_batch_as_it_is_alone(tiny_student, records):
    """Padding on the left, images of several chats in one batch: neither may leak into an answer."""
    chats = []
    for i, record in enumerate(records[:3]):
        chat = [protocol.question(record["image"], record["expression"])]
        for box in BOXES[:i]:
            chat += [protocol.answer(protocol.answer_text(box)), protocol.feedback(draw_box(record["image"], box), box)]
        chats.append(chat)
    together = loop.generate(tiny_student, chats, 4, 0.0, 0)
    assert together == [loop.generate(tiny_student, [chat], 4, 0.0, 0)[0] for chat in chats]


def test_the_answer_depends_on_the_image(tiny_student, records):
    import torch

    chat = [protocol.question(records[0]["image"], "the star")]
    other = [protocol.question(records[1]["image"], "the star")]
    inputs = tiny_student.processor.apply_chat_template(
        [chat, other], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.inference_mode():
        logits = tiny_student.model(**inputs).logits[:, -1]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


# --- another second turn


@pytest.mark.parametrize("style", ["filled", "outline", "none"])
@pytest.mark.parametrize("words", ["feedback", "question"])
def test_the_second_turn_has_the_words_and_the_picture_that_were_asked_for(
    play, scripted, monkeypatch, records, words, style
):
    rollouts, _ = play(fine, turns=0)
    asked = []

    def generate(student, chats, *_):
        asked.extend(list(chat) for chat in chats)
        return [protocol.answer_text(BOXES[1])] * len(chats)

    monkeypatch.setattr(loop, "generate", generate)
    shown, profile = [BOXES[2], None] * (len(records) // 2), replace(get_profile("micro"), batch_size=4)
    again = loop.answer_again("no student", records, rollouts, shown, profile, style=style, words=words)
    for record, box, chat, rollout, first in zip(records, shown, asked, again, rollouts, strict=True):
        picture = draw_box(record["image"], box, style)
        feedback = protocol.feedback(picture, BOXES[0])
        second = feedback if words == "feedback" else protocol.question(picture, record["expression"])
        assert texts_of(chat)[:2] == texts_of([protocol.question(None, record["expression"]), chat[1]])
        assert texts_of([chat[2]]) == texts_of([second])
        assert images_of([chat[2]]) == images_of([second])
        answered = {"text": protocol.answer_text(BOXES[1]), "box": BOXES[1], "shown": box}
        assert rollout["steps"] == [first["steps"][0], answered]


@pytest.mark.slow
def test_the_short_loop_is_the_beginning_of_the_long_one(tiny_student, records, tiny_profile, tmp_path):
    long, alone = (Run(replace(tiny_profile, long_turns=turns), 0, tmp_path / str(turns)) for turns in (3, 2))
    short, same = (loop.both_lengths(run, "base_ivt", lambda: tiny_student, records) for run in (long, alone))
    assert short == same and [len(rollout["steps"]) for rollout in short] == [3] * len(records)
    assert [len(rollout["steps"]) for rollout in long.rollouts("base_ivt_long", None)] == [4] * len(records)
    assert set(alone.stages()) == {"rollouts/base_ivt"}


# --- from a box that somebody else gave


def test_the_rollout_from_a_given_box_shows_that_box_and_goes_on_as_the_loop_does(play, monkeypatch, records):
    """Given the box that the student would have answered itself, everything shown and answered is the loop's."""
    profile = replace(get_profile("micro"), style="outline")
    (own, *_), shown = play(fine, rows=records[:1], style="outline")
    asked, loop_asked = [], [shown[1][0], shown[2][0]]

    def generate(student, chats, *_):
        asked.append([list(chat) for chat in chats][0])
        return [fine(len(asked), 0)]

    monkeypatch.setattr(loop, "generate", generate)
    given = loop.answers_from(SimpleNamespace(grid=10), records[0], BOXES[0], profile)
    assert given == own
    assert [images_of(chat) for chat in asked] == [images_of(chat) for chat in loop_asked]
    assert [texts_of(chat) for chat in asked] == [texts_of(chat) for chat in loop_asked]


def test_a_given_box_is_put_on_the_students_grid(scripted, records):
    student = scripted(lambda turn, i: "no box" if turn == 0 else fine(turn, i))
    rollout = loop.answers_from(student, records[0], (103, 297, 508, 1001), get_profile("micro"))
    assert [step["box"] for step in rollout["steps"]] == [(100, 300, 510, 1000), None, BOXES[1]]
    assert rollout["truth"] == records[0]["bbox"] and rollout["steps"][1]["text"] != rollout["steps"][0]["text"]


@pytest.mark.parametrize("bad", [(float("nan"), 0, 1, 1), (0, 0, float("inf"), 1)])
def test_a_given_box_must_be_numbers(records, bad):
    with pytest.raises(ValueError, match="not a finite number"):
        loop.answers_from(SimpleNamespace(grid=1), records[0], bad, get_profile("micro"))


# --- a chat that goes on is read once


@pytest.fixture(scope="module")
def shipped():
    """The SFT student, whose answers have the form of real ones, and 12 validation records."""
    profile = get_profile("micro")
    return load_student(profile, REFERENCE / "adapters" / "sft"), load_split(profile, "val").select(range(12))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"style": "none"}, {"temperature": 0.7}, {"batch_size": 5}])
def test_a_chat_that_goes_on_gets_the_answers_of_one_that_is_read_anew(shipped, options, monkeypatch):
    student, records = shipped
    continued = loop.evaluate(student, records, MICRO, turns=3, **options)
    generate = loop.generate
    monkeypatch.setattr(loop, "generate", lambda *inputs: generate(*inputs[:5]))
    assert continued == loop.evaluate(student, records, MICRO, turns=3, **options)
    assert all(step["box"] for rollout in continued for step in rollout["steps"]) or options


def test_each_image_of_a_chat_is_encoded_once(shipped, monkeypatch):
    student, records = shipped
    visual, encoded = student.model.base_model if hasattr(student.model, "peft_config") else student.model, []
    visual = visual.model.visual
    whole = visual.forward

    def forward(pixels, grid_thw, **options):
        encoded.append(len(grid_thw))
        return whole(pixels, grid_thw, **options)

    monkeypatch.setattr(visual, "forward", forward)
    kind, prepared = type(student.processor.image_processor), []
    prepare = kind.__call__

    def count(processor, images, **options):
        prepared.append(len(images))
        return prepare(processor, images, **options)

    monkeypatch.setattr(kind, "__call__", count)
    loop.evaluate(student, records, MICRO, turns=3)
    assert encoded == prepared == [12] * 4
    assert type(student.processor.image_processor) is kind  # as it was before


def test_a_chat_that_does_not_go_on_is_read_anew(shipped):
    student, records = shipped
    asked = [[protocol.question(load_image(r["image"]), r["expression"])] for r in records]
    earlier = {}
    loop.generate(student, asked, 32, 0.0, 0, earlier)
    others = asked[::-1]
    assert loop.generate(student, others, 32, 0.0, 0, earlier) == loop.generate(student, others, 32, 0.0, 0)

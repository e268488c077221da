"""The chats of pretraining: what they hold and what they never hold, and batches from a seed."""

import random
import re

import pytest
import torch

from ivt_utils import protocol
from ivt_utils.boxes import iou, parse_answer, valid
from ivt_utils.micro import chats, scenes
from ivt_utils.micro import model as micro
from ivt_utils.profiles import STUDENT_RECIPE

FOLLOW_UPS = (*protocol.AGAIN, *protocol.ANOTHER)


def text_of(message) -> str:
    return message["content"][-1]["text"]


def pictures_of(chat) -> list[bytes]:
    return [part["image"].tobytes() for m in chat for part in m["content"] if part["type"] == "image"]


@pytest.mark.parametrize("images, questions", STUDENT_RECIPE.chats)
def test_a_chat_has_its_images_and_an_answer_on_the_grid_after_every_turn(images, questions):
    for seed in range(8):
        chat, shown, asked = chats.sample_chat(random.Random(seed), 6, images, questions)
        assert [message["role"] for message in chat] == ["user", "assistant"] * len(asked)
        assert sum(not again for *_, again in asked) <= images * questions
        assert chat[0]["content"][0]["type"] == "image"
        assert pictures_of(chat) == [scenes.draw_scene(scene).tobytes() for scene in shown] and len(shown) == images
        for message, (image, _, target, _) in zip(chat[1::2], asked, strict=True):
            box = parse_answer(text_of(message))
            assert valid(box) and all(v % micro.GRID == 0 for v in box)
            assert iou(box, shown[image].things[target].box) > 0.8


def test_a_user_turn_asks_a_question_or_follows_up_and_the_right_answer_follows():
    """Without an image, a follow-up wants the answer before; with one, the thing that the same words name there."""
    rng, kinds = random.Random(0), {"question": 0, "again": 0, "another": 0}
    for _ in range(60):
        chat, shown, asked = chats.sample_chat(rng, 8, *rng.choice(STUDENT_RECIPE.chats))
        for i, (image, words, target, again) in enumerate(asked):
            turn, answer = chat[2 * i : 2 * i + 2]
            if text_of(turn) == text_of(protocol.question(None, words)):
                kinds["question"] += 1
                assert not again
            elif again:
                kinds["again"] += 1
                assert text_of(turn) in protocol.AGAIN and len(turn["content"]) == 1
                assert answer == chat[2 * i - 1] and asked[i][:3] == asked[i - 1][:3]
            else:
                kinds["another"] += 1
                phrases = text_of(turn).split("\n")
                assert set(phrases) <= set(protocol.ANOTHER) and len(phrases) <= STUDENT_RECIPE.phrases
                assert turn["content"][0]["type"] == "image"
                assert words == asked[i - 1][1] and image == asked[i - 1][0] + 1
                old, new = shown[image - 1].things, shown[image].things
                sizes = [{(t.shape, t.color, round(t.side, 6)) for t in things} for things in (new, old)]
                assert sizes[0] <= sizes[1]
                assert not {t.box for t in new} & {t.box for t in old} and 0 <= target < len(new)
    assert min(kinds.values()) > 15


def test_in_the_other_scene_the_same_meaning_singles_out_the_new_referent():
    rng, found = random.Random(3), 0
    for _ in range(40):
        scene, [(form, _), *_] = scenes.sample_forms(rng, rng.choice(scenes.SUBSETS), 6, 1)
        if moved := chats.moved_scene(rng, scene, form):
            found += 1
            assert scenes.is_unique(moved[0], form, moved[1])
    assert found > 30


def test_no_chat_holds_an_overlay_the_feedback_or_a_phrase_of_a_trace():
    """They are what the course teaches; the student must not know them beforehand."""
    rng = random.Random(0)
    phrases = (
        protocol.FEEDBACK,
        protocol.FEEDBACK_NO_BOX,
        protocol.TRACE_OPENS,
        protocol.TRACE_FITS,
        *protocol.PROBLEMS,
        *protocol.PROBLEMS.values(),
    )
    for _ in range(60):
        chat, _, _ = chats.sample_chat(rng, 8, *rng.choice(STUDENT_RECIPE.chats))
        for message in chat:
            text = text_of(message)
            allowed = text.startswith(protocol.PROMPT[0]) or set(text.split("\n")) <= set(FOLLOW_UPS)
            assert allowed if message["role"] == "user" else text.startswith('{"bbox_2d": [')
            assert not any(phrase.lower() in text.lower() for phrase in phrases)
            for part in message["content"]:
                if part["type"] == "image":
                    assert (255, 0, 0) not in {color for _, color in part["image"].getcolors(192 * 192)}


def in_a_row(text: str, count: int) -> set[tuple]:
    """Every `count` words of a text that follow each other within a sentence."""
    parts = [re.findall("[a-z]+", part) for part in re.split("[.?]", text.lower())]
    return {tuple(words[i : i + count]) for words in parts for i in range(len(words) - count + 1)}


def test_the_follow_ups_know_every_word_of_the_loop_and_say_none_of_its_phrases():
    known = {word for phrase in FOLLOW_UPS for word in re.findall(" ?[A-Za-z]+|[.,:?]", phrase)}
    traces = [
        protocol.TRACE_FITS,
        *(f"{protocol.TRACE_OPENS} {a} and {a}: {b} and {b}." for a, b in protocol.PROBLEMS.items()),
    ]
    for text in (protocol.FEEDBACK, protocol.FEEDBACK_NO_BOX, *traces):
        assert set(re.findall(" ?[A-Za-z]+|[.,:?]", text)) <= known
        assert not any(in_a_row(text, 4) & in_a_row(phrase, 4) for phrase in FOLLOW_UPS)
    with_image = {word for phrase in protocol.ANOTHER for word in re.findall(" ?[A-Za-z]+|[.,:?]", phrase)}
    assert set(re.findall(" ?[A-Za-z]+|[.,:?]", protocol.FEEDBACK + protocol.FEEDBACK_NO_BOX)) <= with_image


def test_a_further_image_may_be_the_same_one_with_new_questions():
    rng, same = random.Random(1), []
    for _ in range(60):
        first, second = pictures_of(chats.sample_chat(rng, 6, 2, 1)[0])
        same.append(first == second)
    assert 0.05 < sum(same) / len(same) < 0.5


BEGIN = STUDENT_RECIPE.vision_steps  # the first step of the text model


@pytest.mark.parametrize("step, level", [(0, 8), (BEGIN, 3), (BEGIN + 4, 8)])
def test_a_batch_depends_on_seed_step_and_level_alone(step, level):
    (one, labels), (two, again) = chats.make_batch(3, step, level), chats.make_batch(3, step, level)
    assert set(one) == {"input_ids", "mm_token_type_ids", "pixel_values", "image_grid_thw"}
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert all(torch.equal(labels[key], again[key]) for key in ("cells", "said", "shown", "again"))
    assert len(one["input_ids"]) == chats.STUDENT_RECIPE.batch_size
    for other, _ in (chats.make_batch(4, step, level), chats.make_batch(3, step + 1, level)):
        assert not torch.equal(one["pixel_values"][:144], other["pixel_values"][:144])
        assert not torch.equal(one["input_ids"][:, :90], other["input_ids"][:, :90])
    images = (one["input_ids"] == chats._processor.image_token_id).sum()
    assert images == len(one["pixel_values"]) // 4 == (one["mm_token_type_ids"] == 1).sum() == len(labels["cells"])


@pytest.mark.parametrize("step", [BEGIN, BEGIN + 1, BEGIN + 7])
def test_the_labels_of_an_answer_are_its_words_and_its_referent_s_image_tokens(step):
    """Read back from the batch: the words out of the ids, the referent's place out of the answer's numbers."""
    batch, labels = chats.make_batch(0, step, 8)
    tokenizer, side = chats._processor.tokenizer, 6
    row, at = chats.answer_mask(batch["input_ids"], tokenizer).nonzero().view(-1, 7, 2).unbind(-1)
    assert len(row) == len(labels["said"]) == len(labels["shown"])
    for answer, (chat, first) in enumerate(zip(row[:, 0].tolist(), at[:, 0].tolist(), strict=True)):
        ids = batch["input_ids"][chat]
        asked = tokenizer.decode(ids[:first]).split(protocol.PROMPT[0])[-1].split(protocol.PROMPT[1])[0]
        share = dict(zip(micro.expression_words(), labels["said"][answer].tolist(), strict=True))
        said = {word.strip() for word, value in share.items() if value}
        assert said == set(asked.split()) and sum(share.values()) == pytest.approx(1)
        box = parse_answer(tokenizer.decode(ids[at[answer]], skip_special_tokens=True))
        shown = labels["shown"][answer].nonzero()[:, 0]
        images = (ids == chats._processor.image_token_id).nonzero()[:, 0]
        images = images[images < first][-side * side :]  # of the latest image
        for cell in (images == shown[:, None]).nonzero()[:, 1].tolist():
            x, y = (cell % side + 0.5) * 1000 / side, (cell // side + 0.5) * 1000 / side
            margin = 10 if len(shown) > 1 else 90  # a thing under no center has the nearest token
            assert box[0] - margin <= x <= box[2] + margin and box[1] - margin <= y <= box[3] + margin
        assert len(shown) == (images == shown[:, None]).sum() >= 1


def test_the_referent_has_the_tokens_where_it_lies_on_top_or_else_the_one_at_its_center():
    below = scenes.Thing("star", "red", "large", (0, 0, 400, 400), scenes.COLORS["red"])
    above = scenes.Thing("cross", "blue", "small", (300, 300, 500, 500), scenes.COLORS["blue"])
    tiny = scenes.Thing("cross", "red", "small", (610, 610, 680, 680), scenes.COLORS["red"])  # between four centers
    cells = chats.label_cells(scenes.Scene((below, above, tiny), ("plain", (240,) * 3, (230,) * 3)), 6)
    assert chats.referent_cells(above, cells) == [14]
    assert chats.referent_cells(below, cells) == [0, 1, 6, 7]
    assert chats.referent_cells(tiny, cells) == [3 * 6 + 3]


def test_the_label_of_an_image_token_is_the_thing_on_top_at_its_center():
    below = scenes.Thing("star", "red", "large", (0, 0, 400, 400), scenes.COLORS["red"])
    above = scenes.Thing("cross", "blue", "small", (300, 300, 500, 500), scenes.COLORS["blue"])
    cells = chats.label_cells(scenes.Scene((below, above), ("plain", (240,) * 3, (230,) * 3)), 6)
    star, cross = [1, 4, 0, 0, 0.4, 0.4], [5, 5, 0.3, 0.3, 0.5, 0.5]  # indices from 1 in COLORS and SHAPES
    nothing = [0] * 6
    assert cells[0] == cells[7] == star and cells[6 * 2 + 2] == cross and cells[6] == star
    assert cells[3] == cells[35] == cells[6 * 2 + 3] == nothing and len(cells) == 36
    assert cells[1 * 6 + 2] == nothing  # x 417, y 250: right of the star, above the cross


def test_the_mask_covers_the_answer_and_its_end(processor):
    chat = []
    for expression, box in (("the star", (10, 20, 30, 1000)), ("the red cross", (0, 0, 500, 990))):
        chat += [protocol.question(None, expression), protocol.answer(protocol.answer_text(box))]
    ids = torch.tensor([processor.tokenizer.apply_chat_template(chat, return_dict=False)])
    mask = chats.answer_mask(ids, processor.tokenizer)
    assert processor.tokenizer.decode(ids[mask]) == "".join(m["content"][0]["text"] + "<|im_end|>" for m in chat[1::2])
    assert mask.sum() == 14

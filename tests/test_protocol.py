"""The protocol: the same words and the same token ids in pretraining, the closed loop, SFT and GRPO.

A difference of one token between training and evaluation costs a small model many points, so every path that turns a
chat into ids is compared with the others here.
"""

import copy
import itertools
import random
import re
from importlib import resources
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ivt_utils import grpo, protocol, sft
from ivt_utils.boxes import parse_answer
from ivt_utils.loop import evaluate
from ivt_utils.micro import chats, scenes
from ivt_utils.micro import model as micro
from ivt_utils.overlay import draw_box
from ivt_utils.profiles import STUDENT_RECIPE, get_profile

BOXES = [(100, 200, 300, 400), (110, 220, 330, 440), (120, 240, 360, 480)]
TRACES = ["", "It is too high and too narrow: move down and make it wider.", "It fits: keep it."]
TEXTS = [protocol.answer_text(box, trace) for box, trace in zip(BOXES, TRACES, strict=True)]
CALL = {"type": "function", "function": {"name": "other", "arguments": {"a": [1, "ü"], "b": None}}}


def all_traces() -> list[str]:
    """Every trace that the teacher can write."""
    words = protocol.PROBLEMS
    pairs = [(a,) for a in words] + list(itertools.permutations(words, 2))
    return [protocol.TRACE_FITS] + [
        f"{protocol.TRACE_OPENS} {' and '.join(wrong)}: {' and '.join(words[w] for w in wrong)}." for wrong in pairs
    ]


# --- the chat template

IMAGE = {"type": "image"}
TEXT = st.text(max_size=20).map(lambda text: {"type": "text", "text": text})
PARTS = st.one_of(st.text(max_size=20), st.lists(st.one_of(TEXT, st.just(IMAGE)), max_size=3))
ANSWERS = st.one_of(st.text(max_size=20), st.lists(TEXT, max_size=2))
CHATS = st.builds(
    lambda system, turns: [*system, *itertools.chain(*turns)],
    st.lists(ANSWERS.map(lambda c: {"role": "system", "content": c}), max_size=1),
    st.lists(
        st.tuples(
            PARTS.map(lambda c: {"role": "user", "content": c}),
            ANSWERS.map(lambda c: {"role": "assistant", "content": c}),
        ),
        min_size=1,
        max_size=3,
    ),
)


@pytest.fixture(scope="module")
def render(processor):
    """(chat, which template, open the assistant's turn) -> text; "qwen" is the template that TRL ships."""
    qwen = (resources.files("trl") / "chat_templates" / "qwen3_vl.jinja").read_text(encoding="utf-8")
    templates = {"ours": protocol.chat_template(), "qwen": qwen}
    return lambda chat, which="ours", opened=False: processor.tokenizer.apply_chat_template(
        chat, chat_template=templates[which], tokenize=False, add_generation_prompt=opened
    )


@settings(max_examples=200)
@given(chat=CHATS, opened=st.booleans(), whole=st.booleans())
def test_plain_turns_render_as_qwens_own_template_does(render, chat, opened, whole):
    chat = chat if whole else chat[:-1]  # ends on the user's turn, as a prompt does
    assert render(chat, "ours", opened) == render(chat, "qwen", opened)


def test_the_tokenizer_and_the_processor_carry_the_template(processor):
    assert processor.chat_template == processor.tokenizer.chat_template == protocol.chat_template()


@pytest.mark.parametrize(
    "content",
    [
        "text",
        [],
        [{"type": "text", "text": "a"}],
        protocol.feedback_content("an image", BOXES[0]),
        protocol.feedback_content("an image", None),
    ],
)
@pytest.mark.parametrize("opened", [True, False])
def test_a_tool_turn_and_a_user_turn_are_the_same_bytes(render, content, opened):
    before = [{"role": "user", "content": "question"}, protocol.answer(TEXTS[0])]
    tool = render([*before, {"role": "tool", "name": "draw_box", "content": content}], opened=opened)
    assert tool == render([*before, {"role": "user", "content": content}], opened=opened)
    assert "tool" not in tool


def test_tools_are_not_shown_to_the_model(processor):
    chat = [{"role": "user", "content": "question"}]
    schema = {"type": "function", "function": {"name": "draw_box", "description": "", "parameters": {}}}
    plain, tools = (processor.tokenizer.apply_chat_template(chat, tools=t, tokenize=False) for t in (None, [schema]))
    assert plain == tools == "<|im_start|>user\nquestion<|im_end|>\n"


def test_a_call_of_another_tool_renders_as_qwens_own_template_does(render):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert render(chat) == render(chat, "qwen") and '"name": "other"' in render(chat)


def test_a_call_of_draw_box_renders_as_the_model_writes_it(render):
    call = {"type": "function", "function": {"name": "draw_box", "arguments": {"bbox_2d": list(BOXES[0])}}}
    for one in (call, call["function"]):
        called = render([{"role": "assistant", "content": "", "tool_calls": [one]}])
        assert called == render([protocol.answer(TEXTS[0])])


def test_trl_keeps_the_template_as_it_is(processor):
    from trl import chat_template_utils as trl

    assert trl.is_chat_template_prefix_preserving(processor)
    assert trl.has_generation_markers(processor.chat_template)
    assert trl.is_chat_template_stop_token_trained(processor)


# --- words and tokens


def protocol_texts() -> list[str]:
    rng = random.Random(0)
    said = []
    for subset in scenes.SUBSETS:
        for _ in range(60):
            said += [text for text, _ in scenes.sample_questions(rng, subset, 6, 2)[1]]
    answers = [protocol.answer_text(BOXES[i % 3], trace) for i, trace in enumerate(["", *all_traces()])]
    return [
        *(protocol.PROMPT[0] + text + protocol.PROMPT[1] for text in said),
        *answers,
        *said,
        *all_traces(),
        protocol.FEEDBACK,
        protocol.FEEDBACK_NO_BOX,
        *protocol.AGAIN,
        *protocol.ANOTHER,
    ]


def test_every_text_of_the_protocol_survives_encoding(processor):
    tokenizer = processor.tokenizer
    texts = protocol_texts()
    for text, ids in zip(texts, tokenizer(texts)["input_ids"], strict=True):
        assert tokenizer.unk_token_id not in ids, text
        assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_box_is_six_tokens_and_a_sentence_is_its_words(processor):
    encode, pieces = processor.tokenizer.encode, processor.tokenizer.tokenize
    assert len(encode(TEXTS[0])) == 6
    for text in (protocol.FEEDBACK, protocol.FEEDBACK_NO_BOX, *all_traces()):
        assert pieces(text) == re.findall(" ?[A-Za-z]+|[.,:]", text)
    prompt = encode(protocol.PROMPT[0] + "the red star" + protocol.PROMPT[1])
    assert len(prompt) == 5
    assert max(len(encode(protocol.answer_text(BOXES[0], trace))) for trace in all_traces()) + 1 <= 32  # max_new_tokens


def test_an_answer_as_it_is_written():
    assert protocol.answer_text((1, 2, 3, 4)) == '{"bbox_2d": [1, 2, 3, 4]}'
    assert protocol.answer_text((1, 2, 3, 4), "It fits: keep it.") == 'It fits: keep it. {"bbox_2d": [1, 2, 3, 4]}'
    assert protocol.answer("text") == {"role": "assistant", "content": [{"type": "text", "text": "text"}]}


def test_what_each_turn_says():
    content = protocol.question("an image", "the star")["content"]
    assert [part["type"] for part in content] == ["image", "text"] and "the star" in content[1]["text"]
    assert protocol.question(None, "the star")["content"] == content[1:]
    shown, bare = (protocol.feedback("an image", box)["content"] for box in (BOXES[0], None))
    assert shown[0] == bare[0] == {"type": "image", "image": "an image"}
    assert shown[1]["text"] == protocol.FEEDBACK != bare[1]["text"] == protocol.FEEDBACK_NO_BOX
    assert "no valid box" in protocol.FEEDBACK_NO_BOX


# --- answers as calls


@pytest.fixture(scope="module")
def called(processor):
    """(ids, tools) -> the message as TRL parses it."""
    from trl.chat_template_utils import parse_response

    tokenizer = copy.copy(processor.tokenizer)
    grpo.answers_as_calls(tokenizer)
    prefix = tokenizer.encode("<|im_start|>assistant\n")
    return lambda ids, tools=None: parse_response(tokenizer, ids, prefix=prefix, tools=tools)


@pytest.mark.parametrize(
    "text, box", [*zip(TEXTS, BOXES, strict=True), ("It fits: keep it.", None), (TEXTS[0] * 2, None)]
)
@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>", ""])
def test_an_answer_is_one_call_of_draw_box(processor, called, text, box, end):
    ids = processor.tokenizer.encode(text + end)
    for tools in (None, [grpo.make_environment()().draw_box]):
        message = called(ids, tools)
        arguments = {"bbox_2d": box, "ended": end == "<|im_end|>"}
        call = {"type": "function", "function": {"name": "draw_box", "arguments": arguments}}
        assert message == {"role": "assistant", "content": text, "tool_calls": [call]}


PIECES = [
    '{"bbox_2d": [',
    ' {"bbox_2d": [',
    "]}",
    "0",
    "10",
    "50",
    "1000",
    ", 0",
    ", 60",
    ", 80",
    ", 1000",
    " ",
    "\n",
    ",",
    ".",
    " star",
    "It is",
    " too high",
    "<|im_end|>",
]
WHOLE = ['{"bbox_2d": [', "10", ", 0", ", 60", ", 80", "]}"]


@settings(max_examples=400)
@given(st.lists(st.one_of(st.sampled_from(PIECES).map(lambda p: [p]), st.just(WHOLE)), min_size=1, max_size=6))
def test_grpo_reads_any_sampled_answer_as_the_loop_does(processor, called, records, pieces):
    """What the loop takes for a box is what TRL draws and what the reward scores; without one the image is bare."""
    tokenizer = processor.tokenizer
    ids = tokenizer.convert_tokens_to_ids(list(itertools.chain(*pieces)))
    if tokenizer.eos_token_id in ids:
        ids = ids[: ids.index(tokenizer.eos_token_id) + 1]  # generation stops there
    box = parse_answer(tokenizer.decode(ids, skip_special_tokens=True))
    message = called(ids)
    assert grpo.boxes_of([message]) == [box]
    environment = grpo.make_environment()()
    environment.reset(images=[records[0]["image"]])
    (call,) = message["tool_calls"]
    image, request = environment.draw_box(**call["function"]["arguments"])
    assert request == protocol.feedback_content(None, box)[1]
    assert image["image"].tobytes() == draw_box(records[0]["image"], box).tobytes()


# --- the same ids on every path


@pytest.fixture(scope="module")
def collated(processor, records):
    """One trajectory as SFT's collator makes it: ids, labels, pixel values."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    steps = [{"text": text, "box": box} for text, box in zip(TEXTS, BOXES, strict=True)]
    rows = sft.trajectories_dataset(records[:1], [{**records[0], "steps": steps}])
    return DataCollatorForVisionLanguageModeling(processor=processor, max_length=None, assistant_only_loss=True)(
        [rows[0]]
    )


def test_the_loop_shows_the_ids_and_pixels_that_sft_trains_on(collated, scripted, records):
    model = scripted(lambda turn, _: TEXTS[turn])
    rollout = evaluate(model, records[:1], get_profile("micro"), turns=2)[0]
    assert [step["box"] for step in rollout["steps"]] == BOXES
    ids, tokenizer = collated["input_ids"][0].tolist(), model.processor.tokenizer
    for turn, text in enumerate(TEXTS):
        prompt = model.model.prompt_ids(turn, 0)
        assert ids[: len(prompt)] == prompt
        answer = tokenizer.encode(text + "<|im_end|>\n")
        assert ids[len(prompt) : len(prompt) + len(answer)] == answer
    assert len(prompt) + len(answer) == len(ids)
    last = model.model.shown[2]
    assert torch.equal(last["pixel_values"], collated["pixel_values"])
    assert torch.equal(last["image_grid_thw"], collated["image_grid_thw"])
    assert torch.equal(last["mm_token_type_ids"][0], collated["mm_token_type_ids"][0][: len(prompt)])


def test_grpo_builds_the_ids_that_sft_trains_on(collated, processor, records):
    from trl import GRPOTrainer

    tokenizer = processor.tokenizer
    image, expression = records[0]["image"], records[0]["expression"]
    environment = grpo.make_environment()()
    environment.reset(images=[image])
    trainer = SimpleNamespace(
        _is_vlm=True, processing_class=processor, _tokenizer=tokenizer, chat_template=None, chat_template_kwargs={}
    )
    ids = processor.apply_chat_template(
        [[protocol.question(image, expression)]], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"][0]
    for text, box in zip(TEXTS, BOXES, strict=True):
        ids = ids + tokenizer.encode(text + "<|im_end|>")
        if box != BOXES[-1]:  # the last box is not executed
            message = {"role": "tool", "name": "draw_box", "content": environment.draw_box(list(box))}
            ids = ids + GRPOTrainer._get_tool_suffix_ids(trainer, [message])
    assert ids + tokenizer.encode("\n") == collated["input_ids"][0].tolist()


def test_the_loss_covers_each_answer_and_its_end_and_nothing_else(collated, processor):
    ids, labels = collated["input_ids"][0].tolist(), collated["labels"][0].tolist()
    assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))
    spans = [list(group) for learned, group in itertools.groupby(labels, lambda v: v != -100) if learned]
    assert [processor.tokenizer.decode(span) for span in spans] == [text + "<|im_end|>" for text in TEXTS]


def test_a_chat_holds_the_original_image_with_one_box_each_time(records):
    image = records[0]["image"]
    steps = [{"text": text, "box": box} for text, box in zip(TEXTS, [BOXES[0], None, BOXES[2]], strict=True)]
    chat = protocol.transcript(image, "the star", steps, draw_box)
    assert [message["role"] for message in chat] == ["user", "assistant"] * 3
    shown = [part["image"].tobytes() for message in chat for part in message["content"] if "image" in part]
    assert shown == [image.tobytes(), draw_box(image, BOXES[0]).tobytes(), image.tobytes()]
    asked = [message["content"][-1]["text"] for message in chat[::2]]
    assert asked[1:] == [protocol.FEEDBACK, protocol.FEEDBACK_NO_BOX]
    assert protocol.transcript(image, "the star", steps[:1], draw_box) == chat[:2]


def batch_of(monkeypatch, step: int, level: int) -> tuple[list, dict]:
    """The chats of a pretraining batch, and the batch."""
    drawn, sample = [], chats.sample_chat

    def keep(*args):
        made = sample(*args)
        drawn.append(made[0])
        return made

    monkeypatch.setattr(chats, "sample_chat", keep)
    return drawn, chats.make_batch(0, STUDENT_RECIPE.vision_steps + step, level)[0]


@pytest.mark.parametrize("step, level", [(0, 3), (2, 8), (3, 8), (7, 8)])
def test_pretraining_asks_with_the_ids_of_the_loop(step, level, scripted, monkeypatch):
    drawn, batch = batch_of(monkeypatch, step, level)
    asked = [chat[0]["content"] for chat in drawn]
    records = [
        {
            "id": str(i),
            "image_id": str(i),
            "subset": "attributes",
            "bbox": (0, 0, 1, 1),
            "image": image["image"],
            "expression": text["text"].removeprefix(protocol.PROMPT[0]).removesuffix(protocol.PROMPT[1]),
        }
        for i, (image, text) in enumerate(asked)
    ]
    model = scripted(lambda turn, i: drawn[i][1]["content"][0]["text"])
    rollouts = evaluate(model, records, get_profile("micro"), turns=0)
    assert all(rollout["steps"][0]["box"] for rollout in rollouts) and len(records) == len(batch["input_ids"])
    patches = 0
    for i, chat in enumerate(drawn):
        prompt = model.model.prompt_ids(0, i)
        answer = model.processor.tokenizer.encode(chat[1]["content"][0]["text"] + "<|im_end|>")
        assert batch["input_ids"][i][: len(prompt) + len(answer)].tolist() == prompt + answer
        shown = sum("image" in part for message in chat for part in message["content"])
        mine = model.model.shown[0]["pixel_values"][i * 144 : (i + 1) * 144]
        assert torch.equal(batch["pixel_values"][patches : patches + 144], mine)
        patches += 144 * shown
    assert patches == len(batch["pixel_values"])


@pytest.mark.parametrize("step, level", [(0, 3), (2, 8), (3, 8), (7, 8)])
def test_pretraining_learns_the_tokens_that_sft_learns(step, level, processor, monkeypatch):
    drawn, batch = batch_of(monkeypatch, step, level)
    ids = batch["input_ids"]
    marked = processor.apply_chat_template(
        drawn,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": "right"},
    )
    assert torch.equal(marked["input_ids"], ids)
    marks = torch.as_tensor(marked["assistant_masks"]).bool()
    assert torch.equal(marks, chats.answer_mask(ids, processor.tokenizer))


def test_no_word_of_an_expression_or_a_follow_up_is_an_answer_token(processor):
    """Pretraining finds the answers by their tokens, so the rest of a chat must not hold any."""
    text = protocol.PROMPT[0] + " ".join(w.strip() for w in micro.expression_words()) + protocol.PROMPT[1]
    text += " ".join((*protocol.AGAIN, *protocol.ANOTHER))
    ids = torch.tensor([processor.tokenizer.encode(f"<|im_start|>user\n{text}<|im_end|>\n")])
    assert not chats.answer_mask(ids, processor.tokenizer).any()

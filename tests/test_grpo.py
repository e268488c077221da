"""GRPO: the environment, the reward and each trap on the way; then TRL's own trainer on scripted answers."""

import inspect
import io
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ScriptedModel
from PIL import Image
from safetensors.torch import load_file

from ivt_utils import grpo, protocol, student
from ivt_utils.boxes import iou, snap
from ivt_utils.exercises import find
from ivt_utils.loop import evaluate
from ivt_utils.metrics import iou_matrix
from ivt_utils.micro import model as micro
from ivt_utils.overlay import draw_box, load_image
from ivt_utils.profiles import STUDENT_RECIPE, get_profile, grpo_trial
from ivt_utils.records import load_split
from ivt_utils.runtime.files import ROOT, ArtefactError

BOX, OTHER, TRUTH = (100, 200, 300, 400), (500, 500, 700, 900), [100.0, 200.0, 300.0, 500.0]


def said(content="", box=None) -> dict:
    """An assistant message as TRL parses it; `box` is written behind its text."""
    return {"role": "assistant", "content": protocol.answer_text(box, content) if box else content}


def shown(content="feedback") -> dict:
    return {"role": "tool", "name": "draw_box", "content": content}


GOOD = [said("", OTHER), shown(), said("It is too high: move down.", OTHER), shown(), said("", BOX)]


# --- the environment


@pytest.fixture
def environment(records):
    made = grpo.make_environment()()
    assert made.reset(images=[records[0]["image"]], truth=TRUTH, prompt="...") is None  # nothing joins the prompt
    return made


def test_the_feedback_is_that_of_the_loop(environment, records):
    image = records[0]["image"]
    for box in (BOX, None, OTHER):  # each on the original, not on the one before
        content = environment.draw_box(box)
        wanted = protocol.feedback(draw_box(image, box), box)["content"]
        assert content[0]["image"].tobytes() == wanted[0]["image"].tobytes()
        assert content[1] == wanted[1] and len(content) == 2 and content[0]["type"] == "image"
    environment.reset(images=[records[1]["image"]])
    assert environment.draw_box(list(BOX))[0]["image"].tobytes() == draw_box(records[1]["image"], BOX).tobytes()


def test_the_style_is_passed_on(records):
    made = grpo.make_environment("outline")()
    made.reset(images=[records[0]["image"]])
    outline = draw_box(records[0]["image"], BOX, "outline").tobytes()
    assert made.draw_box(list(BOX))[0]["image"].tobytes() == outline


def test_the_environment_has_one_tool_with_a_schema():
    from transformers.utils import get_json_schema

    made = grpo.make_environment()()
    assert [name for name in dir(made) if not name.startswith("_")] == ["draw_box", "reset"]
    schema = get_json_schema(made.draw_box)["function"]
    assert schema["name"] == "draw_box" and schema["parameters"]["required"] == ["bbox_2d"]


# --- reading a rollout


def test_the_boxes_of_a_rollout():
    assert grpo.boxes_of(GOOD) == [OTHER, OTHER, BOX]
    assert grpo.boxes_of([said("", BOX)]) == [BOX]
    assert grpo.boxes_of([]) == [None]


@pytest.mark.parametrize(
    "message",
    [
        said("no box"),
        said(""),
        said('{"bbox_2d": [1, 2, 3]}'),
        said('{"bbox_2d": [300, 2, 3, 4]}'),
        said('{"bbox_2d": [1, 2, 3'),
        said(protocol.answer_text(BOX), BOX),
    ],
)
def test_an_answer_that_does_not_parse_is_no_box(message):
    assert grpo.boxes_of([message]) == [None]
    assert grpo.boxes_of([*GOOD[:2], message]) == [OTHER, None]


def test_a_rollout_that_ends_on_the_feedback_has_failed():
    assert grpo.boxes_of(GOOD[:2]) == [OTHER, None] and grpo.boxes_of(GOOD[:4]) == [OTHER, OTHER, None]


def test_every_answer_has_a_score():
    assert grpo.step_ious([BOX, None], TRUTH, 2) == [iou(BOX, TRUTH), None, None]
    assert grpo.step_ious([], TRUTH, 0) == [None]
    assert grpo.step_ious([OTHER, BOX, BOX, BOX], TRUTH, 2) == [0.0, iou(BOX, TRUTH), iou(BOX, TRUTH)]


# --- the reward


@pytest.fixture
def judge():
    """(rollouts, turns, image tokens left) -> rewards, metrics; an image takes 36 tokens."""

    def run(completions, turns=2, left=None, bonus=0.1, **judged):
        left = [36 * turns] * len(completions) if left is None else left
        logged = {}
        environments = [SimpleNamespace(_image="image")] * len(completions)
        reward = grpo.make_reward(turns, bonus, 2, 7, {"image": 36}.get, **judged)
        rewards = reward(
            completions=completions,
            truth=[TRUTH] * len(completions),
            environments=environments,
            prompts=None,
            completion_ids=[[1, 2] + [7] * n for n in left],
            log_metric=logged.__setitem__,
            trainer_state=None,
        )
        return rewards, logged

    return run


def test_a_rollout_of_good_answers_earns_its_final_iou_and_the_bonus(judge):
    final = iou(BOX, TRUTH)
    assert final == pytest.approx(2 / 3)
    assert judge([GOOD])[0] == pytest.approx([final + 0.1])
    assert judge([GOOD], bonus=0.0)[0] == pytest.approx([final])
    assert judge([[said("", BOX)]], turns=0)[0] == pytest.approx([final + 0.1])


@pytest.mark.parametrize(
    "rollout",
    [
        GOOD[:4],  # ended on the feedback: nothing was generated, or the budget ran out
        GOOD[:2],
        GOOD[:3],  # an answer too few: the rollout stopped early
        GOOD[:1],
        [],
        [said("no box")],
        [*GOOD[:4], said('{"bbox_2d": [1, 2, 3]}')],
        [*GOOD[:4], said(protocol.answer_text(BOX), BOX)],
        [*GOOD[:4], said('{"bbox_2d": [300, 200, 100, 400]}')],
        [*GOOD[:4], said("no box")],
        [*GOOD[:4], said('{"bbox_2d": [1, 2, 3')],
    ],
)
def test_a_rollout_without_a_final_box_earns_nothing(judge, rollout):
    rewards, logged = judge([rollout])
    assert rewards == [0.0] and logged["failed_rollouts"] == 1.0 and logged["iou_step_2"] == 0.0


@pytest.mark.parametrize(
    "first", [said("no box"), said('{"bbox_2d": [1, 2, 3]}'), said(protocol.answer_text(BOX), OTHER)]
)
def test_a_failed_answer_on_the_way_costs_the_bonus_and_no_more(judge, first):
    rewards, logged = judge([[first, *GOOD[1:]]])
    assert rewards == pytest.approx([iou(BOX, TRUTH)]) and logged["failed_rollouts"] == 1.0


def test_a_box_that_the_trainer_did_not_ask_for_is_not_scored(judge):
    more = [*GOOD, shown(), said("", (100, 200, 300, 500))]
    assert judge([more])[0] == judge([GOOD])[0]


def test_a_reward_of_ones_own_is_given_the_ious_of_every_answer(judge):
    final = iou(BOX, TRUTH)
    assert judge([GOOD, GOOD[:2]], judge=lambda ious, bonus: (ious, bonus) == ([0.0, 0.0, final], 0.1))[0] == [1, 0]
    rewards, logged = judge([GOOD, GOOD[:4]], judge=lambda ious, bonus: -1.0)
    assert rewards == [-1.0, -1.0] and logged["equal_groups"] == 1.0 and logged["failed_rollouts"] == 0.5


def test_the_metrics_are_means_over_all_rollouts(judge):
    exact = [said("", (100, 200, 300, 500))]
    _, logged = judge([GOOD, [*exact, shown(), *exact, shown(), *exact], GOOD[:2], [said("no box")]])
    assert logged == pytest.approx(
        {
            "iou_step_0": 1 / 4,
            "iou_step_1": 1 / 4,
            "iou_step_2": (1 + iou(BOX, TRUTH)) / 4,
            "failed_rollouts": 1 / 2,
            "equal_groups": 1 / 2,
        }  # groups of two: the second one earned nothing twice
    )


@pytest.mark.parametrize("left", [[72, 36], [0], [71], [108], [72, 73]])
def test_dropped_feedback_stops_the_training_with_one_sentence(judge, left):
    with pytest.raises(RuntimeError) as caught:
        judge([GOOD] * len(left), left=left)
    message = str(caught.value)
    assert "feedback image was dropped" in message and "feedback_tokens" in message and "\n" not in message


# --- data


def test_a_row_is_the_prompt_of_the_loop_its_image_and_the_truth(records):
    rows = grpo.prompts_dataset(records)
    assert list(rows[0]) == ["prompt", "images", "truth"] and len(rows) == len(records)
    for row, record in zip(rows, records, strict=True):
        (message,) = row["prompt"]
        wanted = protocol.question(record["image"], record["expression"])
        assert message["role"] == wanted["role"]
        assert [(p["type"], p["text"]) for p in message["content"]] == [
            (p["type"], p.get("text")) for p in wanted["content"]
        ]
        assert [image.tobytes() for image in row["images"]] == [record["image"].tobytes()]
        assert row["truth"] == pytest.approx(record["bbox"])


def test_a_picture_from_a_jpeg_reaches_the_trainer_as_the_loop_shows_it(records):
    buffer = io.BytesIO()
    records[0]["image"].save(buffer, "JPEG", quality=85)
    picture = Image.open(buffer)  # as a data set of JPEG bytes gives it
    row = grpo.prompts_dataset([{**records[0], "image": picture}])[0]
    assert row["images"][0].convert("RGB").tobytes() == load_image(picture).tobytes()


def test_tokens_of_an_image(tiny_student, records):
    assert grpo.image_tokens(tiny_student, records[0]["image"]) == 36
    wide, kind = (
        records[0]["image"].resize((333, 77)),
        tiny_student.processor.image_processor,
    )  # as it divides it
    grid = kind(images=[wide], return_tensors="pt")["image_grid_thw"][0]
    assert grpo.image_tokens(tiny_student, wide) == grid.prod() // kind.merge_size**2


# --- TRL's trainer, on scripted answers

EMPTY = ""  # nothing is generated, not even the end of the turn
CUT = " star"  # an answer that ends on this reaches its limit of tokens before the end of the turn


@pytest.fixture(scope="module")
def scripted_trainer(records):
    """TRL's GRPOTrainer with `script(turn, rollout, truth)` in place of sampling; it keeps what passes through it."""
    import trl

    truths = {record["expression"]: record["bbox"] for record in records}
    assert len(truths) == len(records)
    torch.set_num_threads(1)

    class Scripted(trl.GRPOTrainer):
        script, budget, stop, last = None, None, None, None

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            Scripted.last = self
            self.kept, self.max_completion_length = [], self.budget or self.max_completion_length

        def training_step(self, *args, **kwargs):
            if self.state.global_step == self.stop:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

        def _generate_single_turn(self, prompt_ids, *_, **__):
            answers, free, tokenizer = [], list(range(len(self.histories))), self.processing_class.tokenizer
            for ids in prompt_ids:  # which rollout is this? the one whose turns so far the prompt begins with
                i = next(i for i in free if ids[: len(sum(self.histories[i], []))] == sum(self.histories[i], []))
                free.remove(i)
                expression = tokenizer.decode(ids).split(protocol.PROMPT[0])[1].split(protocol.PROMPT[1])[0]
                text = type(self).script(len(self.histories[i]) // 2, i, truths[expression])
                answer = tokenizer.encode(text if text.endswith(CUT) else text + "<|im_end|>") if text else []
                self.histories[i] += [ids[len(sum(self.histories[i], [])) :], answer]
                answers.append(answer)
            return answers, None

        def _generate(self, prompts):
            self.histories = [[] for _ in prompts]
            out = super()._generate(prompts)
            names = "prompt_ids", "completion_ids", "tool_mask", "completions", "_", "_", "images", "tool_images"
            self.kept.append(dict(zip(names, out, strict=True)))
            return out

        def _calculate_rewards(self, *args):
            rewards = super()._calculate_rewards(*args)
            self.kept[-1]["rewards"] = rewards[:, 0].tolist()
            return rewards

        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            self.kept[-1] |= {"batch": batch, "truth": [row["truth"] for row in inputs]}
            return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trl, "GRPOTrainer", Scripted)
        yield Scripted


@pytest.fixture(scope="module")
def sft_policy(processor, tmp_path_factory):
    """A folder with an adapter that is no longer the base model, and its weights."""
    from peft import get_peft_model

    profile = replace(get_profile("smoke"), lora_rank=4, lora_alpha=8)
    torch.manual_seed(0)
    model = get_peft_model(micro.build_micro(processor, seed=0), student.lora(profile))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    folder = tmp_path_factory.mktemp("sft")
    model.save_pretrained(folder)
    return folder, load_file(folder / "adapter_model.safetensors")


def with_policy(processor, folder):
    from peft import PeftModel

    model = PeftModel.from_pretrained(micro.build_micro(processor, seed=0), str(folder), is_trainable=True)
    return student.Student(model, processor, micro.GRID)


def adapter_of(model, name) -> dict:
    """An adapter's weights by the names of a file."""
    return {key.replace(f".{name}.", "."): p.detach() for key, p in model.named_parameters() if f".{name}." in key}


class Built(Exception):
    """Raised in place of a trainer, with the arguments that it was given."""


@pytest.fixture
def arguments(monkeypatch):
    """What a call gives to TRL's GRPOTrainer, {name: value}; the configuration as {name: value}, the reward as well."""
    import trl

    class Trainer(trl.GRPOTrainer):
        def __init__(self, **given):
            raise Built(given)

    monkeypatch.setattr(trl, "GRPOTrainer", Trainer)

    def built(call):
        with pytest.raises(Built) as caught:
            call()
        (given,) = caught.value.args
        known = inspect.getclosurevars(given.pop("reward_funcs")).nonlocals
        style = inspect.getclosurevars(given.pop("environment_factory").draw_box).nonlocals["style"]
        left = known.pop("tokens_of_image")(Image.new("RGB", (96, 96)))
        return given | {"args": given["args"].to_dict(), "reward": known, "style": style, "left": left}

    return built


def cell_of_notebook(mark: str) -> str:
    """The source of the one code cell of notebook 4 that holds a text."""
    cells = json.loads((ROOT / "notebooks" / "04_grpo.ipynb").read_text("utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    (source,) = [source for source in sources if mark in source]
    return source


@pytest.mark.parametrize("name", ["smoke", "micro", "micro, a trial", "micro, in parts", "colab", "paper"])
def test_the_lines_of_the_notebook_build_the_trainer_of_the_package(
    name, arguments, processor, sft_policy, records, tmp_path
):
    """Notebook 4 shows the training in a few lines of its own; all they give to TRL must be what `train_grpo` gives."""
    lesson = {"train": records, "SEED": 3, "load_image": load_image}
    exec(cell_of_notebook("def grpo_trainer("), lesson)
    profile = get_profile(name.split(",")[0])
    if name.endswith("a trial"):
        profile = grpo_trial(profile)
    elif name.endswith("in parts"):
        profile = replace(profile, grpo_device_batch=4, grpo_generated=12, max_pixels=96 * 96, style="outline")
    policy, dataset = with_policy(processor, sft_policy[0]), lesson["dataset"]
    ours = arguments(lambda: grpo.train_grpo(policy, dataset, tmp_path, profile, 3))
    theirs = arguments(lambda: lesson["grpo_trainer"](policy, grpo.paper_reward, profile, tmp_path))
    assert ours.pop("callbacks") == [] and ours == theirs
    assert ours["args"]["max_steps"] == profile.grpo_steps and ours["peft_config"] is None
    assert ours["reward"]["judge"] is grpo.paper_reward and ours["style"] == profile.style and ours["left"] == 36


SCRIPT = {
    0: lambda turn, true: protocol.answer_text(true if turn == 2 else OTHER, "It is too low: move up." * (turn == 1)),
    1: lambda turn, true: protocol.answer_text(true) if turn == 0 else "It fits: keep it.",  # no box
    2: lambda turn, true: protocol.answer_text(true) if turn else '{"bbox_2d": [10, 20, 30]}',
    3: lambda turn, true: EMPTY if turn == 2 else protocol.answer_text(true),  # ends on the feedback
}


def script(turn, rollout, truth):
    return SCRIPT[rollout](turn, snap(truth, micro.GRID))


def train(trainer_class, student_, records, folder, profile, script=script, **options):
    """Train with GRPO on scripted answers, two records a step; return the trainer, its first step and the log."""
    trainer_class.script = script
    folder.mkdir(exist_ok=True)
    log = grpo.train_grpo(student_, grpo.prompts_dataset(records[:4]), folder, profile, seed=0, **options)
    return SimpleNamespace(trainer=trainer_class.last, step=trainer_class.last.kept[0], log=log, folder=folder)


@pytest.fixture(scope="module")
def trained(processor, records, sft_policy, scripted_trainer, tiny_profile, tmp_path_factory):
    """Two steps from the SFT policy on, two of four prompts with two rollouts each."""
    folder = tmp_path_factory.mktemp("grpo") / "whole"
    policy = with_policy(processor, sft_policy[0])
    return train(scripted_trainer, policy, records, folder, tiny_profile, probe=records[4:])


def test_each_rollout_ends_where_it_should_and_its_reward_says_so(trained):
    step = trained.step
    boxes = [snap(truth, micro.GRID) for truth in step["truth"]]
    assert [grpo.boxes_of(c) for c in step["completions"]] == [
        [OTHER, OTHER, boxes[0]],
        [boxes[1], None, None],
        [None, boxes[2], boxes[2]],
        [boxes[3], boxes[3], None],
    ]
    assert [c[-1]["role"] for c in step["completions"]] == ["assistant", "assistant", "assistant", "tool"]
    assert [[m["content"][1]["text"] for m in c if m["role"] == "tool"] for c in step["completions"]] == [
        [protocol.FEEDBACK if box else protocol.FEEDBACK_NO_BOX for box in shown]
        for shown in ([OTHER, OTHER], [boxes[1], None], [None, boxes[2]], [boxes[3], boxes[3]])
    ]
    final = [iou(box, truth) for box, truth in zip(boxes, step["truth"], strict=True)]
    assert step["rewards"] == pytest.approx([final[0] + 0.1, 0.0, final[2], 0.0], abs=1e-5) and min(final) > 0.8


def test_every_image_that_was_shown_reaches_the_model(trained):
    step = trained.step
    assert [len(images) for images in step["tool_images"]] == [2, 2, 2, 2]
    assert len(step["batch"]["image_grid_thw"]) == 4 + 8 and len(step["batch"]["pixel_values"]) == 12 * 144


def test_the_models_tokens_are_learnt_and_the_feedbacks_are_not(trained, processor):
    step, decode = trained.step, processor.tokenizer.decode
    for rollout, (ids, mask) in enumerate(zip(step["completion_ids"], step["tool_mask"], strict=True)):
        turns = (3, 3, 3, 2)[rollout]
        written = "".join(script(t, rollout, step["truth"][rollout]) + "<|im_end|>" for t in range(turns))
        assert decode([token for token, own in zip(ids, mask, strict=True) if own]) == written
        masked = decode([token for token, own in zip(ids, mask, strict=True) if not own])
        assert masked.count("<|image_pad|>") == 36 * len(step["tool_images"][rollout])
        assert masked.count("<|im_start|>user\n") == masked.count("<|im_start|>assistant\n") == 2
        assert step["batch"]["tool_mask"][rollout][: len(mask)].tolist() == mask


def test_a_rollout_has_the_ids_and_the_mask_of_its_chat_in_sft(trained, processor, records):
    step = trained.step
    boxes = [OTHER, OTHER, snap(step["truth"][0], micro.GRID)]
    steps = [{"text": script(t, 0, step["truth"][0]), "box": box} for t, box in enumerate(boxes)]
    (record,) = [r for r in records if r["bbox"] == pytest.approx(step["truth"][0])]
    chat = protocol.transcript(record["image"], record["expression"], steps, draw_box)
    marked = processor.apply_chat_template([chat], tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    prompt, completion = step["prompt_ids"][0], step["completion_ids"][0]
    assert marked["input_ids"][0] == prompt + completion + processor.tokenizer.encode("\n")
    assert marked["assistant_masks"][0] == [0] * len(prompt) + step["tool_mask"][0] + [0]


def test_the_step_by_hand_reads_the_log_probabilities_that_trl_learns_from(
    trained, processor, sft_policy, records, tiny_profile
):
    step, truth = trained.step, trained.step["truth"][0]
    (record,) = [r for r in records if r["bbox"] == pytest.approx(truth)]
    boxes = [OTHER, OTHER, snap(truth, micro.GRID)]
    rollout = {"id": record["id"], "expression": record["expression"], "truth": truth}
    rollout["steps"] = [{"text": script(t, 0, truth), "box": box} for t, box in enumerate(boxes)]
    lesson = {"np": np, "profile": tiny_profile, "prompts": [record], "groups": [[rollout]], "rewards": [[1.0, 0.0]]}
    lesson["my_advantages"] = find("my_advantages").solution
    exec(cell_of_notebook("def log_probabilities("), lesson)
    with torch.no_grad():
        values, own = lesson["log_probabilities"](with_policy(processor, sft_policy[0]), rollout)
    learnt = step["batch"]["tool_mask"][0].bool() & step["batch"]["completion_mask"][0].bool()
    assert torch.allclose(values[own], step["batch"]["ref_per_token_logps"][0][learnt], atol=1e-4)


ANSWERS = {  # an answer as students write it, and its box
    "plain": ('{"bbox_2d": [100, 200, 300, 400]}', BOX),
    "Qwen's habit": ('```json\n[\n\t{"bbox_2d": [100, 200, 300, 400], "label": "red cup"}\n]\n```', BOX),
    "no spaces": ('{"bbox_2d":[100,200,300,400]}', BOX),
    "lines": ('{\n  "bbox_2d": [100, 200, 300, 400]\n}', BOX),
    "quotes in a label": ('{"label": "a \\"red\\" {cup}", "bbox_2d": [100, 200, 300, 400]}', BOX),
    "in a call": ('<tool_call>\n{"arguments": {"bbox_2d": [100, 200, 300, 400]}}\n</tool_call>', BOX),
    "behind a trace": ('It is too high: move down. {"bbox_2d": [100, 200, 300, 400]}', BOX),
    "no box": ("It fits: keep it.", None),
    "two boxes": ('{"bbox_2d": [100, 200, 300, 400]} {"bbox_2d": [500, 500, 700, 900]}', None),
    "reversed": ('{"bbox_2d": [300, 200, 100, 400]}', None),
    "breaks off": ('```json\n[\n\t{"bbox_2d": [100, 200, 300, 400], "label": "red' + CUT, None),
    "goes on": ('{"bbox_2d": [100, 200, 300, 400]}' + 10 * CUT, BOX),
}


@pytest.fixture(scope="module")
def wider_processor():
    """The micro student's processor with all the words of ANSWERS."""
    known = [*micro.expression_words(), *micro.follow_up_words()]
    written = re.findall(r" ?[A-Za-z]+|[\s\S]", "".join(text for text, _ in ANSWERS.values()))
    more = sorted(set(written) - set(micro.vocabulary(known)))
    return student.install_protocol(
        micro.build_processor([*known, *more], STUDENT_RECIPE.image_side, STUDENT_RECIPE.patch)
    )


def test_a_rollout_is_that_of_the_loop_whatever_is_answered(
    wider_processor, records, scripted_trainer, tiny_profile, tmp_path
):
    """Each of ANSWERS comes once before a feedback: its box, what is shown and every token are as in evaluation."""
    tokenizer, wanted = wider_processor.tokenizer, list(ANSWERS.values())
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text, _ in wanted) and len(wanted) == 4 * 3

    def script(turn, rollout, truth=None):
        return wanted[3 * rollout + turn][0] if turn < 3 else protocol.answer_text(OTHER)

    policy = student.Student(micro.build_micro(wider_processor, seed=0), wider_processor, micro.GRID)
    profile = replace(tiny_profile, max_new_tokens=64)
    made = train(scripted_trainer, policy, records, tmp_path, profile, script, turns=3, steps=1)
    step = made.step
    assert [grpo.boxes_of(c) for c in step["completions"]] == [
        [*(box for _, box in wanted[3 * rollout :][:3]), OTHER] for rollout in range(4)
    ]
    asked = [next(r for r in records if r["bbox"] == pytest.approx(truth)) for truth in step["truth"]]
    loop = ScriptedModel(wider_processor, script)
    rollouts = evaluate(student.Student(loop, wider_processor, micro.GRID), asked, profile, turns=3, batch_size=4)
    for i, rollout in enumerate(rollouts):
        assert [said["box"] for said in rollout["steps"]] == grpo.boxes_of(step["completions"][i])
        ids = loop.prompt_ids(3, i) + tokenizer.encode(rollout["steps"][3]["text"] + "<|im_end|>")
        assert step["prompt_ids"][i] + step["completion_ids"][i] == ids
        written = [said["text"] + "<|im_end|>" * (not said["text"].endswith(CUT)) for said in rollout["steps"]]
        own = zip(step["completion_ids"][i], step["tool_mask"][i], strict=True)
        assert tokenizer.decode([token for token, learnt in own if learnt]) == "".join(written)
    assert torch.equal(step["batch"]["pixel_values"], loop.shown[3]["pixel_values"])
    assert torch.equal(step["batch"]["image_grid_thw"], loop.shown[3]["image_grid_thw"])


def test_the_kl_term_is_taken_to_the_sft_policy(trained, sft_policy):
    reference, weights = adapter_of(trained.trainer.model, "ref"), sft_policy[1]
    assert reference.keys() == weights.keys() and all(torch.equal(reference[n], weights[n]) for n in weights)
    kept = trained.step["batch"]
    assert kept["ref_per_token_logps"].shape == kept["completion_ids"].shape and trained.trainer.beta == 0.04


def test_the_adapter_moves_away_from_the_sft_policy_and_is_saved_alone(trained, sft_policy):
    learned, weights = adapter_of(trained.trainer.model, "default"), sft_policy[1]
    assert any(not torch.equal(learned[name], weights[name]) for name in weights)
    saved = load_file(trained.folder / "adapter_model.safetensors")
    assert saved.keys() == learned.keys() and all(torch.equal(saved[name], learned[name]) for name in learned)
    assert not (trained.folder / "ref").exists()


def test_the_values_reach_the_trainer(trained, tiny_profile):
    args = trained.trainer.args
    assert (args.beta, args.num_generations, args.max_tool_calling_iterations) == (0.04, 2, 2)
    ours = (tiny_profile.temperature, tiny_profile.scale_rewards, tiny_profile.grpo_lr)
    assert (args.loss_type, args.temperature, args.scale_rewards, args.learning_rate) == ("grpo", *ours)
    assert args.bf16 == torch.cuda.is_available()


def test_no_placeholder_of_an_image_can_be_sampled(trained, processor):
    """At temperature 1 one would come sooner or later, and the model would look for an image that is not there."""
    suppressed = trained.trainer.generation_config.suppress_tokens
    assert processor.tokenizer.convert_ids_to_tokens(suppressed) == ["<|image_pad|>", "<|video_pad|>"]


def test_the_log_has_a_row_a_step_with_all_that_the_course_plots(trained):
    assert [row["step"] for row in trained.log] == [1, 2]
    first = trained.log[0]
    assert {"reward", "kl", "entropy", "equal_groups", "iou_step_0", "iou_step_1", "iou_step_2"} <= first.keys()
    assert first["kl"] == pytest.approx(0, abs=1e-6)  # it starts on the policy that it is compared with
    assert first["failed_rollouts"] == 0.75
    assert first["reward"] == pytest.approx(sum(trained.step["rewards"]) / 4, abs=1e-4)


def test_the_learning_curve_is_greedy_on_fixed_prompts_from_the_first_policy_to_the_last(
    trained, processor, records, sft_policy, tiny_profile
):
    curve, asked = grpo.read_probe(trained.folder), records[4:]
    assert curve["image_ids"] == [record["image_id"] for record in asked] and len(asked) == 2
    assert [row["step"] for row in curve["rows"]] == [0, 1, 2]
    for step, folder in ((0, sft_policy[0]), (2, trained.folder)):
        answers = evaluate(with_policy(processor, folder), asked, tiny_profile)
        assert np.allclose(iou_matrix(answers), curve["rows"][step]["ious"], atol=1e-6)


def test_the_prompts_of_the_learning_curve_are_the_first_of_validation(tiny_profile):
    val = load_split(tiny_profile, "val")
    assert [r["id"] for r in grpo.probe_records(tiny_profile)] == [r["id"] for r in val][:3]


@pytest.mark.slow
def test_ctrl_c_and_the_same_call_again_end_on_the_same_adapter(
    trained, processor, records, sft_policy, scripted_trainer, tiny_profile, tmp_path, monkeypatch
):
    def once_more():
        policy = with_policy(processor, sft_policy[0])
        return train(scripted_trainer, policy, records, tmp_path, tiny_profile, probe=records[4:])

    monkeypatch.setattr(scripted_trainer, "stop", 1)
    with pytest.raises(KeyboardInterrupt):
        once_more()
    assert (tmp_path / "checkpoint-1").is_dir() and not (tmp_path / "adapter_model.safetensors").exists()
    monkeypatch.setattr(scripted_trainer, "stop", None)
    kept = (tmp_path / grpo.PROBE).read_text()
    (tmp_path / grpo.PROBE).unlink()
    with pytest.raises(ArtefactError, match=f"delete {tmp_path} and run again"):
        once_more()
    (tmp_path / grpo.PROBE).write_text(kept)
    reference = adapter_of(once_more().trainer.model, "ref")
    assert all(torch.equal(reference[name], sft_policy[1][name]) for name in reference)
    saved, again = (load_file(f / "adapter_model.safetensors") for f in (trained.folder, tmp_path))
    assert all(torch.allclose(again[name], saved[name], atol=1e-6) for name in saved)
    curves = [grpo.read_probe(folder)["rows"] for folder in (trained.folder, tmp_path)]
    assert [row["step"] for row in curves[1]] == [0, 1, 2] and curves[0][:2] == curves[1][:2]


@pytest.mark.slow
def test_activations_may_be_checkpointed_and_rollouts_generated_by_the_group(
    trained, processor, records, sft_policy, scripted_trainer, tiny_profile, tmp_path, monkeypatch
):
    """As on a GPU: a device holds one rollout, a group is generated at a time, and the step is over all prompts."""
    real = grpo.trainer_options
    monkeypatch.setattr(grpo, "trainer_options", lambda *a: real(*a) | {"activation_checkpointing": True})
    small = replace(tiny_profile, grpo_device_batch=1, grpo_generated=2, scale_rewards="group")
    made = train(scripted_trainer, with_policy(processor, sft_policy[0]), records, tmp_path, small)
    args = made.trainer.args
    assert args.activation_checkpointing and made.trainer.model.is_activation_checkpointing
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (1, 4)
    assert args.steps_per_generation == args.num_generations == 2 and args.generation_batch_size == 2
    assert [row["step"] for row in made.log] == [1, 2]
    assert [len(kept["truth"]) for kept in made.trainer.kept] == [2] * 4  # two steps of two groups
    saved, start = load_file(tmp_path / "adapter_model.safetensors"), sft_policy[1]
    assert saved.keys() == start.keys() and any(not torch.equal(saved[name], start[name]) for name in saved)


def test_a_bare_student_gets_a_fresh_adapter_and_with_no_turns_a_single_answer(
    records, fresh_student, scripted_trainer, tiny_profile, tmp_path
):
    made = train(scripted_trainer, fresh_student, records, tmp_path, tiny_profile, turns=0, format_bonus=0.0, steps=1)
    assert [len(c) for c in made.step["completions"]] == [1, 1, 1, 1] and not any(made.step["tool_images"])
    truth = made.step["truth"]
    final = [iou(snap(t, micro.GRID), t) for t in truth]
    assert made.step["rewards"] == pytest.approx([iou(OTHER, truth[0]), final[1], 0.0, final[3]], abs=1e-5)
    assert list(made.trainer.model.peft_config) == ["default"] and made.trainer.state.global_step == 1
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_feedback_that_the_budget_drops_stops_the_training(
    records, fresh_student, scripted_trainer, tiny_profile, tmp_path, monkeypatch
):
    """TRL leaves overlong feedback out without a word."""
    monkeypatch.setattr(scripted_trainer, "budget", 60)  # one feedback fits, a second does not
    with pytest.raises(RuntimeError, match="feedback image was dropped"):
        train(scripted_trainer, fresh_student, records, tmp_path, tiny_profile)


@pytest.mark.slow
def test_the_budget_holds_the_longest_rollout(
    processor, records, fresh_student, scripted_trainer, tiny_profile, tmp_path
):
    """Every answer as long as it may be, and cut off there: all feedback is shown, none is dropped."""
    box = protocol.answer_text(BOX)
    long = box + CUT * (tiny_profile.max_new_tokens - len(processor.tokenizer.encode(box)))
    made = train(
        scripted_trainer,
        fresh_student,
        records,
        tmp_path,
        tiny_profile,
        lambda turn, rollout, truth: long,
        turns=4,
        steps=1,
    )
    assert [len(images) for images in made.step["tool_images"]] == [4] * 4 and min(made.step["rewards"]) > 0


@pytest.mark.parametrize("value", [None, "0.5", float("nan"), float("inf"), [0.5]])
def test_a_reward_that_is_no_number_is_one_sentence(value):
    def own_reward(ious, bonus):
        return value

    with pytest.raises(ValueError, match="own_reward returned .+; a reward is one finite number"):
        grpo.judged_by(own_reward, [0.5, None], 0.1)
    assert grpo.judged_by(grpo.paper_reward, [0.5, 0.7], 0.1) == pytest.approx(0.8)

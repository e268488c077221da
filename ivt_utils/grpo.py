"""GRPO with an IoU reward (section 3 of the paper), through TRL's GRPOTrainer and its environments.

The environment has one tool, `draw_box`. The model writes plain JSON; every answer, with a box or without one, is read
by `parse_answer` and becomes one call of the tool, and the tool's answer is the feedback turn of the closed loop. So a
rollout has as many turns as that loop, and for the same answers the same tokens; only that the loop spells each answer
anew from its text, and here it stays as it was sampled. The last answer is not executed.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ivt_utils import protocol
from ivt_utils.boxes import Box, iou, parse_answer
from ivt_utils.loop import evaluate
from ivt_utils.metrics import iou_matrix
from ivt_utils.overlay import draw_box, load_image
from ivt_utils.records import first, lazy_dataset, load_split
from ivt_utils.runtime import distributed, hardware
from ivt_utils.runtime.files import read_json, write_text
from ivt_utils.runtime.store import PROBE
from ivt_utils.sft import finish, trainer_options
from ivt_utils.student import Student, lora

SPREADS = ("batch", "group", "none")  # as TRL's `scale_rewards`


def make_environment(style: str = "filled"):
    """Return an environment class for TRL: it keeps one image, and shows boxes on it."""

    class BoxEnvironment:
        def reset(self, images: Any = None, **_) -> None:
            """Start a rollout on the row's one image; nothing is added to the prompt."""
            self._image = load_image(images[0])

        def draw_box(self, bbox_2d: Box | None, ended: bool = True) -> list:
            """Draw a box on the image.

            Args:
                bbox_2d: x1, y1, x2, y2 as integers 0 to 1000, or null for an answer without a box.
                ended: whether the model ended the answer itself.

            Returns:
                The feedback: the image with the box, or bare, and a short request.
            """
            image, request = protocol.feedback_content(draw_box(self._image, bbox_2d, style), bbox_2d)
            return [image | {"ended": ended}, request]

    return BoxEnvironment


def answers_as_calls(tokenizer) -> None:
    """Let TRL read an answer as the loop does: its text, and one call of `draw_box` with its box, or with None.

    TRL leaves that to `tokenizer.parse_response`, if the tokenizer has a response template, be it an empty one. The
    call also says whether the answer `ended` with the token that ends a turn; else it was cut off at the limit of its
    tokens, or ended on another token, as Qwen's <|endoftext|>.
    """

    def parse_response(ids: list[int], **_) -> dict:
        text = tokenizer.decode(ids, skip_special_tokens=True)
        arguments = {"bbox_2d": parse_answer(text), "ended": ids[-1:] == [tokenizer.eos_token_id]}
        call = {"type": "function", "function": {"name": "draw_box", "arguments": arguments}}
        return {"role": "assistant", "content": text, "tool_calls": [call]}

    tokenizer.response_template, tokenizer.parse_response = {}, parse_response


def boxes_of(completion: list[dict]) -> list:
    """Return the box of each assistant message of a rollout, None for an answer that does not parse.

    A rollout that ends on a feedback message has a failed answer after it: nothing was generated there.
    """
    boxes = [parse_answer(message["content"]) for message in completion if message["role"] == "assistant"]
    return boxes if completion and completion[-1]["role"] == "assistant" else [*boxes, None]


def paper_reward(ious: list[float | None], bonus: float) -> float:
    """Return the paper's reward of one rollout: the IoU of its final box, and `bonus` when every answer parses.

    `ious`: one for each answer, None for an answer that did not parse.
    """
    return (ious[-1] or 0.0) + bonus * (None not in ious)


def judged_by(judge, ious: list[float | None], bonus: float) -> float:
    """Return `judge(ious, bonus)`; a ValueError where it is no finite number."""
    value = judge(ious, bonus)
    if not isinstance(value, int | float | np.number) or not np.isfinite(value):
        raise ValueError(f"{judge.__name__} returned {value!r} for the IoUs {ious}; a reward is one finite number.")
    return float(value)


def make_reward(
    turns: int, format_bonus: float, generations: int, image_token_id: int, tokens_of_image, judge=paper_reward
):
    """Return TRL's reward function: of each rollout `judge(ious, format_bonus)`, with the IoU of each answer.

    It also logs the mean IoU per step, the share of failed rollouts and that of groups (of `generations` rollouts) with
    one reward for all, which teach nothing; and it stops the training when a rollout was not shown an image in each of
    its turns: `tokens_of_image(image)` says how many tokens each of them must have left behind.
    """

    def reward(completions, truth, environments, completion_ids, log_metric, **_) -> list[float]:
        for environment, ids in zip(environments, completion_ids, strict=True):
            if list(ids).count(image_token_id) != turns * tokens_of_image(environment._image):
                raise RuntimeError(
                    "A feedback image was dropped from a rollout: raise feedback_tokens of the profile: "
                    "every answer and every feedback must have room."
                )
        ious = [step_ious(boxes_of(c), t, turns) for c, t in zip(completions, truth, strict=True)]
        for step in range(turns + 1):
            log_metric(f"iou_step_{step}", sum(each[step] or 0.0 for each in ious) / len(ious))
        log_metric("failed_rollouts", sum(None in each for each in ious) / len(ious))
        rewards = [judged_by(judge, each, format_bonus) for each in ious]
        everyone = distributed.gather(rewards)  # a group may be shared by two processes
        groups = [everyone[i : i + generations] for i in range(0, len(everyone), generations)]
        log_metric("equal_groups", sum(max(group) - min(group) < 1e-6 for group in groups) / len(groups))
        return rewards

    reward.__name__ = "final_iou_and_format"
    return reward


def step_ious(boxes: list, truth, turns: int) -> list[float | None]:
    """Return the IoU of each of `turns` + 1 answers; None for one that did not parse or was never given."""
    ious = [None if box is None else iou(box, truth) for box in boxes[: turns + 1]]
    return ious + [None] * (turns + 1 - len(ious))


def prompts_dataset(records):
    """Return a datasets.Dataset with `prompt`, `images` and `truth`, one row a record, its image read when needed."""

    def prompt(row):
        record = records[row["number"]]
        asked = protocol.split_images([protocol.question(load_image(record["image"]), record["expression"])])
        return {"prompt": asked["messages"], "images": asked["images"], "truth": record["bbox"]}

    return lazy_dataset([{"number": number} for number in range(len(records))], prompt)


def closing_trainer(tokenizer):
    """Return TRL's GRPOTrainer as a class that reads an answer as the loop does (`answers_as_calls`).

    It also closes an answer that was cut off before it gives the feedback, as the chat of the loop does.
    """
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # the lock file keeps the version
    from trl import GRPOTrainer

    answers_as_calls(tokenizer)

    class ClosingTrainer(GRPOTrainer):
        def _get_tool_suffix_ids(self, tool_messages):
            ids = super()._get_tool_suffix_ids(tool_messages)
            return ids if tool_messages[0]["content"][0]["ended"] else [tokenizer.eos_token_id, *ids]

    return ClosingTrainer


def train_grpo(
    student: Student,
    dataset,
    folder: Path,
    profile,
    seed: int,
    *,
    turns: int | None = None,
    format_bonus: float | None = None,
    steps: int | None = None,
    probe=None,
) -> list[dict]:
    """Train the student's adapter with GRPO, save it to `folder` and return the log; resumes in `folder`.

    `probe`: records that are answered greedily before the first step, every `profile.probe_every` steps and after the
    last one (`read_probe`): a learning curve without the luck of sampled prompts and answers.

    A student that carries an adapter (the SFT policy, loaded trainable) goes on from it, and the KL term is taken
    to it; a bare student gets a fresh adapter and the KL is taken to the base model. `turns=0` is single-step GRPO.
    """
    Trainer = closing_trainer(student.processor.tokenizer)
    from trl import GRPOConfig

    turns = profile.grpo_turns if turns is None else turns
    bonus = profile.format_bonus if format_bonus is None else format_bonus
    per_image = most_image_tokens(student, profile.max_pixels, load_image(dataset[0]["images"][0]))
    answer, group = profile.max_new_tokens, profile.generations
    # Only the processor may write these: a sampled one would stand for an image that is not there.
    placeholders = [student.processor.image_token_id, student.processor.video_token_id]
    tuned = hasattr(student.model, "peft_config")
    exact = {name: w.detach().clone() for name, w in student.model.named_parameters() if tuned and w.requires_grad}
    config = distributed.one_card(
        GRPOConfig(
            max_steps=steps or profile.grpo_steps,
            learning_rate=profile.grpo_lr,
            lr_scheduler_type=profile.grpo_schedule,
            warmup_steps=profile.grpo_warmup,
            num_generations=group,
            beta=profile.beta,
            temperature=profile.temperature,
            loss_type=profile.grpo_loss,
            scale_rewards=profile.scale_rewards,
            max_tool_calling_iterations=turns,
            max_completion_length=(turns + 1) * (answer + profile.feedback_tokens) + turns * per_image,
            generation_kwargs={"max_new_tokens": answer, "suppress_tokens": placeholders},
            **distributed.batch_share(
                group * profile.grpo_prompts, profile.grpo_device_batch, group, profile.grpo_generated
            ),
            **trainer_options(folder, profile, seed),
        )
    )
    reward = make_reward(
        turns, bonus, group, student.processor.image_token_id, lambda image: image_tokens(student, image)
    )
    trainer = Trainer(
        model=student.model,
        reward_funcs=reward,
        args=config,
        train_dataset=dataset,
        processing_class=student.processor,
        environment_factory=make_environment(profile.style),
        peft_config=None if tuned else lora(profile),
        callbacks=[] if probe is None else [_probing(student, probe, folder, profile, turns)],
    )
    with hardware.memory_advice(
        "training with GRPO", "most_at_once, grpo_generated and grpo_device_batch", "generations or max_pixels"
    ):
        return finish(trainer, folder, profile.student, exact)


def _probing(student: Student, records, folder: Path, profile, turns: int):
    """Return a trainer callback that lets the policy answer `records` greedily and keeps the IoUs in `folder`."""
    from transformers import TrainerCallback

    class Probing(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **_):
            if state.global_step == 0:
                self.answer(model, 0)
            elif distributed.rank() == 0:
                read_probe(folder)

        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step % profile.probe_every == 0 or state.global_step == state.max_steps:
                self.answer(model, state.global_step)

        def answer(self, model, step: int) -> None:
            model.eval()
            policy = Student(model, student.processor, student.grid)
            ious = iou_matrix(evaluate(policy, records, profile, turns=turns)).round(6).tolist()
            model.train()
            if distributed.rank() == 0:
                rows = read_probe(folder)["rows"] if step else []
                rows = [row for row in rows if row["step"] < step] + [{"step": step, "ious": ious}]
                curve = {"image_ids": [record["image_id"] for record in records], "rows": rows}
                write_text(folder / PROBE, json.dumps(curve))

    return Probing()


def probe_records(profile):
    """Return the prompts of the learning curve: the first ones of the validation split."""
    return first(load_split(profile, "val"), profile.grpo_probe)


def read_probe(folder: Path) -> dict:
    """Return the learning curve of a training with `probe`: {"image_ids": one a record, "rows": [{"step", "ious"}]}.

    "ious" has one list a record, with the IoU of each of its answers, 0 to 1. ArtefactError where it is not there.
    """
    return read_json(folder / PROBE, f"delete {folder} and run again.")


def image_tokens(student: Student, image) -> int:
    """Return how many tokens an image takes in a chat."""
    kind = student.processor.image_processor
    return kind.get_number_of_image_patches(image.height, image.width) // kind.merge_size**2


def most_image_tokens(student: Student, max_pixels: int, image) -> int:
    """Return how many tokens an image of the data takes at most; without a bound, as many as this one."""
    kind = student.processor.image_processor
    return max_pixels // (kind.patch_size * kind.merge_size) ** 2 if max_pixels else image_tokens(student, image)


def group_rewards(group, format_bonus: float) -> list[float]:
    """Return GRPO's reward of each rollout: IoU of the final box, and the bonus when every answer parses."""
    answers = [([step["box"] for step in rollout["steps"]], rollout["truth"]) for rollout in group]
    return [paper_reward(step_ious(boxes, truth, len(boxes) - 1), format_bonus) for boxes, truth in answers]


def advantages(rewards: list[list[float]], spread: str) -> list[list[float]]:
    """Return the advantages of groups of rewards: reward - mean of the group, divided as TRL does by a spread.

    `spread`: the standard deviation of all rewards ("batch"), of the "group", or "none".
    """
    if spread not in SPREADS:
        raise ValueError(f"There is no spread {spread!r}; choose one of {', '.join(SPREADS)}.")
    everyone, divided = np.concatenate(rewards), []
    for group in map(np.asarray, rewards):
        values = {"batch": everyone, "group": group, "none": None}[spread]
        by = 1 if values is None else (values.std(ddof=1) if len(values) > 1 else 0) + 1e-4
        divided.append((np.round((group - group.mean()) / by, 9) + 0.0).tolist())  # no -0
    return divided

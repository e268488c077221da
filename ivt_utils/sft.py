"""SFT on corrective trajectories (section 3 of the paper), with TRL's SFTTrainer and a LoRA adapter."""

import json
from pathlib import Path

from ivt_utils import protocol
from ivt_utils.overlay import draw_box, load_image
from ivt_utils.records import lazy_dataset, numbered
from ivt_utils.runtime import distributed, hardware
from ivt_utils.runtime.files import ArtefactError, read_json, write_text
from ivt_utils.schema import Rollout
from ivt_utils.student import Student, lora

LOG = "training_log.json"


def trajectories_dataset(records, trajectories: list[Rollout], style: str = "filled"):
    """Return a datasets.Dataset with `messages` and `images`, one row a trajectory, drawn when it is read."""
    numbers = numbered(records)

    def chat(row):
        image = load_image(records[row["number"]]["image"])
        steps = protocol.transcript(image, row["expression"], row["steps"], lambda i, box: draw_box(i, box, style))
        return protocol.split_images(steps)

    keys = ("expression", "steps")
    return lazy_dataset([{"number": numbers[t["id"]], **{key: t[key] for key in keys}} for t in trajectories], chat)


def sft_trainer(student: Student, dataset, folder: Path, profile, seed: int, steps: int | None = None):
    """Return TRL's trainer of a fresh LoRA adapter, with every value from the profile; notebook 3 has these lines too.

    The loss covers every assistant token, step 0 included, so that the student goes on answering at first sight.
    `steps` replaces the profile's epochs by a number of optimizer steps.
    """
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(
        num_train_epochs=profile.sft_epochs,
        max_steps=steps or -1,
        learning_rate=profile.sft_lr,
        lr_scheduler_type=profile.sft_schedule,
        warmup_steps=profile.sft_warmup,
        assistant_only_loss=True,
        max_length=None,
        **distributed.batch_share(profile.sft_batch, profile.sft_device_batch),
        **trainer_options(folder, profile, seed),
    )
    return SFTTrainer(
        model=student.model,
        args=distributed.one_card(config),
        train_dataset=dataset,
        processing_class=student.processor,
        peft_config=lora(profile),
    )


def train_sft(student: Student, dataset, folder: Path, profile, seed: int, steps: int | None = None) -> list[dict]:
    """Train the adapter of `sft_trainer`, save it to `folder` and return the log; resumes in `folder`."""
    trainer = sft_trainer(student, dataset, folder, profile, seed, steps)
    with hardware.memory_advice("training with SFT", "sft_device_batch", "max_pixels"):
        return finish(trainer, folder, profile.student)


def trainer_options(folder: Path, profile, seed: int) -> dict:
    """Return the trainer settings that SFT and GRPO share: where to save, how to resume, no telemetry."""
    import torch

    cuda, kind = torch.cuda.is_available(), hardware.precision() if profile.hub_student else "float32"
    return dict(
        output_dir=str(folder),
        seed=seed,
        data_seed=seed,
        logging_steps=1,
        save_strategy="steps",
        save_steps=profile.save_every,
        save_total_limit=1,
        report_to=[],
        bf16=kind == "bfloat16",
        fp16=kind == "float16",
        activation_checkpointing=cuda,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def finish(trainer, folder: Path, student_name: str, exact: dict | None = None) -> list[dict]:
    """Train (from the last checkpoint in `folder` if there is one), save adapter and log, return the log's rows.

    All processes train; process 0 writes. The adapter is trained in float32: TRL rounds that of a 4-bit model to
    bfloat16, where small steps would be lost. `exact`: its weights {name: tensor} as they were before the rounding.
    """
    from transformers import PrinterCallback, TrainerState

    trainer.remove_callback(PrinterCallback)  # it would print every row of the log
    if distributed.rank() == 0:
        trainer.add_callback(_progress_bar())
    for name, weight in trainer.model.named_parameters():
        if weight.requires_grad:
            weight.data = (exact or {}).get(name, weight.data).float()
    checkpoint, complete = distributed.agree(last_checkpoint(folder)), False
    if checkpoint:
        state, max_steps = (
            TrainerState.load_from_json(str(Path(checkpoint, "trainer_state.json"))),
            trainer.args.max_steps,
        )
        if max_steps > 0 and state.max_steps != max_steps:
            raise ArtefactError(
                f"{folder} holds a training of {state.max_steps} steps that was interrupted, and now "
                f"{max_steps} are asked for: finish it with as many, or delete that folder."
            )
        complete = state.global_step >= state.max_steps  # only the adapter was not written yet
    if complete:
        trainer._load_from_checkpoint(checkpoint)
        trainer.state = state
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    log = [row for row in trainer.state.log_history if "loss" in row]
    if distributed.rank() == 0:
        trainer.model.save_pretrained(str(folder), selected_adapters=["default"], save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)
        settings = read_json(folder / "adapter_config.json")
        settings["base_model_name_or_path"] = student_name  # not a path of this machine
        write_text(folder / "adapter_config.json", json.dumps(settings, indent=1, sort_keys=True))
        write_text(folder / LOG, json.dumps(log))
    distributed.wait()
    return log


def _progress_bar():
    """Return a trainer callback that shows one progress bar with the latest loss, in a notebook as in a terminal."""
    from tqdm.auto import tqdm
    from transformers import TrainerCallback

    class Bar(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

        def on_step_end(self, args, state, control, **_):
            self.bar.update()

        def on_log(self, args, state, control, logs=None, **_):
            told = logs or {}
            self.bar.set_postfix({key: f"{told[key]:.3f}" for key in ("loss", "reward") if key in told})

        def on_train_end(self, args, state, control, **_):
            self.bar.close()

    return Bar()


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest whole checkpoint in a folder, or None; the trainer's state is the last file it writes."""
    whole = [state.parent for state in Path(folder).glob("checkpoint-*/trainer_state.json")]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None


def read_log(folder: Path) -> list[dict]:
    """Return the log rows of a finished training: {"step", "loss", ...}."""
    return read_json(folder / LOG)

"""The student: the micro Qwen3-VL trained here, or Qwen3-VL from the Hub; its processor and its LoRA."""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ivt_utils import protocol
from ivt_utils.overlay import load_image
from ivt_utils.records import first, load_split
from ivt_utils.runtime import hardware
from ivt_utils.runtime.files import ROOT, ArtefactError, intact
from ivt_utils.runtime.store import installed

# What the micro student is loaded from.
FILES = (
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
HEAD, EYES = "lm_head", "model.visual"  # by their full names; transformers skips nothing for "visual" alone
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Student:
    """A model with its processor; `grid` is the step of its coordinates (10 for micro, 1 for Qwen3-VL).

    `served`: for a student that answers elsewhere, what asks it, from (chats, max_new_tokens, temperature, seed) to
    texts; it has no model and no processor here.
    """

    model: Any
    processor: Any
    grid: int = 1
    served: Callable[..., list[str]] | None = None


def install_protocol(processor):
    """Return the processor with the project's chat template set on it and its tokenizer."""
    processor.chat_template = processor.tokenizer.chat_template = protocol.chat_template()
    return processor


def load_student(profile, adapter: Path | str | None = None, trainable: bool = False) -> Student:
    """Return the profile's student, with a LoRA adapter when a folder is given (trainable only on request).

    On CUDA the model lies on this process's card, in the precision and with the attention that the card allows; on a
    CPU it is in float32. Where the profile says so, a student of the Hub is in 4 bits (NF4) on both. A frozen adapter
    is merged into weights that are not in 4 bits; above those it is in the type that the student computes in, as
    autocast takes it in training. Raises ArtefactError when the shipped student or the adapter is
    missing or damaged, a student of the Hub cannot be had or its revision is not pinned, bitsandbytes is missing, or
    the memory does not suffice.
    """
    import torch
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # peft and TRL ask by the old name; a reader can do nothing about it
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    local = not profile.hub_student
    options = loading_options(profile)
    if local:
        check_student(ROOT / profile.student)
    elif not re.fullmatch("[0-9a-f]{40}", profile.student_revision):
        raise ArtefactError(
            f"The profile {profile.name} does not say which {profile.student} it means: give its student_revision in "
            "ivt_utils/profiles.py, a commit hash of 40 digits, as the history of its files on the Hub has it."
        )
    if "quantization_config" in options and not installed("bitsandbytes"):
        raise ArtefactError(
            f"The profile {profile.name} loads its student in 4 bits, for which bitsandbytes is missing: "
            "pip install -e '.[gpu]', or set load_in_4bit to False in ivt_utils/profiles.py."
        )
    name = ROOT / profile.student if local else profile.student
    revision = profile.student_revision or "main"
    hardware.keep_memory()
    hardware.release()
    with hardware.memory_advice(f"loading {profile.student}", "", "the size of student"):
        try:
            model = Qwen3VLForConditionalGeneration.from_pretrained(
                name, local_files_only=local, revision=revision, **options
            )
            processor = AutoProcessor.from_pretrained(name, local_files_only=local, revision=revision)
        except OSError as error:
            if local:
                raise
            raise ArtefactError(
                f"{profile.student} could not be had from the Hub ({str(error).splitlines()[0]}); its "
                "first load needs a network, then it stays in the cache."
            ) from error
    for values in map(vars, model.modules()):
        if "support_avx512bf16_for_cpu" in values:  # answering would pack 4-bit weights so that no gradient passes them
            values["support_avx512bf16_for_cpu"] = False
    bound_images(install_protocol(processor), profile.max_pixels)
    processor.tokenizer.padding_side = "left"
    if adapter is not None:
        from peft import PeftModel

        if not (Path(adapter) / "adapter_model.safetensors").exists():
            raise ArtefactError(f"There is no adapter in {adapter}; run the notebook that trains it.")
        model = PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)
        model.peft_config["default"].base_model_name_or_path = str(name)
        if not trainable and "quantization_config" not in options:  # without the detour, answers come sooner
            model = model.merge_and_unload()
        elif not trainable:
            for weights, weight in model.named_parameters():
                if "lora_" in weights:
                    weight.data = weight.data.to(options["dtype"])
    model.eval()
    student = Student(model, processor, profile.grid)
    if options["dtype"] == torch.float16:
        check_finite(student, first(load_split(profile, "val"), profile.batch_size))
    return student


def check_finite(student: Student, records) -> None:
    """Raise an ArtefactError when the student computes, for one of the records, something that is no number.

    float16 may be too narrow for what a picture sets off.
    """
    import torch

    questions = [protocol.question(load_image(record["image"]), record["expression"]) for record in records]
    inputs = read_chats(student, [[question] for question in questions])
    with torch.inference_mode(), hardware.memory_advice("answering", "most_at_once and batch_size", "max_pixels"):
        finite = bool(torch.isfinite(student.model(**inputs, logits_to_keep=1).logits).all())
    if not finite:
        raise ArtefactError(
            "In float16 this student computes no finite numbers; use a card with bfloat16 (one newer "
            "than a T4 or V100)."
        )


def read_chats(student: Student, chats: list[list[dict]]):
    """Return the model's inputs for chats that the student answers next, on its device, padded on the left."""
    return student.processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    ).to(student.model.device)


def loading_options(profile) -> dict:
    """Return what `from_pretrained` is told about precision, attention, card and 4-bit weights on this machine.

    The micro student is computed in float32 everywhere. In 4 bits are a student's linear maps, but neither the output
    head nor, where the profile says so, the vision tower.
    """
    import torch

    hub = profile.hub_student
    kind = getattr(torch, hardware.precision() if hub else "float32")
    options = {"dtype": kind, "attn_implementation": hardware.attention() if hub else "sdpa", "use_safetensors": True}
    if torch.cuda.is_available():
        options["device_map"] = {"": hardware.device()}
    if profile.load_in_4bit and hub:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=kind,
            llm_int8_skip_modules=[HEAD, EYES] if profile.eyes_in_16bit else [HEAD],
        )
    return options


def bound_images(processor, max_pixels: int) -> None:
    """Let the processor shrink images to at most `max_pixels` (0: leave it as it is); their sides keep their ratio."""
    if max_pixels:
        size = processor.image_processor.size
        size["longest_edge"] = max_pixels  # Qwen's name for the number of pixels
        size["shortest_edge"] = min(size["shortest_edge"], max_pixels)


def check_student(folder: Path) -> None:
    """Raise an ArtefactError when a file that the micro student is loaded from is missing or damaged."""
    for name in FILES:
        intact(folder / name)


def lora(profile):
    """Return the LoRA configuration: the language model's projections by name, so the vision tower stays as it is."""
    from peft import LoraConfig

    return LoraConfig(
        r=profile.lora_rank,
        lora_alpha=profile.lora_alpha,
        lora_dropout=profile.lora_dropout,
        bias="none",
        target_modules=LORA_TARGETS,
        task_type="CAUSAL_LM",
    )

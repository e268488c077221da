"""What the machine can do: precision and attention by the card's capability, and one sentence when memory runs out."""

import platform
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from ivt_utils import student
from ivt_utils.loop import evaluate
from ivt_utils.profiles import get_profile
from ivt_utils.runtime import hardware
from ivt_utils.runtime.files import ArtefactError
from ivt_utils.runtime.store import Run
from ivt_utils.sft import trainer_options


@pytest.fixture
def card(monkeypatch):
    """Pretend a CUDA card: `card(capability, bf16)`; None: there is no card."""

    def pretend(capability, bf16=False, flash=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation
        )  # noqa: E501
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(hardware, "find_spec", lambda name: flash and name == "flash_attn" or None)

    return pretend


@pytest.mark.parametrize(
    "capability, bf16, flash, kind, attention",
    [
        (None, False, True, "float32", "sdpa"),  # a laptop
        ((7, 5), False, True, "float16", "sdpa"),  # a T4 has no bfloat16, and no FlashAttention 2
        ((8, 0), True, False, "bfloat16", "sdpa"),
        ((8, 0), True, True, "bfloat16", "flash_attention_2"),
        ((9, 0), True, True, "bfloat16", "flash_attention_2"),
    ],
)
def test_precision_and_attention_follow_the_card(card, capability, bf16, flash, kind, attention):
    card(capability, bf16, flash)
    assert (hardware.precision(), hardware.attention()) == (kind, attention)
    options = student.loading_options(get_profile("paper"))
    assert options["dtype"] == getattr(torch, kind) and options["attn_implementation"] == attention
    assert ("device_map" in options) == (capability is not None)


def test_four_bits_are_nf4_in_the_computing_type_and_for_the_hubs_student_only(card, monkeypatch):
    card((7, 5))
    monkeypatch.setenv("LOCAL_RANK", "1")
    options = student.loading_options(get_profile("colab"))
    assert options["device_map"] == {"": "cuda:1"}
    four = options["quantization_config"]
    assert four.load_in_4bit and four.bnb_4bit_quant_type == "nf4"
    assert four.bnb_4bit_compute_dtype == torch.float16
    assert four.llm_int8_skip_modules == ["lm_head", "model.visual"]
    monkeypatch.setenv("LOCAL_RANK", "3")  # a process that is shown fewer cards than there are processes
    assert hardware.device() == "cuda:1"
    micro = student.loading_options(get_profile("micro"))
    assert "quantization_config" not in micro and micro["dtype"] == torch.float32
    card(None)  # what the weights are belongs to the recipe, and not to the machine
    four = student.loading_options(get_profile("paper"))["quantization_config"]
    assert four.load_in_4bit and four.bnb_4bit_compute_dtype == torch.float32
    for profile in (replace(get_profile("paper"), load_in_4bit=False), get_profile("paper-dry-run")):
        assert "quantization_config" not in student.loading_options(profile)


def test_4_bits_without_bitsandbytes_are_one_sentence(monkeypatch):
    monkeypatch.setattr(student, "installed", lambda name: None)
    with pytest.raises(ArtefactError, match="bitsandbytes is missing: pip install -e .*or set load_in_4bit"):
        student.load_student(get_profile("paper"))


@pytest.mark.parametrize("capability, bf16, on", [(None, False, None), ((7, 5), False, "fp16"), ((8, 0), True, "bf16")])
def test_the_trainers_take_the_same_precision(card, tmp_path, capability, bf16, on):
    card(capability, bf16)
    options = trainer_options(tmp_path, get_profile("paper"), 0)
    assert {name: options[name] for name in ("fp16", "bf16")} == {"fp16": on == "fp16", "bf16": on == "bf16"}
    assert options["activation_checkpointing"] == (capability is not None) == (not options["use_cpu"])
    micro = trainer_options(tmp_path, get_profile("micro"), 0)  # float32 everywhere
    assert not micro["fp16"] and not micro["bf16"]


def test_images_are_bounded_by_the_profile_and_keep_their_ratio():
    from PIL import Image
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor

    kind = Qwen2VLImageProcessor(patch_size=16, merge_size=2, size={"shortest_edge": 65536, "longest_edge": 16777216})
    processor = Qwen3VLProcessor.__new__(Qwen3VLProcessor)
    processor.image_processor = kind
    picture = Image.new("RGB", (1280, 960))
    whole = kind(images=[picture])["image_grid_thw"][0].tolist()
    student.bound_images(processor, 0)
    assert kind(images=[picture])["image_grid_thw"][0].tolist() == whole == [1, 60, 80]
    most = get_profile("colab").max_pixels
    student.bound_images(processor, most)
    _, high, wide = kind(images=[picture])["image_grid_thw"][0].tolist()
    assert 0.8 * most < high * wide * 16 * 16 <= most and wide / high == pytest.approx(4 / 3, rel=0.1)
    tokens = student.Student(None, processor)
    from ivt_utils.grpo import image_tokens, most_image_tokens

    assert image_tokens(tokens, picture) <= most_image_tokens(tokens, most, picture) == most // 32**2
    assert most_image_tokens(tokens, 0, picture) == image_tokens(tokens, picture)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_out_of_memory_is_one_sentence_that_names_the_settings(error):
    with pytest.raises(ArtefactError) as caught, hardware.memory_advice("training", "sft_device_batch", "max_pixels"):
        raise error
    message = str(caught.value)
    assert message.startswith("Out of memory while training: in ivt_utils/profiles.py, lower sft_device_batch (down to")
    assert "same command then goes on" in message and "or max_pixels (in a new --run-dir" in message
    assert "\n" not in message


def test_what_may_be_lowered_in_the_middle_of_a_run_is_no_value_of_the_experiment(tmp_path):
    """The sentence promises that the same command goes on: so the folder of the run must take these values."""
    smoke = get_profile("smoke")
    Run(smoke, 0, tmp_path)
    for name in ("batch_size", "sft_device_batch", "grpo_device_batch", "grpo_generated", "most_at_once"):
        Run(replace(smoke, **{name: 1}), 0, tmp_path)
    with pytest.raises(ArtefactError, match="another profile, seed or values"):
        Run(replace(smoke, max_pixels=1), 0, tmp_path)


OTHERS = [ValueError("x"), RuntimeError("shapes do not match"), ArtefactError("Out of memory x")]


@pytest.mark.parametrize("error", OTHERS, ids=str)
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught, hardware.memory_advice("training", "", "student"):
        raise error
    assert caught.value is error


class Full:
    """A model whose card is full."""

    device, config = "cpu", None

    def generate(self, **_):
        raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_full_card_names_the_setting_where_it_happens(processor, records, tiny_profile, monkeypatch, tmp_path):
    full = student.Student(Full(), processor, 10)
    with pytest.raises(ArtefactError, match="while answering: .*lower most_at_once and batch_size .*or max_pixels"):
        evaluate(full, records, tiny_profile)

    import transformers

    def refuse(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(transformers.Qwen3VLForConditionalGeneration, "from_pretrained", refuse)
    with pytest.raises(ArtefactError, match="while loading data/student: .*lower the size of student"):
        student.load_student(tiny_profile)


@pytest.mark.parametrize(
    "kind, setting", [("sft", "sft_device_batch"), ("grpo", "most_at_once, grpo_generated and grpo_device_batch")]
)
def test_a_full_card_in_training_names_the_setting(
    kind, setting, fresh_student, records, tiny_profile, tmp_path, monkeypatch
):
    import importlib

    module = importlib.import_module(f"ivt_utils.{kind}")

    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(module, "finish", refuse)
    if kind == "sft":
        from ivt_utils.harvest import trajectory

        rollout = {
            "id": records[0]["id"],
            "image_id": "t0",
            "subset": "",
            "expression": records[0]["expression"],
            "truth": records[0]["bbox"],
            "steps": [{"text": "", "box": (0, 0, 50, 50)}],
        }
        dataset, train = module.trajectories_dataset(records, [trajectory(rollout, 2, 10)]), module.train_sft
    else:
        dataset, train = module.prompts_dataset(records), module.train_grpo
    with pytest.raises(ArtefactError, match=f"lower {setting}"):
        train(fresh_student, dataset, tmp_path, tiny_profile, 0)


def test_a_student_of_the_hub_without_a_network_is_one_sentence(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ArtefactError) as caught:
        student.load_student(replace(get_profile("paper"), load_in_4bit=False))
    message = str(caught.value)
    assert message.startswith("Qwen/Qwen3-VL-4B-Instruct could not be had") and "\n" not in message


def test_a_student_that_overflows_in_float16_is_not_used(fresh_student, records):
    student.check_finite(fresh_student, records)

    def overflow(module, inputs):  # as a picture can, and a plain square does not
        return (inputs[0] * (torch.inf if inputs[0].std(0).max() > 0.01 else 1), *inputs[1:])

    fresh_student.model.model.visual.register_forward_pre_hook(overflow)
    student.check_finite(fresh_student, [records[0] | {"image": Image.new("RGB", (64, 64))}])
    with pytest.raises(ArtefactError, match="In float16 .* no finite numbers; use a card with bfloat16"):
        student.check_finite(fresh_student, records)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep what was freed")
def test_large_tensors_come_and_go_without_page_faults():
    """In a process of its own, for it cannot be undone: 16,384 pages of 4 KB are touched once, and then no more."""
    lines = [
        "import resource, sys, numpy as np",
        "from ivt_utils.runtime.hardware import keep_memory",
        "keep_memory()",
        "for turn in range(2):",
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt",
        "    np.ones(2**23)",
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    first, second = map(int, done.stdout.split())
    assert first > 100 > second

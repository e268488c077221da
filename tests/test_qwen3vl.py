"""Qwen3-VL-2B and -4B as they are on the Hub: the two true configurations, built without memory (device "meta").

That our chat template renders plain turns as Qwen3-VL's own does is tested in `test_protocol`.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ivt_utils import protocol, student
from ivt_utils.overlay import draw_box
from ivt_utils.paper_scale import plan
from ivt_utils.profiles import get_profile

PUBLISHED = {"colab": 2.13e9, "paper": 4.44e9}  # parameters
OURS = ("student", "source", "image_processor")  # keys of the file that are not of the model's configuration


def build(configuration: dict):
    """The model of a configuration, on the meta device."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    with torch.device("meta"):
        config = Qwen3VLConfig(**{key: value for key, value in configuration.items() if key not in OURS})
        return Qwen3VLForConditionalGeneration(config)


@pytest.fixture(scope="module", params=["colab", "paper"])
def true(request):
    """A profile of the Hub, its student's configuration and the model built from it."""
    profile = get_profile(request.param)
    configuration = plan.configuration(profile)
    return SimpleNamespace(profile=profile, values=configuration, model=build(configuration))


def image_processor(values: dict):
    from transformers import Qwen2VLImageProcessor

    kind = dict(values["image_processor"])
    assert kind.pop("image_processor_type") == "Qwen2VLImageProcessor"
    return Qwen2VLImageProcessor(**kind)


def test_the_model_has_the_published_number_of_parameters(true):
    count = sum(p.numel() for p in true.model.parameters())
    assert abs(count / PUBLISHED[true.profile.name] - 1) < 0.005
    assert sum(plan.parameters(true.values).values()) == pytest.approx(count, rel=0.005)
    assert true.values["student"] == true.profile.student and true.values["source"]


def test_the_sizes_of_parts_are_those_of_the_built_model(true):
    parts, model = plan.parameters(true.values), true.model.model
    assert true.model.lm_head.weight is model.language_model.embed_tokens.weight
    linear = {
        part: sum(m.weight.numel() for m in tower.modules() if isinstance(m, torch.nn.Linear))
        for part, tower in (("text", model.language_model), ("vision", model.visual))
    }
    assert parts["text"] == linear["text"] and parts["vision"] == linear["vision"]
    assert parts["embeddings"] == model.language_model.embed_tokens.weight.numel()


class InFourBits(torch.nn.Linear):
    """Stands where bitsandbytes' own layer would: what counts here is which maps transformers puts it in place of."""

    def __init__(self, inputs, outputs, bias, *_, **__):
        super().__init__(inputs, outputs, bias)


def in_4_bits(configuration: dict, options, monkeypatch) -> dict[str, int]:
    """How many weights each linear map has that transformers replaces on loading with these options."""
    from transformers.integrations import bitsandbytes
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    monkeypatch.setattr(bitsandbytes, "bnb", SimpleNamespace(nn=SimpleNamespace(Linear4bit=InFourBits)), raising=False)
    model, quantizer = build(configuration), Bnb4BitHfQuantizer(options, pre_quantized=False)
    quantizer._process_model_before_weight_loading(model, device_map=None)
    return {name: module.weight.numel() for name, module in model.named_modules() if isinstance(module, InFourBits)}


def test_4_bit_loading_takes_the_whole_language_model_and_neither_the_eyes_nor_the_output_head(true, monkeypatch):
    profile = true.profile
    options = student.loading_options(profile)["quantization_config"]
    small = in_4_bits(true.values, options, monkeypatch)
    parts = plan.parameters(true.values)
    assert all(name.startswith("model.language_model.layers.") for name in small)
    assert len(small) == 7 * true.values["text_config"]["num_hidden_layers"] and sum(small.values()) == parts["text"]

    everything = replace(profile, eyes_in_16bit=False)
    options = student.loading_options(everything)["quantization_config"]
    both = in_4_bits(true.values, options, monkeypatch)
    assert sum(both.values()) == parts["text"] + parts["vision"] and "lm_head" not in both
    assert any(name.startswith(f"{student.EYES}.") for name in both)
    options.llm_int8_skip_modules = ["visual", "lm_head"]
    assert in_4_bits(true.values, options, monkeypatch) == both  # not its full name: nothing is skipped

    whole = sum(p.numel() for p in true.model.parameters())
    for kind, names in ((profile, small), (everything, both)):
        count = sum(names.values())
        wanted = count // 2 + count // 64 * 4 + 2 * (whole - count)
        assert plan.weight_bytes(true.values, kind) == pytest.approx(wanted, rel=0.01)
    assert plan.weight_bytes(true.values) == pytest.approx(2 * whole, rel=0.005)
    assert plan.weight_bytes(true.values, replace(profile, load_in_4bit=False)) == plan.weight_bytes(true.values)
    more = plan.memory(profile)["SFT"]["weights"] - plan.memory(everything)["SFT"]["weights"]
    assert more == pytest.approx(parts["vision"] * (2 - 0.5 - 4 / 64), abs=2)
    if profile.name == "paper":
        assert (round(sum(both.values()) / 1e6), round(parts["vision"] / 1e6)) == (4044, 411)
        assert more == pytest.approx(0.6e9, rel=0.05)


def test_lora_reaches_the_seven_projections_of_every_language_layer_and_nothing_else(true):
    from peft import get_peft_model

    with torch.device("meta"):
        model = get_peft_model(build(true.values), student.lora(true.profile))
    reached = {name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A")}
    layers = true.values["text_config"]["num_hidden_layers"]
    parts = ["self_attn"] * 4 + ["mlp"] * 3
    wanted = {
        f"base_model.model.model.language_model.layers.{i}.{part}.{name}"
        for i in range(layers)
        for part, name in zip(parts, student.LORA_TARGETS, strict=True)
    }
    assert reached == wanted and len(wanted) == 7 * layers
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert learning == plan.lora_parameters(true.values, true.profile.lora_rank) and true.profile.lora_rank == 64
    assert not any(p.requires_grad for name, p in model.named_parameters() if "visual" in name or "lm_head" in name)


def test_the_layers_that_fsdp_wraps_have_the_names_it_is_given(true):
    model = true.model.model
    assert {type(layer).__name__ for layer in model.language_model.layers} == {"Qwen3VLTextDecoderLayer"}
    assert {type(block).__name__ for block in model.visual.blocks} == {"Qwen3VLVisionBlock"}
    assert set(true.model._no_split_modules) == {"Qwen3VLTextDecoderLayer", "Qwen3VLVisionBlock"}


def test_the_micro_student_has_the_same_maps_and_marks(true, tiny_student):
    names = {type(module).__name__ for module in true.model.modules()}
    assert {type(module).__name__ for module in tiny_student.model.modules()} <= names
    ids = [
        true.values[f"{kind}_id"] for kind in ("image_token", "video_token", "vision_start_token", "vision_end_token")
    ]
    assert ids == [151655, 151656, 151652, 151653] and max(ids) < true.values["text_config"]["vocab_size"]
    config = true.model.config  # what transformers takes when nothing is said
    assert ids == [
        getattr(type(config)(), f"{k}_id")
        for k in ("image_token", "video_token", "vision_start_token", "vision_end_token")
    ]
    assert sum(config.text_config.rope_parameters["mrope_section"]) == true.values["text_config"]["head_dim"] // 2


# --- images and coordinates


def test_an_image_of_640_x_480_is_300_tokens(true):
    kind = image_processor(true.values)
    assert (kind.patch_size, kind.merge_size, kind.temporal_patch_size) == (16, 2, 2)
    made = kind(images=[Image.new("RGB", (640, 480))], return_tensors="pt")
    assert made["image_grid_thw"].tolist() == [[1, 30, 40]] and 30 * 40 // 4 == plan.PHOTO
    assert made["pixel_values"].shape == (1200, 3 * 2 * 16 * 16)


@pytest.mark.parametrize("size", [(640, 480), (1333, 800), (4000, 3000), (500, 375), (90, 40), (100, 3000)])
@pytest.mark.parametrize("bounded", [True, False])
def test_no_image_has_more_tokens_than_the_plan_says(true, size, bounded):
    kind, bound = image_processor(true.values), true.profile.max_pixels * bounded
    student.bound_images(SimpleNamespace(image_processor=kind), bound)
    grid = kind(images=[Image.new("RGB", size)], return_tensors="pt")["image_grid_thw"][0]
    tokens = int(grid.prod()) // 4
    assert tokens <= plan.most_image_tokens(true.values, bound)


def test_coordinates_are_0_to_1000_of_the_image_as_given_however_it_is_shrunk(true):
    assert "integers 0 to 1000" in protocol.PROMPT[1]
    kind, image = image_processor(true.values), Image.new("RGB", (4000, 2400))
    student.bound_images(SimpleNamespace(image_processor=kind), true.profile.max_pixels)
    drawn = draw_box(image, (250, 100, 750, 600))
    assert drawn.size == image.size
    columns, rows = (np.flatnonzero(np.asarray(drawn).sum(2).any(axis)) for axis in (0, 1))
    assert abs(columns[0] - 1000) < 20 and abs(columns[-1] - 3000) < 20  # pixels of the image as given
    assert abs(rows[0] - 240) < 20 and abs(rows[-1] - 1440) < 20
    seen = []
    for shown in (image, drawn):
        made = kind(images=[shown], return_tensors="pt")
        _, high, wide = made["image_grid_thw"][0].tolist()
        patches = made["pixel_values"].reshape(high // 2, wide // 2, 2, 2, -1).transpose(1, 2).reshape(high, wide, -1)
        seen.append(patches)
    assert high * wide // 4 <= true.profile.max_pixels // 32**2 < 4000 * 2400 // 32**2
    changed = (seen[0] - seen[1]).abs().amax(2) > 0.05
    for axis, length, (low, top) in ((0, wide, (250, 750)), (1, high, (100, 600))):
        found = changed.any(axis).nonzero().flatten()
        assert abs(found[0] / length * 1000 - low) <= 1000 / length + 5
        assert abs((found[-1] + 1) / length * 1000 - top) <= 1000 / length + 5

"""The student: the micro Qwen3-VL trained here, or Qwen3-VL from the Hub; its processor and its LoRA."""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ivt_utils import protocol
from ivt_utils.micro import scenes
from ivt_utils.profiles import STUDENT_RECIPE, StudentRecipe, get_profile
from ivt_utils.runtime import hardware
from ivt_utils.runtime.store import ROOT, ArtefactError, intact

GRID = get_profile("micro").grid  # the micro student's coordinates are multiples of this
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>")  # fmt: skip
# What the micro student is loaded from.
FILES = ("model.safetensors", "config.json", "generation_config.json", "processor_config.json", "tokenizer.json",
         "tokenizer_config.json", "chat_template.jinja")  # fmt: skip
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Student:
    """A model with its processor; `grid` is the step of its coordinates (10 for micro, 1 for Qwen3-VL)."""

    model: object
    processor: object
    grid: int = 1


# ---------------------------------------------------------------------------------------------- micro: tokenizer
def vocabulary(words: list[str]) -> list[str]:
    """Return the micro vocabulary: specials, chat pieces, the prompt's two parts, numbers, words with their space."""
    numbers = [str(v) for v in range(0, 1001, GRID)]
    pieces = ["<unk>", "user\n", "assistant\n", "\n", ".", ",", ":", "?", " ", '{"bbox_2d": [', ' {"bbox_2d": [', "]}"]
    return [*SPECIAL, *pieces, *protocol.PROMPT, *numbers, *[f", {n}" for n in numbers], *words]


def follow_up_words() -> list[str]:
    """Return every word of the follow-ups that no expression holds, with its leading space if it has one."""
    said = re.findall(" ?[A-Za-z]+", "\n".join((*protocol.AGAIN, *protocol.ANOTHER)))
    return sorted(set(said) - set(expression_words()))


def expression_words() -> list[str]:
    """Return every word that a synthetic expression can hold, with its leading space (and "the" without)."""
    phrases = [*scenes.SHAPES, *scenes.COLORS, *scenes.SIDES, *scenes.RELATIONS, *scenes.SUPERLATIVES,
               *scenes.HALVES, "the object second from that is not a and"]  # fmt: skip
    words = sorted({word for phrase in phrases for word in phrase.split()})
    return ["the", *[f" {word}" for word in words]]


def build_processor(words: list[str], image_side: int, patch: int):
    """Return a Qwen3VLProcessor for square images resized to `image_side` pixels, with a word-level tokenizer."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    tokens = vocabulary(words)
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    pattern = r'(?:user|assistant)\n| ?\{"bbox_2d": \[|\]\}|, [0-9]+|[0-9]+| ?[A-Za-z]+|[\s\S]'
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    core.add_tokens([AddedToken(part, normalized=False) for part in protocol.PROMPT])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<|endoftext|>", eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False, padding_side="left",
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
                              "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"},
    )  # fmt: skip
    area = image_side * image_side
    size = {"shortest_edge": area, "longest_edge": area}
    half = [0.5, 0.5, 0.5]
    image_processor = Qwen2VLImageProcessor(
        patch_size=patch, merge_size=2, temporal_patch_size=2, size=size, image_mean=half, image_std=half
    )
    return Qwen3VLProcessor(image_processor, tokenizer, Qwen3VLVideoProcessor(patch_size=patch, size=size))


# ---------------------------------------------------------------------------------------------- micro: model
def micro_processor(recipe: StudentRecipe = STUDENT_RECIPE):
    """Return the micro student's processor, with the protocol's templates on it."""
    return install_protocol(build_processor([*expression_words(), *follow_up_words()], recipe.image_side, recipe.patch))


def build_micro(processor, seed: int, recipe: StudentRecipe = STUDENT_RECIPE):
    """Return a fresh Qwen3VLForConditionalGeneration of a few million parameters, initialised for a small width."""
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in
           ("image_pad", "video_pad", "vision_start", "vision_end", "endoftext", "im_end")}  # fmt: skip
    side = recipe.image_side // recipe.patch
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=recipe.text_width, intermediate_size=recipe.text_width * 3,
            num_hidden_layers=recipe.text_layers, num_attention_heads=4, num_key_value_heads=4,
            head_dim=recipe.text_width // 4,
            max_position_embeddings=4096, initializer_range=0.05, pad_token_id=ids["endoftext"],
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True,
                             "mrope_section": _mrope_section(recipe.text_width // 8)},
            tie_word_embeddings=True,
        ),
        vision_config=dict(
            depth=recipe.vision_layers, hidden_size=recipe.vision_width, intermediate_size=recipe.vision_width * 4,
            num_heads=4, patch_size=recipe.patch, temporal_patch_size=2, spatial_merge_size=2,
            out_hidden_size=recipe.text_width, num_position_embeddings=side * side,
            deepstack_visual_indexes=[], initializer_range=0.05,
        ),
        image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3VLForConditionalGeneration(config)
    _initialise(model, tokenizer, side, recipe, torch.Generator().manual_seed(seed))
    model.generation_config.eos_token_id = ids["im_end"]
    model.generation_config.pad_token_id = ids["endoftext"]
    return model


def _mrope_section(half: int) -> list[int]:
    """Return how many rotary frequencies carry time, height and width; they add up to `half` a head."""
    third = half // 3
    return [half - 2 * third, third, third]


def _initialise(model, tokenizer, side: int, recipe: StudentRecipe, chance) -> None:
    """Give patches unit variance, positions a 2-D sin-cos code, numbers their codes, and one head a copier's maps.

    A number has a smooth code, in which neighbours are alike, so that places are learnt quickly; and a direction of its
    own, so that it can be told from its neighbours and copied. The layers start quietly, lest they drown it.
    """
    import torch

    visual, text = model.model.visual, model.model.language_model
    embed, width = text.embed_tokens.weight, visual.pos_embed.weight.shape[1]
    with torch.no_grad():
        projection = visual.patch_embed.proj.weight
        torch.nn.init.normal_(projection, std=projection[0].numel() ** -0.5)
        code = _sincos(torch.arange(side) / side, width // 2)
        grid = torch.cat([code.repeat_interleave(side, 0), code.repeat(side, 1)], 1)
        visual.pos_embed.weight.copy_(0.5 * grid)
        turn = torch.linalg.qr(torch.randn(embed.shape[1], embed.shape[1]))[0]
        smooth = _sincos(torch.arange(0, 1001, GRID) / 1000, embed.shape[1]) @ turn
        kinds = torch.randn(2, embed.shape[1]) * 0.05
        numbers = recipe.smooth_scale * smooth + recipe.own_scale * torch.randn(smooth.shape)
        for kind, form in enumerate(("{}", ", {}")):
            ids = tokenizer.convert_tokens_to_ids([form.format(value) for value in range(0, 1001, GRID)])
            embed[ids] = numbers + kinds[kind]
        for layer in text.layers:
            for branch in (layer.self_attn.o_proj, layer.mlp.down_proj):
                branch.weight *= recipe.branch_scale
        attention = text.layers[recipe.points_in].self_attn
        head = slice(recipe.copy_head * attention.head_dim, (recipe.copy_head + 1) * attention.head_dim)
        part = torch.linalg.qr(torch.randn(embed.shape[1], attention.head_dim, generator=chance))[0]
        attention.v_proj.weight[head] = part.T  # what this head looks at,
        attention.o_proj.weight[:, head] = recipe.copy_scale * part  # it says


def _sincos(position, width: int):
    """Return sin-cos features (n, width) of positions 0..1, from half a period to `width` / 4 periods."""
    import torch

    waves = 2 ** torch.linspace(-1, 4, width // 2) * torch.pi
    angles = position[:, None] * waves[None]
    return torch.cat([angles.sin(), angles.cos()], 1)


# ---------------------------------------------------------------------------------------------- loading
def install_protocol(processor):
    """Return the processor with the project's chat template and response template set on it and its tokenizer."""
    processor.chat_template = processor.tokenizer.chat_template = protocol.chat_template()
    processor.tokenizer.response_template = protocol.RESPONSE_TEMPLATE
    return processor


def load_student(profile, adapter: Path | str | None = None, trainable: bool = False) -> Student:
    """Return the profile's student, with a LoRA adapter when a folder is given (trainable only on request).

    On CUDA the model lies on this process's card, in the precision and with the attention that the card allows, and in
    4 bits (NF4) where the profile says so; on a CPU it is whole, in float32. A frozen adapter of the micro student
    is merged into its weights. Raises ArtefactError when the shipped student or the adapter is missing or damaged, a
    student of the Hub cannot be had, or the memory does not suffice.
    """
    import torch
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # peft and TRL ask by the old name; a reader can do nothing about it
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    local = not profile.hub_student
    if local:
        check_student(ROOT / profile.student)
    name = ROOT / profile.student if local else profile.student
    hardware.keep_memory()
    hardware.release()
    with hardware.memory_advice(f"loading {profile.student}", "", "the size of student"):
        try:
            model = Qwen3VLForConditionalGeneration.from_pretrained(
                name, local_files_only=local, **loading_options(profile)
            )
            processor = AutoProcessor.from_pretrained(name, local_files_only=local)
        except OSError as error:
            if local:
                raise
            raise ArtefactError(f"{profile.student} could not be had from the Hub ({str(error).splitlines()[0]}); its "
                                "first load needs a network, then it stays in the cache.") from error  # fmt: skip
    bound_images(install_protocol(processor), profile.max_pixels)
    processor.tokenizer.padding_side = "left"
    if adapter is not None:
        from peft import PeftModel

        if not (Path(adapter) / "adapter_model.safetensors").exists():
            raise ArtefactError(f"There is no adapter in {adapter}; run the notebook that trains it.")
        model = PeftModel.from_pretrained(model, str(adapter), is_trainable=trainable)
        model.peft_config["default"].base_model_name_or_path = str(name)
        if local and not trainable:  # in full precision; without the detour, answers come sooner
            model = model.merge_and_unload()
    model.eval()
    if model.dtype == torch.float16:
        check_finite(model, processor)
    return Student(model, processor, profile.grid)


def check_finite(model, processor) -> None:
    """Raise an ArtefactError when the model computes something that is no number: float16 may be too narrow for it."""
    import torch

    inputs = processor.apply_chat_template(
        [[protocol.question(Image.new("RGB", (64, 64)), "the object")]], add_generation_prompt=True, tokenize=True,
        return_dict=True, return_tensors="pt",
    ).to(model.device)  # fmt: skip
    with torch.inference_mode():
        finite = bool(torch.isfinite(model(**inputs).logits).all())
    if not finite:
        raise ArtefactError("In float16 this student computes no finite numbers; use a card with bfloat16 (one newer "
                            "than a T4 or V100).")  # fmt: skip


def loading_options(profile) -> dict:
    """Return what `from_pretrained` is told about precision, attention, card and 4-bit weights on this machine.

    The micro student is computed in float32 everywhere.
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
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=kind
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

    return LoraConfig(r=profile.lora_rank, lora_alpha=profile.lora_alpha, lora_dropout=0.0, bias="none",
                      target_modules=LORA_TARGETS, task_type="CAUSAL_LM")  # fmt: skip

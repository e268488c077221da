"""The micro student before any training: its vocabulary, its processor, and a small Qwen3-VL."""

import re

from ivt_utils import protocol
from ivt_utils.micro import scenes
from ivt_utils.profiles import STUDENT_RECIPE, StudentRecipe, get_profile
from ivt_utils.student import install_protocol

GRID = get_profile("micro").grid  # the micro student's coordinates are multiples of this
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


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
    phrases = [
        *scenes.SHAPES,
        *scenes.COLORS,
        *scenes.SIDES,
        *scenes.RELATIONS,
        *scenes.SUPERLATIVES,
        *scenes.HALVES,
        "the object second from that is not a and",
    ]
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
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
        padding_side="left",
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        },
    )
    area = image_side * image_side
    size = {"shortest_edge": area, "longest_edge": area}
    half = [0.5, 0.5, 0.5]
    image_processor = Qwen2VLImageProcessor(
        patch_size=patch, merge_size=2, temporal_patch_size=2, size=size, image_mean=half, image_std=half
    )
    return Qwen3VLProcessor(image_processor, tokenizer, Qwen3VLVideoProcessor(patch_size=patch, size=size))


def micro_processor(recipe: StudentRecipe = STUDENT_RECIPE):
    """Return the micro student's processor, with the protocol's templates on it."""
    return install_protocol(build_processor([*expression_words(), *follow_up_words()], recipe.image_side, recipe.patch))


def build_micro(processor, seed: int, recipe: StudentRecipe = STUDENT_RECIPE):
    """Return a fresh Qwen3VLForConditionalGeneration of a few million parameters, initialized for a small width."""
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("image_pad", "video_pad", "vision_start", "vision_end", "endoftext", "im_end")
    }
    side = recipe.image_side // recipe.patch
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=recipe.text_width,
            intermediate_size=recipe.text_width * 3,
            num_hidden_layers=recipe.text_layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=recipe.text_width // 4,
            max_position_embeddings=4096,
            initializer_range=0.05,
            pad_token_id=ids["endoftext"],
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_interleaved": True,
                "mrope_section": _mrope_section(recipe.text_width // 8),
            },
            tie_word_embeddings=True,
        ),
        vision_config=dict(
            depth=recipe.vision_layers,
            hidden_size=recipe.vision_width,
            intermediate_size=recipe.vision_width * 4,
            num_heads=4,
            patch_size=recipe.patch,
            temporal_patch_size=2,
            spatial_merge_size=2,
            out_hidden_size=recipe.text_width,
            num_position_embeddings=side * side,
            deepstack_visual_indexes=[],
            initializer_range=0.05,
        ),
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=True,
    )
    model = Qwen3VLForConditionalGeneration(config)
    _initialize(model, tokenizer, side, recipe, torch.Generator().manual_seed(seed))
    model.generation_config.eos_token_id = ids["im_end"]
    model.generation_config.pad_token_id = ids["endoftext"]
    return model


def _mrope_section(half: int) -> list[int]:
    """Return how many rotary frequencies carry time, height and width; they add up to `half` a head."""
    third = half // 3
    return [half - 2 * third, third, third]


def _initialize(model, tokenizer, side: int, recipe: StudentRecipe, chance) -> None:
    """Give patches unit variance, positions a 2-D sin-cos code, numbers their codes, and one head a copier's maps.

    A number has a smooth code, in which neighbors are alike, so that places are learned quickly; and a direction of its
    own, so that it can be told from its neighbors and copied. The layers start quietly, lest they drown it.
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

"""The memory that a student takes, by part, from its configuration and a profile; no model is loaded.

Bytes are bytes, GB is 1e9. Sizes of tensors follow the code of transformers, peft and TRL as it stands, and are tested
against measurements of the micro student.
"""

import math

from ivt_utils.runtime.distributed import batch_share
from ivt_utils.runtime.store import DATA, ROOT, ArtefactError, intact, read_json

CONFIGURATIONS = {"Qwen/Qwen3-VL-2B-Instruct": "2b.json", "Qwen/Qwen3-VL-4B-Instruct": "4b.json"}  # in data/qwen3vl
OVERHEAD = {"GPU": 1.0e9, "CPU": 0.8e9}  # bytes of CUDA's context, or of Python with its libraries
# Tokens of text in a typical question, feedback and answer, with the marks of a chat
WORDS = {"hub": (65, 35, 45), "micro": (20, 29, 22)}
PHOTO = (640, 480)  # pixels of a typical image: COCO's
HEAD_TOKENS, HEAD_COLUMNS = 4096, 32768  # TRL computes the logits in tiles of this size


# ---------------------------------------------------------------------------------------------- the model
def configuration(profile) -> dict:
    """Return the student's `text_config`, `vision_config`, `image_processor` ...; ArtefactError for an unknown one."""
    folder = ROOT / profile.student
    if not profile.hub_student:
        return {**read_json(folder / "config.json"),
                "image_processor": read_json(folder / "processor_config.json")["image_processor"]}  # fmt: skip
    if profile.student not in CONFIGURATIONS:
        raise ArtefactError(f"There is no configuration of {profile.student} to plan with; known are "
                            f"{', '.join(CONFIGURATIONS)} (data/qwen3vl) and the micro student.")  # fmt: skip
    return read_json(intact(DATA / "qwen3vl" / CONFIGURATIONS[profile.student]))


def projections(config) -> list[tuple[int, int]]:
    """Return (inputs, outputs) of the seven linear maps of a language model's layer, in the order of LORA_TARGETS."""
    text = config["text_config"]
    wide, middle = text["hidden_size"], text["intermediate_size"]
    q, kv = (text[f"num_{kind}_heads"] * text["head_dim"] for kind in ("attention", "key_value"))
    return [(wide, q), (wide, kv), (wide, kv), (q, wide), (wide, middle), (wide, middle), (middle, wide)]


def parameters(config) -> dict[str, int]:
    """Return how many weights the parts have; "... linear" are those that 4-bit loading makes small."""
    text, vision = config["text_config"], config["vision_config"]
    wide, layers = text["hidden_size"], text["num_hidden_layers"]
    d, middle, out, blocks = (vision[k] for k in ("hidden_size", "intermediate_size", "out_hidden_size", "depth"))
    merged = d * vision["spatial_merge_size"] ** 2  # a merger takes the patches of an image token at once
    mergers = 1 + len(vision["deepstack_visual_indexes"])
    embeddings = text["vocab_size"] * wide * (1 if config["tie_word_embeddings"] else 2)
    return {
        "embeddings": embeddings,
        "text linear": layers * sum(i * o for i, o in projections(config)),
        "text norms": layers * (2 * wide + 2 * text["head_dim"]) + wide,
        "vision linear": blocks * (4 * d * d + 2 * d * middle),
        "mergers linear": mergers * (merged * merged + merged * out),
        "vision other": blocks * (9 * d + middle) + patch_values(config) * d + d + vision["num_position_embeddings"] * d
        + mergers * (merged + out) + 2 * d + 2 * merged * (mergers - 1),
    }  # fmt: skip


def patch_values(config) -> int:
    """Return how many numbers an image patch has: colours x times x height x width."""
    vision = config["vision_config"]
    return vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2


def weight_bytes(config, four_bit: bool, element: int = 2) -> int:
    """Return the bytes of the loaded weights; NF4: half a byte, and 4 for each block of 64, of every linear map's
    weight, the output head's excepted; all else `element` bytes (2, or 4 for float32)."""
    parts = parameters(config)
    small = sum(count for part, count in parts.items() if part.endswith("linear"))
    return int(small * (0.5 + 4 / 64 if four_bit else element) + (sum(parts.values()) - small) * element)


def lora_parameters(config, rank: int) -> int:
    """Return how many weights an adapter has: `rank` x (inputs + outputs) of each projection in each layer."""
    return config["text_config"]["num_hidden_layers"] * rank * sum(i + o for i, o in projections(config))


def image_tokens(config, size: tuple[int, int], max_pixels: int = 0) -> int:
    """Return the tokens of an image of `size` (width, height) pixels, resized as Qwen's processor does it."""
    kind = config["image_processor"]
    side = kind["patch_size"] * kind["merge_size"]
    low, high = kind["size"]["shortest_edge"], max_pixels or kind["size"]["longest_edge"]
    width, height = (max(side, round(v / side) * side) for v in size)
    if width * height > high:
        scale = math.sqrt(size[0] * size[1] / high)
        width, height = (max(side, math.floor(v / scale / side) * side) for v in size)
    elif width * height < low:
        scale = math.sqrt(low / (size[0] * size[1]))
        width, height = (math.ceil(v * scale / side) * side for v in size)
    return width * height // side**2


# ---------------------------------------------------------------------------------------------- memory
def kv_cache_bytes(config, batch: int, tokens: int, element: int = 2) -> int:
    """Return the bytes of keys and values of `tokens` tokens in each of `batch` chats."""
    return config["text_config"]["num_hidden_layers"] * 2 * projections(config)[1][1] * batch * tokens * element


def vision_bytes(config, patches: int, element: int) -> int:
    """Return the working memory of the vision tower: the mixture of four position embeddings in float32, or the MLP of
    a block."""
    d, middle = (config["vision_config"][key] for key in ("hidden_size", "intermediate_size"))
    mixed = 16 * d + 4 * d * element + d * element + (16 * d if element < 4 else 0)
    return patches * max(mixed, element * (4 * d + 2 * middle))


def generation_bytes(config, batch: int, images: int, per_image: int, tokens: int, new: int, element=2) -> dict:
    """Return bytes by part while `batch` chats of `images` images and `tokens` tokens get `new` tokens more.

    `per_image` is the tokens of an image. The peak is the vision tower's pass, the language model's over the prompt (a
    mask and its copy, four wide tensors of the MLP in the adapter's float32), or the copy of a layer's growing cache.
    """
    text, vision = config["text_config"], config["vision_config"]
    wide, patches = text["hidden_size"], batch * images * per_image * vision["spatial_merge_size"] ** 2
    seen = 2 * batch * images * per_image * wide * element * (1 + len(vision["deepstack_visual_indexes"]))
    prompt, full = (kv_cache_bytes(config, batch, n, element) for n in (tokens, tokens + new))
    mask = batch * tokens**2 * (1 + element)
    layer = batch * tokens * (4 * element * wide + 16 * text["intermediate_size"]) + mask
    logits = 4 * 4 * batch * text["vocab_size"]
    peak = max(vision_bytes(config, patches, element) + seen, seen + prompt + layer,
               full + full // text["num_hidden_layers"] + logits)  # fmt: skip
    return {"images": patches * patch_values(config) * 4, "KV cache": full, "activations": max(peak - full, 0)}


def layer_bytes(config, batch: int, tokens: int, rank: int, element: int = 2) -> int:
    """Return what a layer of the language model with LoRA keeps for its backward pass.

    In 16 bits the norms keep their inputs in float32, and each adapter a copy of an input that is otherwise shared.
    """
    maps = projections(config)
    (wide, q), (_, kv), *_ = maps
    values = 4 * wide + 4 * maps[-1][0] + 5 * q + kv + 7 * rank + tokens + (element < 4) * (5 * wide + 2 * q + kv)
    return batch * tokens * values * element


def training_bytes(config, batch: int, images: int, per_image: int, tokens: int, scored: int, rank: int,
                   element=2, checkpointing=True, fused=True) -> dict:  # fmt: skip
    """Return bytes by part in a forward and backward pass over `batch` chats of `tokens` tokens.

    `scored`: tokens of them all that the output head sees, on a card with a `fused` kernel, on a CPU without. With
    checkpointing each layer keeps its input and one at a time is computed again, with the gradients of its widest
    tensors; without, all are kept. The vision tower is frozen.
    """
    text, vision = config["text_config"], config["vision_config"]
    patches = batch * images * per_image * vision["spatial_merge_size"] ** 2
    layer, depth = layer_bytes(config, batch, tokens, rank, element), text["num_hidden_layers"]
    row, columns = min(scored, HEAD_TOKENS), min(text["vocab_size"], HEAD_COLUMNS)
    head = row * (HEAD_COLUMNS * element + (0 if fused else 7 * 4 * columns))
    head += scored * text["hidden_size"] * (4 + element)
    kept = depth * batch * tokens * text["hidden_size"] * element if checkpointing else depth * layer
    gradients = batch * tokens * element * (3 * text["intermediate_size"] + 2 * text["hidden_size"])
    again = layer + gradients if checkpointing else gradients
    now = max(head, again, vision_bytes(config, patches, element) - kept)
    return {"images": 2 * patches * patch_values(config) * 4, "activations": kept + now - min(head, now),
            "output head": min(head, now)}  # fmt: skip


def memory(profile, per_image: int | None = None) -> dict[str, dict[str, int]]:
    """Return for each kind of work its parts in bytes, on one GPU for a 4-bit profile, else on the CPU.

    Each answer is taken to be `max_new_tokens` long, and each image to have `per_image` tokens; None: as many as the
    profile lets through.
    """
    config, gpu = configuration(profile), on_gpu(profile)
    element, most = (2 if gpu else 4), per_image or most_image_tokens(config, profile.max_pixels)
    rank, rollouts, longest = profile.lora_rank, rollouts_at_once(profile), max(profile.turns, profile.long_turns)
    learnt = batch_share(profile.grpo_prompts * profile.generations, profile.grpo_device_batch)
    adapter = 4 * lora_parameters(config, rank)
    fixed = {"weights": weight_bytes(config, gpu, element), "overhead": int(OVERHEAD["GPU" if gpu else "CPU"])}
    learns = {"LoRA": adapter, "gradients": adapter, "optimiser": 2 * adapter}
    question, feedback, answer = words(profile)

    def generating(batch, turns):
        asked = (turns + 1) * most + question + turns * (feedback + profile.max_new_tokens)
        return generation_bytes(config, batch, turns + 1, most, asked, profile.max_new_tokens, element)

    def learning(batch, turns, answer, given):  # `given`: the tokens that the output head does not see on a GPU
        tokens = (turns + 1) * (most + answer) + question + turns * feedback
        scored = batch * (tokens - (given if gpu else 1))
        return training_bytes(config, batch, turns + 1, most, tokens, scored, rank, element, gpu, gpu)

    taught = (profile.turns + 1) * most + question + profile.turns * feedback  # what SFT only reads

    found = {
        "evaluation, harvest": {"LoRA": adapter, **generating(profile.batch_size, longest)},
        "SFT": {**learns, **learning(
            profile.sft_device_batch or profile.sft_batch, profile.turns, answer, taught)},
        "GRPO, rollouts": {"LoRA": 2 * adapter, "optimiser": 2 * adapter, **generating(rollouts, profile.grpo_turns)},
        "GRPO, learning": {**learns, "LoRA": 2 * adapter, **learning(
            learnt["per_device_train_batch_size"], profile.grpo_turns, profile.max_new_tokens, most + question)},
    }  # fmt: skip
    found["GRPO, learning"]["images"] = found["GRPO, rollouts"]["images"]  # those of all rollouts stay where they are
    return {name: fixed | parts for name, parts in found.items()}


def rollouts_at_once(profile) -> int:
    """Return how many rollouts GRPO generates together, in one process."""
    share = batch_share(profile.grpo_prompts * profile.generations, profile.grpo_device_batch, profile.generations)
    return share["per_device_train_batch_size"] * share["steps_per_generation"]


def on_gpu(profile) -> bool:
    """Return whether the profile is for a GPU: 4-bit weights of a student of the Hub."""
    return profile.load_in_4bit and profile.hub_student


def words(profile) -> tuple[int, int, int]:
    """Return the assumed tokens of a question's, a feedback's and an answer's text."""
    return WORDS["hub" if profile.hub_student else "micro"]


def typical_image_tokens(config, max_pixels: int, local: bool) -> int:
    """Return the tokens of a typical image: of a photo of PHOTO pixels; synthetic scenes (`local`) are all the same."""
    return most_image_tokens(config, max_pixels) if local else image_tokens(config, PHOTO, max_pixels)


def most_image_tokens(config, max_pixels: int) -> int:
    """Return the tokens of the largest image that the processor lets through."""
    kind = config["image_processor"]
    return (max_pixels or kind["size"]["longest_edge"]) // (kind["patch_size"] * kind["merge_size"]) ** 2

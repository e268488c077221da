"""What a run needs, before anything is spent: tokens, hours and memory on known cards, downloads and disk.

Everything is computed from a profile and the model's configuration; no model is loaded. The rules of thumb for memory
and time were measured with both students of the Hub, with random weights in 16 bits and a LoRA adapter, on an H200:
`tests/test_plan.py` has the numbers. What was not measured is said to be assumed.
"""

import math
import shutil
from dataclasses import replace

from ivt_utils.controls import names
from ivt_utils.methods import ASKED
from ivt_utils.paper_scale.download import sources
from ivt_utils.runtime import pace
from ivt_utils.runtime.distributed import batch_share
from ivt_utils.runtime.files import DATA, ROOT, ArtefactError, intact, read_json
from ivt_utils.runtime.text import aligned

CONFIGURATIONS = {"Qwen/Qwen3-VL-2B-Instruct": "2b.json", "Qwen/Qwen3-VL-4B-Instruct": "4b.json"}  # in data/qwen3vl
# Makers' figures: memory (GB), dense 16-bit matrix TFLOP/s
CARDS = {
    "T4": (16, 65),
    "L4": (24, 121),
    "A10G": (24, 70),
    "A100 40 GB": (40, 312),
    "A100 80 GB": (80, 312),
    "H100 80 GB": (80, 989),
}
REACHED = 0.2  # the share of a card's FLOP/s that is reached
TOKEN_SECONDS = 0.05  # a batch's next token takes so long, whatever the card: many small kernels have to be launched
USABLE = 0.9  # of a card's memory; the rest is lost between blocks
OVERHEAD = 1.5e9  # bytes: CUDA's context, and the output head's logits, which TRL makes in tiles
QUESTION, FEEDBACK, ANSWER = 65, 35, 45  # tokens of text, with the marks of a chat
PHOTO = 300  # tokens of a typical image: 640 x 480 pixels, as in COCO
KEPT = 934 / 2400  # the share of answers that the harvest keeps: the paper's
TRAININGS = {"SFT": 2, "GRPO": 3, "ablations": 2}  # adapters that notebooks 3, 4 and 5 train
SETTINGS = {
    "evaluation, harvest": "batch_size or max_pixels",
    "SFT": "sft_device_batch or max_pixels",
    "GRPO, rollouts": "grpo_generated, grpo_device_batch, generations or max_pixels",
    "GRPO, learning": "grpo_device_batch or max_pixels",
}


ASSUMED = f"""\
measured on an H200 with random weights in 16 bits: the memory of a batch is 8 % above to 14 % below what stands here; \
12 to 29 % of the FLOP/s are reached, here {REACHED:.0%}; a batch's next token takes 41 to 58 ms, here \
{1000 * TOKEN_SECONDS:.0f}
assumed: {QUESTION} tokens a question, {FEEDBACK} a feedback, {ANSWER} a typical answer, {PHOTO} a typical image; the \
harvest keeps {KEPT:.0%} of the answers, as the paper's does
assumed: 4-bit weights (NF4) of the language model's linear maps, 16 bits for all else; {OVERHEAD / 1e9} GB for CUDA \
and the output head; {USABLE:.0%} of a card's memory can be used; every card reaches the same share of its maker's \
TFLOP/s"""


def configuration(profile) -> dict:
    """Return the `text_config`, `vision_config`, `image_processor` ... of a student of the Hub.

    ArtefactError for one that is not known here.
    """
    if profile.student not in CONFIGURATIONS:
        raise ArtefactError(
            f"There is no configuration of {profile.student} to plan with; known are "
            f"{', '.join(CONFIGURATIONS)} (data/qwen3vl)."
        )
    return read_json(intact(DATA / "qwen3vl" / CONFIGURATIONS[profile.student]))


def projections(config) -> list[tuple[int, int]]:
    """Return (inputs, outputs) of the seven linear maps of a language model's layer, in the order of LORA_TARGETS."""
    text = config["text_config"]
    wide, middle = text["hidden_size"], text["intermediate_size"]
    q, kv = (text[f"num_{kind}_heads"] * text["head_dim"] for kind in ("attention", "key_value"))
    return [(wide, q), (wide, kv), (wide, kv), (q, wide), (wide, middle), (wide, middle), (middle, wide)]


def parameters(config) -> dict[str, int]:
    """Return how many weights the parts have; all but the "embeddings" are linear maps, and small in 4 bits.

    Norms, biases and what turns patches into vectors are left out: they are less than one weight in two hundred.
    """
    text, vision = config["text_config"], config["vision_config"]
    d, middle, out, blocks = (vision[k] for k in ("hidden_size", "intermediate_size", "out_hidden_size", "depth"))
    merged = d * vision["spatial_merge_size"] ** 2  # a merger takes the patches of an image token at once
    mergers = 1 + len(vision["deepstack_visual_indexes"])
    return {
        "embeddings": text["vocab_size"] * text["hidden_size"] * (1 if config["tie_word_embeddings"] else 2),
        "text": text["num_hidden_layers"] * sum(i * o for i, o in projections(config)),
        "vision": blocks * (4 * d * d + 2 * d * middle) + mergers * (merged * merged + merged * out),
    }


def weight_bytes(config, profile=None) -> int:
    """Return the bytes of the weights as a profile loads them, by default as they are downloaded.

    In 16 bits it is two a weight, in NF4 half a byte, and four for each block of 64.
    """
    eyes = [] if profile and profile.eyes_in_16bit else ["vision"]
    small = ["text", *eyes] if profile and profile.load_in_4bit else []
    return int(sum(count * (0.5 + 4 / 64 if part in small else 2) for part, count in parameters(config).items()))


def lora_parameters(config, rank: int) -> int:
    """Return how many weights an adapter has: `rank` x (inputs + outputs) of each projection in each layer."""
    return config["text_config"]["num_hidden_layers"] * rank * sum(i + o for i, o in projections(config))


def most_image_tokens(config, max_pixels: int) -> int:
    """Return the tokens of the largest image that the processor lets through."""
    kind = config["image_processor"]
    return (max_pixels or kind["size"]["longest_edge"]) // (kind["patch_size"] * kind["merge_size"]) ** 2


def answers(profile) -> list[tuple[str, str, int, list[int]]]:
    """Return (notebook, stage, samples, for each answer of a sample how many images it follows) of `ivt run`.

    All that a student generates; rollouts are counted as if none ended early.
    """
    loop = list(range(1, profile.turns + 2))
    long = list(range(1, max(profile.turns, profile.long_turns) + 2))
    tried = list(range(1, profile.grpo_turns + 2))
    sampled, control = [1] * len(loop), [2] * (len(names(profile.control_shifts)) - 1)  # the own box: the loop
    test, val, students = profile.test, min(profile.ablation_test, profile.val), len(ASKED)
    group = profile.grpo_prompts * profile.generations
    probes = (math.ceil(profile.grpo_steps / profile.probe_every) + 1) * min(profile.grpo_probe, profile.val)
    return [
        ("01", "loop and bare image", test, [*long, *loop]),
        ("01", "other second turns", test, 4 * [2]),
        ("02", "harvest", profile.train, [1]),
        ("03", "SFT on test", test, 2 * long),
        ("04", "groups to look at", 4 * profile.generations, tried),
        ("04", "GRPO rollouts", profile.grpo_steps * group, 2 * tried),
        ("04", "GRPO rollouts, one step", profile.grpo_steps * group, [1]),
        ("04", "GRPO's learning curve", probes, [*tried, *tried, 1]),
        ("04", "GRPO on test", test, [*long, *long, 1]),
        ("05", "ablations on val", val, [*(5 * loop), *long]),
        ("06", "loop on val", students * val, loop),
        ("06", "sampled answers", students * (test + val), sampled),
        ("06", "controls", students * test, control),
    ]


def reading_seconds(config, tflops: float, images: int, per_image: int, tokens: int) -> float:
    """Return the seconds in which a card reads a chat of so many tokens, `images` images of `per_image` among them.

    Two operations for each weight that a token passes; an image token stands for four patches.
    """
    parts = parameters(config)
    return 2 * (tokens * parts["text"] + 4 * images * per_image * parts["vision"]) / (tflops * 1e12 * REACHED)


def hours(profile, tflops: float) -> dict[str, float]:
    """Return the hours of each part of a run on a card of so many TFLOP/s, with typical images and answers."""
    config, loop, group = configuration(profile), profile.turns + 1, profile.grpo_prompts * profile.generations
    per_image = min(PHOTO, most_image_tokens(config, profile.max_pixels))

    def read(images):
        tokens = images * per_image + QUESTION + (images - 1) * (FEEDBACK + ANSWER)
        return reading_seconds(config, tflops, images, per_image, tokens)

    def generating(chats, batch, each):
        return sum(chats * read(images) + math.ceil(chats / batch) * ANSWER * TOKEN_SECONDS for images in each)

    def grpo(images):  # learning: forward, the same again for checkpointing, backward; and the reference policy
        own = generating(group, rollouts_at_once(profile), range(1, images + 1)) + 4 * group * read(images)
        return profile.grpo_steps * own

    spoken = {"05": 0.0, "else": 0.0}
    for notebook, stage, samples, each in answers(profile):
        if "rollouts" not in stage:
            spoken["05" if notebook == "05" else "else"] += generating(samples, profile.batch_size, each)
    sft = profile.sft_epochs * KEPT * profile.train * 3 * read(loop)
    found = {
        "evaluation, harvest": spoken["else"],
        "SFT": TRAININGS["SFT"] * sft,
        "GRPO": (TRAININGS["GRPO"] - 1) * grpo(profile.grpo_turns + 1) + grpo(1),
        "ablations": spoken["05"] + TRAININGS["ablations"] * sft,
    }
    return {name: seconds / 3600 for name, seconds in found.items()}


def token_bytes(config) -> dict[str, int]:
    """Return the bytes that a batch takes for each of its tokens, on a GPU, while "generating" and while "learning".

    Generating: keys and values in 16 bits, and the widest place of a layer. Learning, with checkpointing: the input of
    each layer, and one layer with its gradients.
    """
    text = config["text_config"]
    wide, middle, layers = (text[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    cache = 4 * layers * projections(config)[1][1]
    return {"generating": cache + 16 * middle + 8 * wide, "learning": 2 * layers * wide + 16 * middle + 40 * wide}


def memory(profile, grpo: bool = True) -> dict[str, dict[str, float]]:
    """Return for each kind of work its parts in bytes, on one GPU; images and answers are as large as they may be.

    Without `grpo` its two kinds are left out: processes that cannot share its batch may still answer.
    """
    config = configuration(profile)
    adapter, each = 4 * lora_parameters(config, profile.lora_rank), token_bytes(config)
    longest, most = max(profile.turns, profile.long_turns), most_image_tokens(config, profile.max_pixels)
    pixels = 4 * 4 * 3 * 2 * config["vision_config"]["patch_size"] ** 2  # of an image token: two frames, in 32 bits

    def stage(adapters, chats, turns, work):
        text = QUESTION + turns * FEEDBACK + (turns + 1) * profile.max_new_tokens
        return {
            "weights": weight_bytes(config, profile),
            "adapter": adapters * adapter,
            "batch": chats * ((turns + 1) * most * (each[work] + pixels) + text * each[work]),
            "overhead": OVERHEAD,
        }

    parts = {  # adapters: its weights, its gradients, the optimizer's two moments, and GRPO's reference policy
        "evaluation, harvest": stage(1, profile.batch_size, longest, "generating"),
        "SFT": stage(4, profile.sft_device_batch or profile.sft_batch, profile.turns, "learning"),
    }
    if not grpo:
        return parts
    learned = batch_share(profile.grpo_prompts * profile.generations, profile.grpo_device_batch)
    return parts | {
        "GRPO, rollouts": stage(4, rollouts_at_once(profile), profile.grpo_turns, "generating"),
        "GRPO, learning": stage(5, learned["per_device_train_batch_size"], profile.grpo_turns, "learning"),
    }


def rollouts_at_once(profile) -> int:
    """Return how many rollouts GRPO generates together, in one process."""
    group = profile.generations
    share = batch_share(profile.grpo_prompts * group, profile.grpo_device_batch, group, profile.grpo_generated)
    return share["per_device_train_batch_size"] * share["steps_per_generation"]


def fitted(profile, card_bytes: float, grpo: bool = True):
    """Return the profile with the largest batches that a card of so much memory holds while it generates.

    That is `batch_size` for evaluation, a power of two, and `grpo_generated`, in whole groups; both are at most
    `most_at_once`, and at least one sample or group, even where the card does not hold that. `grpo_generated` stays
    without `grpo`, and where advantages are divided by the spread of all that is generated together.
    """

    def fits(stage, **values):
        return sum(memory(replace(profile, **values), grpo)[stage].values()) <= USABLE * card_bytes

    most, group = max(1, profile.most_at_once), profile.generations
    chats = [n for n in (2**k for k in range(most.bit_length())) if fits("evaluation, harvest", batch_size=n)]
    profile = replace(profile, batch_size=max(chats, default=1))
    if not grpo or profile.scale_rewards == "batch":
        return profile
    counts = [n * group for n in range(1, profile.grpo_prompts + 1) if n * group <= most]
    rollouts = [n for n in counts if fits("GRPO, rollouts", grpo_generated=n)]
    return replace(profile, grpo_generated=max(rollouts, default=group))


def disk(profile) -> dict[str, int]:
    """Return the bytes to download and to keep, by item; the samples drawn from the data sets are not known before."""
    config, trained = configuration(profile), sum(TRAININGS.values())
    adapter = 4 * lora_parameters(config, profile.lora_rank)
    return {
        f"download: {profile.student}": weight_bytes(config),
        **{f"download: {name}": noted["bytes"] for name, noted in sources().items()},
        f"{trained} adapters": trained * adapter,
        "two checkpoints of a training": 2 * 3 * adapter,
    }


def this_machine() -> dict:
    """Return {"gpu", "gpu_bytes", "ram_bytes", "disk_bytes"} of this computer: what is free, the card's memory whole;
    None where there is none or it cannot be told."""
    import torch

    found = {"gpu": None, "gpu_bytes": None, "ram_bytes": None, "disk_bytes": shutil.disk_usage(ROOT).free}
    try:
        import psutil

        found["ram_bytes"] = psutil.virtual_memory().available
    except ImportError:
        pass
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found |= {"gpu": card.name, "gpu_bytes": card.total_memory}
    return found


def warnings(profile, machine: dict) -> list[str]:
    """Return a sentence for each thing that a machine may have too little of for the run of a student of the Hub."""
    said = []
    for stage, parts in memory(profile).items():
        size, room = sum(parts.values()), machine["gpu_bytes"]
        if room is not None and size > room * USABLE:
            said.append(
                f"{stage} may take {_gb(size)} GB, {machine['gpu']} has {_gb(room)} GB: lower "
                f"{SETTINGS[stage]} in ivt_utils/profiles.py."
            )
    weights, kept = weight_bytes(configuration(profile)), sum(disk(profile).values())
    for kind, doing, size in (("ram", "memory: loading the weights", weights), ("disk", "disk: the run", kept)):
        free = machine[f"{kind}_bytes"]
        if free is not None and size > free:
            said.append(f"{_gb(free)} GB of free {doing} may take {_gb(size)} GB.")
    return said


def plan_text(profile, machine: dict | None = None, warn: bool = True) -> str:
    """Return the plan for a terminal: tokens, time, memory, disk, warnings (of this machine), and what was assumed.

    `machine` is `this_machine`'s unless given. ArtefactError for a student without a configuration.
    """
    counts = [(book, stage, n * len(each)) for book, stage, n, each in answers(profile)]
    counts.append(("", "total", sum(n for *_, n in counts)))
    tokens = profile.max_new_tokens, min(ANSWER, profile.max_new_tokens)
    rows = [[book, stage, f"{n:,}", *(f"{n * each / 1e6:.2f}" for each in tokens)] for book, stage, n in counts]
    said = [
        f"Plan for the profile {profile.name}: {profile.student}",
        "Answers and tokens to generate",
        aligned([["notebook", "", "answers", "million tokens, at most", "typical"], *rows]),
    ]
    if not profile.hub_student:
        parts = pace.section_seconds(profile.name).items()
        told = ", ".join(f"{stem[:2]} {pace.clock(sum(seconds.values()))}" for stem, seconds in parts)
        said.append(f"Time on {pace.machine()}: {told}." if told else "How long it takes was not measured.")
        return "\n\n".join([*said, "No GPU and no download; `ivt doctor` knows what memory and disk it takes."])
    needs, kept = memory(profile), disk(profile)
    lines = []
    for name, (size, tflops) in CARDS.items():
        own = fitted(profile, size * 1e9)
        spent, most = hours(own, tflops), max(sum(parts.values()) for parts in memory(own).values())
        each = [f"{value:.1f}" for value in (*spent.values(), sum(spent.values()))]
        fits = "yes" if most <= size * 1e9 * USABLE else "no"
        lines.append([name, fits, str(own.batch_size), str(rollouts_at_once(own)), *each])
    parts = [[stage, *map(_gb, (*sizes.values(), sum(sizes.values())))] for stage, sizes in needs.items()]
    kept["all, without the samples drawn"] = sum(kept.values())
    said += [
        "Hours, roughly, on one card",
        aligned([["card", "it fits", "answers at once", "rollouts at once", *spent, "all"], *lines]),
        "Memory in GB, at most, on one card",
        aligned([["", *needs["SFT"], "all"], *parts]),
        "Disk in GB",
        aligned([["", "GB"], *([item, _gb(size)] for item, size in kept.items())]),
    ]
    if warn:
        machine = machine or this_machine()
        no_card = [] if machine["gpu"] else [f"No CUDA card here: {profile.name} needs one."]
        said += [f"warning: {sentence}" for sentence in (*no_card, *warnings(profile, machine))]
    return "\n\n".join([*said, ASSUMED])


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}" if size < 1e10 else f"{size / 1e9:.1f}"

"""What a run needs, before anything is spent: memory, answers to generate, hours on known cards, disk, and warnings.

Everything is computed from a profile and the model's configuration; no model is loaded. What cannot be computed is
assumed in the tables of this module and of `memory`, and `plan_text` prints every assumption.
"""

import math
import shutil
from collections import Counter

from ivt_utils.controls import names
from ivt_utils.methods import ASKED
from ivt_utils.paper_scale import memory
from ivt_utils.paper_scale.download import sources
from ivt_utils.runtime import pace
from ivt_utils.runtime.store import ROOT
from ivt_utils.runtime.text import aligned

# Makers' figures: memory (GB), bandwidth (GB/s), dense 16-bit matrix TFLOP/s
CARDS = {"T4": (16, 300, 65), "L4": (24, 300, 121), "A10G": (24, 600, 70), "A100 40 GB": (40, 1555, 312),
         "A100 80 GB": (80, 2039, 312), "H100 80 GB": (80, 3350, 989)}  # fmt: skip
REACHED = 0.3  # the share of a card's bandwidth and FLOP/s that is reached
TOKEN_SECONDS = 0.04  # a batch's next token takes at least this long: Python, and the launch of many small kernels
USABLE = 0.9  # of a card's memory; the rest is lost between blocks
KEPT = 934 / 2400  # the share of answers that the harvest keeps: the paper's
TRAININGS = {"SFT": 2, "GRPO": 3, "ablations": 2}  # adapters that notebooks 3, 4 and 5 train
SETTINGS = {"evaluation, harvest": "batch_size or max_pixels", "SFT": "sft_device_batch or max_pixels",
            "GRPO, rollouts": "grpo_device_batch, generations or max_pixels",
            "GRPO, learning": "grpo_device_batch or max_pixels"}  # fmt: skip


# ---------------------------------------------------------------------------------------------- answers
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


# ---------------------------------------------------------------------------------------------- time
def forward_flops(config, images: int, per_image: int, tokens: int) -> tuple[float, float]:
    """Return the floating-point operations of one chat in the language model and in the vision tower."""
    text, vision, parts = config["text_config"], config["vision_config"], memory.parameters(config)
    patches = per_image * vision["spatial_merge_size"] ** 2
    causal = 2 * tokens**2 * memory.projections(config)[0][1] * text["num_hidden_layers"]
    whole = 4 * patches**2 * vision["hidden_size"] * vision["depth"]
    seen = (parts["vision linear"] + memory.patch_values(config) * vision["hidden_size"]) * patches
    seen += parts["mergers linear"] * per_image
    return 2 * parts["text linear"] * tokens + causal, images * (2 * seen + whole)


def generation_seconds(config, card, chats: int, batch: int, images: int, per_image: int, tokens: int, new: int):
    """Return the seconds in which `chats` chats, `batch` at once, get `new` tokens each: the prompt is bound by FLOP/s,
    each new token by reading the 4-bit weights and the cache."""
    _, bandwidth, flops = card
    prompt = chats * sum(forward_flops(config, images, per_image, tokens)) / (flops * 1e12 * REACHED)
    parts = memory.parameters(config)
    read = parts["text linear"] * (0.5 + 4 / 64) + 2 * parts["embeddings"]
    read += memory.kv_cache_bytes(config, min(batch, chats), tokens)
    return prompt + math.ceil(chats / batch) * new * max(read / (bandwidth * 1e9 * REACHED), TOKEN_SECONDS)


def hours(profile, card) -> dict[str, float]:
    """Return the hours of each part of a run on one card (a row of CARDS), with typical images and answers."""
    config, (question, feedback, answer) = memory.configuration(profile), memory.words(profile)
    per_image = memory.typical_image_tokens(config, profile.max_pixels, not profile.hub_student)
    group, loop = profile.grpo_prompts * profile.generations, profile.turns + 1
    at_once = memory.rollouts_at_once(profile)

    def length(images):
        return images * per_image + question + (images - 1) * (feedback + answer)

    def generating(chats, batch, each):
        return sum(generation_seconds(config, card, chats, batch, k, per_image, length(k), answer) for k in each)

    def learning(chats, images, forwards=0):  # forward, the same again for checkpointing, backward to the adapters
        text, vision = forward_flops(config, images, per_image, length(images) + answer)
        return chats * ((3 + forwards) * text + (1 + forwards) * vision) / (card[2] * 1e12 * REACHED)

    def grpo(steps, images):  # 1: the reference policy's forward pass
        return steps * (generating(group, at_once, range(1, images + 1)) + learning(group, images, 1))

    spoken = Counter()
    for notebook, stage, samples, each in answers(profile):
        if "rollouts" not in stage:
            part = "ablations" if notebook == "05" else "evaluation, harvest"
            spoken[part] += generating(samples, profile.batch_size, each)
    sft = profile.sft_epochs * learning(KEPT * profile.train, loop)
    found = {
        "evaluation, harvest": spoken["evaluation, harvest"],
        "SFT": TRAININGS["SFT"] * sft,
        "GRPO": (TRAININGS["GRPO"] - 1) * grpo(profile.grpo_steps, profile.grpo_turns + 1)
        + grpo(profile.grpo_steps, 1),
        "ablations": spoken["ablations"] + TRAININGS["ablations"] * sft,
    }
    return {name: seconds / 3600 for name, seconds in found.items()}


# ---------------------------------------------------------------------------------------------- disk and machine
def disk(profile) -> dict[str, int | None]:
    """Return the bytes to download and to keep, by item; None: not known. The micro student downloads nothing."""
    config = memory.configuration(profile)
    adapter = 4 * memory.lora_parameters(config, profile.lora_rank)
    found: dict[str, int | None] = {}
    if profile.hub_student:
        found[f"download: {profile.student}"] = memory.weight_bytes(config, False)
    if profile.data == "hub" and profile.hub_student:
        found |= {f"download: {name}": noted["bytes"] for name, noted in sources().items()}
        found["the samples drawn from them"] = None
    found[f"{sum(TRAININGS.values())} adapters"] = sum(TRAININGS.values()) * adapter
    found["two checkpoints of a training"] = 2 * 3 * adapter
    return found


def this_machine(profile) -> dict:
    """Return {"gpu", "gpu_bytes", "ram_bytes", "disk_bytes"} of this computer: what is free, the card's memory whole;
    None where there is none or it cannot be told. PyTorch is asked for the card only when the profile is for one."""
    found = {"gpu": None, "gpu_bytes": None, "ram_bytes": None, "disk_bytes": shutil.disk_usage(ROOT).free}
    try:
        import psutil

        found["ram_bytes"] = psutil.virtual_memory().available
    except ImportError:
        pass
    if memory.on_gpu(profile):
        import torch

        if torch.cuda.is_available():
            card = torch.cuda.get_device_properties(0)
            found |= {"gpu": card.name, "gpu_bytes": card.total_memory}
    return found


def warnings(profile, machine: dict) -> list[str]:
    """Return a sentence for each reason why the machine cannot do the run, or may not be able to."""
    said, gpu = [], memory.on_gpu(profile)
    if gpu and machine["gpu"] is None:
        said.append(f"No CUDA card here: {profile.name} needs one.")
    room, kind = (machine["gpu_bytes"], machine["gpu"]) if gpu else (machine["ram_bytes"], "free memory")
    for stage, parts in memory.memory(profile).items():
        if room is not None and sum(parts.values()) > room * (USABLE if gpu else 1):
            said.append(f"{stage} may take {_gb(sum(parts.values()))} GB, {kind} has {_gb(room)} GB: lower "
                        f"{SETTINGS[stage]} in ivt_utils/profiles.py.")  # fmt: skip
    need = {"ram_bytes": memory.weight_bytes(memory.configuration(profile), False) if gpu else 0,
            "disk_bytes": sum(size or 0 for size in disk(profile).values())}  # fmt: skip
    for key, doing in (("ram_bytes", "free memory: loading the weights"), ("disk_bytes", "free disk: the run")):
        if machine[key] is not None and need[key] > machine[key]:
            said.append(f"{_gb(machine[key])} GB of {doing} may take {_gb(need[key])} GB.")
    return said


# ---------------------------------------------------------------------------------------------- the plan
def plan(profile, machine: dict | None = None) -> dict:
    """Return the whole plan: {"memory", "typical" (bytes by stage and part), "answers", "hours", "disk", "warnings",
    "assumed"}; `machine` is `this_machine`'s unless given. ArtefactError for a student without a configuration."""
    config = memory.configuration(profile)
    photo = memory.typical_image_tokens(config, profile.max_pixels, not profile.hub_student)
    return {
        "profile": profile.name, "student": profile.student, "parameters": memory.parameters(config),
        "LoRA": memory.lora_parameters(config, profile.lora_rank), "memory": memory.memory(profile),
        "typical": memory.memory(profile, photo), "answers": answers(profile),
        "hours": {name: hours(profile, card) for name, card in CARDS.items()} if memory.on_gpu(profile) else {},
        "disk": disk(profile), "warnings": warnings(profile, machine or this_machine(profile)),
        "assumed": assumptions(profile, photo),
    }  # fmt: skip


def assumptions(profile, photo: int) -> list[str]:
    """Return every assumption of the plan as a sentence."""
    question, feedback, answer = memory.words(profile)
    gpu, config = memory.on_gpu(profile), memory.configuration(profile)
    said = [
        f"text: {question} tokens a question, {feedback} a feedback, {answer} a typical answer (never more than "
        f"max_new_tokens = {profile.max_new_tokens})",
        f"images: at most {memory.most_image_tokens(config, profile.max_pixels)} tokens; a typical one has {photo}"
        + (f" ({' x '.join(map(str, memory.PHOTO))} pixels, as in COCO)" if profile.hub_student else ""),
        f"the harvest keeps {KEPT:.0%} of the answers, as the paper's does",
        f"{_gb(memory.OVERHEAD['GPU' if gpu else 'CPU'])} GB for {'CUDA' if gpu else 'Python and its libraries'}",
        f"GRPO generates {memory.rollouts_at_once(profile)} rollouts at once, whole groups of {profile.generations}, "
        "and keeps a copy of the adapter as the reference",
    ]
    if gpu:
        said += [
            "one card; 4-bit weights (NF4, blocks of 64) of every linear map but the output head, the rest in 16 bits; "
            "LoRA, its gradients and AdamW's two moments in 32 bits; checkpointing; attention that keeps no scores",
            f"cards, makers' figures: {'; '.join(f'{n} {b:,} GB/s, {f} TFLOP/s' for n, (_, b, f) in CARDS.items())}; "
            f"{REACHED:.0%} of both is reached, {USABLE:.0%} of the memory can be used",
            f"a batch's next token takes at least {TOKEN_SECONDS * 1000:.0f} ms, whatever the card",
            "free main memory for the 16-bit weights while they are loaded",
        ]
    else:
        said.append("32 bits throughout, no checkpointing; minutes were measured on two cores")
    return said


def plan_text(profile, machine: dict | None = None, warn: bool = True) -> str:
    """Return the plan for a terminal: memory, answers, time, disk, warnings (of this machine), and what was assumed."""
    found, gpu = plan(profile, machine), memory.on_gpu(profile)
    parts = list(dict.fromkeys(part for stage in found["memory"].values() for part in stage))
    rows = [[stage, *(_gb(sizes[part]) if part in sizes else "-" for part in parts), _gb(sum(sizes.values())),
             _gb(sum(found["typical"][stage].values()))] for stage, sizes in found["memory"].items()]  # fmt: skip
    counts = [(book, stage, n * len(each)) for book, stage, n, each in found["answers"]]
    counts.append(("", "total", sum(count for *_, count in counts)))
    spoken = [[book, stage, f"{n:,}", *(f"{n * tokens / 1e6:.2f}" for tokens in (
        profile.max_new_tokens, memory.words(profile)[2]))] for book, stage, n in counts]  # fmt: skip
    said = [
        f"Plan for the profile {profile.name}: {profile.student}, "
        f"{sum(found['parameters'].values()) / 1e6:,.1f} million parameters; "
        f"LoRA of rank {profile.lora_rank}, {found['LoRA'] / 1e6:.1f} million.",
        f"Memory in GB, on {'one GPU' if gpu else 'the CPU'}",
        aligned([["", *parts, "at most", "typical images"], *rows]),
        "Answers and tokens to generate",
        aligned([["notebook", "", "answers", "million tokens, at most", "typical"], *spoken]),
    ]
    if gpu:
        head = list(next(iter(found["hours"].values())))
        lines = [[name, fits(found, CARDS[name][0] * 1e9), *(f"{spent[part]:.1f}" for part in head),
                  f"{sum(spent.values()):.1f}"] for name, spent in found["hours"].items()]  # fmt: skip
        said += ["Hours, roughly, on one card", aligned([["card", "it fits", *head, "all"], *lines])]
    else:
        parts = pace.section_seconds(profile.name).items()
        told = ", ".join(f"{stem[:2]} {pace.clock(sum(seconds.values()))}" for stem, seconds in parts)
        said.append(f"Time on {pace.machine()}: {told}." if told else "How long it takes was not measured.")
    kept = [[item, "not known" if size is None else _gb(size)] for item, size in found["disk"].items()]
    return "\n\n".join([
        *said, "Disk in GB", aligned([["", "GB"], *kept, ["total of what is known", _gb(sum(
            size or 0 for size in found["disk"].values()))]]),
        *(f"warning: {sentence}" for sentence in found["warnings"] if warn),
        "\n".join(f"assumed: {sentence}" for sentence in found["assumed"]),
    ])  # fmt: skip


def fits(found: dict, room: float) -> str:
    """Return whether every stage of a plan fits into `room` bytes of a card: "yes", "with typical images" or "no"."""
    needs = [max(sum(parts.values()) for parts in found[size].values()) for size in ("memory", "typical")]
    return "yes" if needs[0] <= room * USABLE else "with typical images" if needs[1] <= room * USABLE else "no"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}" if size < 1e10 else f"{size / 1e9:.1f}"

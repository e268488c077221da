"""Measure on a GPU what `plan` takes for granted: python tests/measure_plan.py (about three minutes on an H200).

The students of the Hub get random weights in 16 bits, so nothing is downloaded; LoRA of rank 64 in 32 bits. A line is
a row of `MEASURED` in test_plan.py.
"""

import gc
import json
import time
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import cuda
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

CONFIGURATIONS = Path(__file__).parents[1] / "data" / "qwen3vl"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCHES = [  # chats, images in each, patches of an image (rows, columns), tokens of text in a chat
    (8, 3, (32, 64), 391),
    (8, 3, (30, 40), 391),
    (6, 3, (32, 64), 391),
    (2, 2, (32, 64), 228),
    (16, 1, (30, 40), 65),
]
TEXT = 100  # the id of some word


def student(name: str):
    """Return the configuration and the model of one of the Hub's students, with random weights and a LoRA adapter."""
    noted = json.loads((CONFIGURATIONS / f"{name}.json").read_text())
    values = {key: value for key, value in noted.items() if key not in ("student", "source", "image_processor")}
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**values))
    torch.set_default_dtype(torch.float32)
    lora = LoraConfig(r=64, lora_alpha=128, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()
    return values, model


def inputs(values: dict, chats: int, images: int, patches: tuple[int, int], text: int) -> dict:
    """Return a batch of chats: in each, so many images with a part of the text behind each of them."""
    rows, columns = patches
    image = values["image_token_id"]
    one = [values["vision_start_token_id"], *[image] * (rows * columns // 4), values["vision_end_token_id"]]
    ids = torch.tensor([(one + [TEXT] * (text // images - 2)) * images] * chats).cuda()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == image).int(),
        "pixel_values": torch.randn(chats * images * rows * columns, 1536).cuda(),
        "image_grid_thw": torch.tensor([[1, rows, columns]] * chats * images).cuda(),
    }


def measured(run) -> tuple[float, float]:
    """Return the GB that `run` takes at its peak beyond what was there, and its seconds; it has run once before."""
    run()
    gc.collect()
    cuda.empty_cache()
    cuda.synchronize()
    before, started = cuda.memory_allocated(), time.time()
    cuda.reset_peak_memory_stats()
    run()
    cuda.synchronize()
    return round((cuda.max_memory_allocated() - before) / 1e9, 3), round(time.time() - started, 2)


def generate(model, batch: dict, new: int) -> None:
    """Let the model write exactly `new` tokens in each chat."""
    with torch.inference_mode():
        model.generate(**batch, max_new_tokens=new, min_new_tokens=new, do_sample=False)


def learn(model, batch: dict) -> None:
    """Run one forward and backward pass without the output head."""
    with torch.autocast("cuda", torch.bfloat16):
        hidden = model.base_model.model.model(**batch, use_cache=False).last_hidden_state
        hidden.float().pow(2).mean().backward()
    model.zero_grad(set_to_none=True)


def row(values: dict, model, chats: int, images: int, patches: tuple[int, int], text: int) -> tuple:
    """Return a row of `MEASURED`."""
    batch = inputs(values, chats, images, patches, text)
    model.eval()
    _, first = measured(partial(generate, model, batch, 1))
    generating, seconds = measured(partial(generate, model, batch, 128))
    model.train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    learning, learned = measured(partial(learn, model, batch))
    model.gradient_checkpointing_disable()
    tokens = patches[0] * patches[1] // 4, batch["input_ids"].shape[1]
    return chats, images, *tokens, generating, learning, first, seconds, learned


if __name__ == "__main__":
    for name in ("4b", "2b"):
        values, model = student(name)
        print(name, cuda.get_device_name())
        for batch in BATCHES:
            print(row(values, model, *batch), flush=True)
        del model

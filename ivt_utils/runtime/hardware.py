"""What the machine can do: precision, attention, the device of this process; and one sentence when memory runs out."""

import ctypes
import gc
import os
import platform
import re
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from ivt_utils.runtime.files import ArtefactError


def processor() -> str:
    """Return the processor's name as the system gives it."""
    try:
        match = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device() -> str:
    """Return this process's device: its CUDA card where there is one, else "cpu"."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % max(1, torch.cuda.device_count())}"


def release() -> None:
    """Give back what finished trainings and students still hold of the card's memory."""
    import torch

    gc.collect()  # a trainer and its model hold each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def keep_memory() -> None:
    """Let this process keep the memory that it has freed, where the C library is glibc: a CPU then answers sooner.

    PyTorch's tensors come and go with every layer, and without this the system hands each large one out page by page.
    """
    trim_threshold, mmap_max = -1, -4  # their numbers in malloc.h
    if sys.platform == "linux" and (set_option := getattr(ctypes.CDLL(None), "mallopt", None)):
        set_option(mmap_max, 0)
        set_option(trim_threshold, 2**31 - 1)


def precision() -> str:
    """Return the type for computing: "bfloat16" on cards that have it, "float16" on older ones (T4), else "float32"."""
    import torch

    if not torch.cuda.is_available():
        return "float32"
    # including_emulation: a T4 can imitate bfloat16, slowly
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def attention() -> str:
    """Return the attention to load a model with: FlashAttention 2 where card and package allow it, else PyTorch's."""
    import torch

    new = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 8
    return "flash_attention_2" if new and find_spec("flash_attn") else "sdpa"


@contextmanager
def memory_advice(doing: str, cost: str, recipe: str):
    """Turn running out of memory in this block into an ArtefactError that names the settings of a profile to lower.

    `cost`: one that may be lowered in the middle of a run ("" for none); `recipe`: others, which make it another run.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        has_advice = isinstance(error, ArtefactError)  # by a block inside this one
        if has_advice or not (isinstance(error, MemoryError) or _out_of_memory(str(error))):
            raise
        again = f"{cost} (down to 1; the same command then goes on from the last stage or checkpoint), or "
        again *= bool(cost)
        raise ArtefactError(
            f"Out of memory while {doing}: in ivt_utils/profiles.py, lower {again}{recipe} (in a new "
            "--run-dir, for that changes the experiment)."
        ) from error


def _out_of_memory(message: str) -> bool:
    signs = ("out of memory", "can't allocate memory", "cannot allocate memory", "cublas_status_alloc_failed")
    return any(sign in message.lower() for sign in signs)

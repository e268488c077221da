"""What this computer has and lacks for the course, as lines such as `[ OK ] torch 2.14.1`."""

import ctypes
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from ivt_utils.runtime.files import ArtefactError, intact, trouble
from ivt_utils.runtime.hardware import usable_cores
from ivt_utils.runtime.store import installed

OK, NOTE, MISS = " OK ", "NOTE", "MISS"
MAIN = (
    "torch",
    "torchvision",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "numpy",
    "scipy",
    "pandas",
    "pyarrow",
    "matplotlib",
    "pillow",
    "papermill",
    "jupyterlab",
    "ipykernel",
    "ipywidgets",
)
MEMORY_GB = 6  # what a micro run may take at most (issue 2, "Speed and size")
DISK_GB = 2  # generous for the checkpoints and results of one run
BITSANDBYTES = "0.50.2"  # older ones unpack whole matrices for every batch above 1
PYTHONS = ((3, 11), (3, 14))  # from, below


def examine(project: Path, profile) -> list[tuple[str, str]]:
    """Return lines (tag, text) about Python, packages, cores, memory, disk, GPU and what a training on one compiles
    with, the weights of a student of the Hub, shipped data and notebooks.

    `[MISS]` stands for what the course cannot do without, `[NOTE]` for what is worth knowing.
    """
    lines = [
        python(),
        *packages(project / "requirements.lock"),
        cores(),
        *(needs(profile) if profile.hub_student else (memory(), disk(project))),
        writable(project),
        *gpu(profile),
        *compiling(profile),
        *(weights(profile) if profile.hub_student else []),
    ]
    data, reference = project / "data", project / "data" / "reference"
    lines += shipped(data)
    alone = (NOTE, "no reference results in data/reference/: each notebook needs those before it run")
    lines.append((OK, "reference results in data/reference/") if reference.is_dir() else alone)
    if profile.data == "hub":
        there = (data / "hub" / profile.name / "manifest.json").exists()
        absent = (NOTE, f"the data of {profile.name}: not prepared (ivt data --profile {profile.name})")
        lines.append((OK, f"the data of {profile.name} in data/hub/") if there else absent)
    count = len(list((project / "notebooks").glob("0*.ipynb")))
    lines.append((OK, f"{count} notebooks") if count else (MISS, "notebooks: none in notebooks/"))
    return lines


def python() -> tuple[str, str]:
    """Return the line about the interpreter."""
    low, high = PYTHONS
    text = f"python {sys.version.split()[0]}"
    if low <= sys.version_info[:2] < high:
        return OK, text
    return MISS, f"{text}: the course needs {low[0]}.{low[1]} or newer, below {high[0]}.{high[1]}"


def packages(lock: Path) -> list[tuple[str, str]]:
    """Return a line for each package well known, missing or of another version, and one for the rest."""
    if not lock.is_file():
        seen = [(OK, f"{name} {installed(name)}") if installed(name) else (MISS, name) for name in MAIN]
        return [(NOTE, f"{lock.name} is not here, so versions are not compared"), *seen]
    lines, rest = [], 0
    for want in read_lock(lock):
        has = installed(want.name)
        if has is None:
            lines.append((MISS, f"{want.name}: not installed (make setup, or pip install -r {lock.name})"))
        elif not want.specifier.contains(has, prereleases=True):
            lines.append((NOTE, f"{want.name} {has}, tested with {str(want.specifier).removeprefix('==')}"))
        elif want.name in MAIN:
            lines.append((OK, f"{want.name} {has}"))
        else:
            rest += 1
    return [*lines, (OK, f"{rest} further packages as in requirements.lock")]


def read_lock(lock: Path) -> list[Requirement]:
    """Return the lock's requirements that hold on this platform and Python."""
    lines = [line.split("#")[0].strip() for line in lock.read_text(encoding="utf-8").splitlines()]
    wanted = [Requirement(line) for line in lines if line]
    return [want for want in wanted if want.marker is None or want.marker.evaluate()]


def cores() -> tuple[str, str]:
    """Return the line about processor cores this process may use."""
    count = usable_cores()
    return OK if count > 1 else NOTE, f"{count} core{'s' if count > 1 else ''} (times are given for two)"


def memory() -> tuple[str, str]:
    """Return the line about free memory."""
    try:
        import psutil
    except ImportError:
        return NOTE, "free memory unknown without psutil"
    free = psutil.virtual_memory().available / 1e9
    return OK if free >= MEMORY_GB else NOTE, f"memory {free:.1f} GB free (micro keeps below {MEMORY_GB} GB)"


def disk(project: Path) -> tuple[str, str]:
    """Return the line about free disk space where results go."""
    free = shutil.disk_usage(project).free / 1e9
    return OK if free >= DISK_GB else MISS, f"disk {free:.1f} GB free (have {DISK_GB} GB for a run)"


def writable(project: Path) -> tuple[str, str]:
    """Return the line about writing results where they go by default; it tries."""
    folder = project / "runs"
    try:
        with tempfile.TemporaryDirectory(dir=folder if folder.is_dir() else project):
            return OK, "results can be written to runs/"
    except OSError as error:
        return NOTE, trouble(error, folder)


def shipped(data: Path) -> list[tuple[str, str]]:
    """Return the lines about what comes with the project and every run reads, after comparing checksums."""
    from ivt_utils.student import FILES

    parts = {
        "benchmark": [f"benchmark/{split}.parquet" for split in ("train", "val", "test")],
        "micro student": [f"student/{name}" for name in FILES],
        "the paper's numbers": ["paper_results.json"],
        "measured minutes": ["timings.json"],
    }
    lines = []
    for name, files in parts.items():
        try:
            for file in files:
                intact(data / file)
            lines.append((OK, f"{name} in data/"))
        except (ArtefactError, OSError) as error:
            lines.append((MISS, f"{name}: {trouble(error) if isinstance(error, OSError) else error}"))
    return lines


def needs(profile) -> list[tuple[str, str]]:
    """Return what `ivt plan` warns of on this computer: memory of the card, free memory and disk."""
    from ivt_utils.paper_scale.plan import this_machine, warnings

    found = warnings(profile, this_machine())
    return [(NOTE, sentence) for sentence in found] or [(OK, f"memory and disk as {profile.name} needs them")]


def cuda() -> bool | None:
    """Return whether torch sees a card; None when torch cannot be imported."""
    try:
        import torch

        return torch.cuda.is_available()
    except (ImportError, OSError):
        return None


def driver() -> Version | None:
    """Return the newest CUDA that the NVIDIA driver knows; None without a driver."""
    found = ctypes.c_int()
    try:
        library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        library.cuDriverGetVersion(ctypes.byref(found))
    except (OSError, AttributeError):
        return None
    return Version(f"{found.value // 1000}.{found.value % 1000 // 10}") if found.value else None  # 12040: CUDA 12.4


def gpu(profile) -> list[tuple[str, str]]:
    """Return lines about CUDA and 4-bit weights; only the profiles for a GPU cannot do without."""
    needed, there = profile.hub_student, cuda()
    if there is None:
        return [(MISS if needed else NOTE, "CUDA unknown, for torch cannot be imported")]
    if not there:
        return [(MISS, f"CUDA: {no_card(profile)}") if needed else (OK, "CUDA: none, none needed")]
    import torch

    card, known, wheel = torch.cuda.get_device_properties(0), driver(), torch.version.cuda
    lines = [(OK, f"CUDA: {card.name}, {card.total_memory / 1e9:.0f} GB")]
    if known and wheel and known < Version(wheel):
        lines.append((NOTE, f"CUDA: torch is built for {wheel}, newer than the driver's {known}: better update it"))
    there = installed("bitsandbytes")
    if needed and (not there or Version(there) < Version(BITSANDBYTES)):
        lines.append(
            (MISS, f"bitsandbytes {BITSANDBYTES} or newer: {there or 'not installed'} (pip install -e '.[gpu]')")
        )
    return lines


def no_card(profile) -> str:
    """Return why torch sees no card: no driver, a torch without CUDA or for a newer one, or the card is hidden."""
    import torch

    known, wheel = driver(), torch.version.cuda
    if not known:
        return f"none; {profile.name} needs it"
    if not wheel:
        return (
            f"none for torch {torch.__version__}, which is built without it, but an NVIDIA driver is here (CUDA "
            f"{known}): install torch's build for CUDA (on Linux: make clean, make setup without TORCH_INDEX)"
        )
    if known.major < Version(wheel).major:
        return (
            f"torch is built for {wheel}, and the driver knows none above {known}: update the driver, or "
            f"install torch's build for CUDA {known.major}"
        )
    return "an NVIDIA driver is here, but torch sees no card: compare nvidia-smi and CUDA_VISIBLE_DEVICES"


def compiling(profile) -> list[tuple[str, str]]:
    """Return a line about what Triton needs where a training runs on a card; none where that is not so.

    TRL's loss is a Triton kernel there. Before Triton starts its first one, it compiles a module of C for this Python.
    """
    if not (cuda() or profile.hub_student) or sys.platform != "linux":  # elsewhere TRL does without Triton
        return []
    asked, tag = os.environ.get("CC"), MISS if cuda() else NOTE
    compiler = shutil.which(asked) if asked else shutil.which("gcc") or shutil.which("clang")  # as Triton looks for it
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    headers = sysconfig.get_paths(scheme)["include"]
    missing = [] if compiler else [f"a C compiler ({f'CC is {asked}' if asked else 'gcc or clang'})"]
    missing += [] if Path(headers, "Python.h").is_file() else [f"Python's headers (Python.h in {headers})"]
    if not missing:
        return [(OK, f"C compiler {compiler} and Python's headers")]
    told = "without that, SFT and GRPO stop at their first step on a GPU, after the evaluation"
    packages = "gcc python{}.{}-dev".format(*sys.version_info)
    return [(tag, f"{' and '.join(missing)}: not found; {told} (Debian: apt install {packages})")]


def weights(profile) -> list[tuple[str, str]]:
    """Return the line about the student's weights in the Hub's cache, or about the room for them there; it tries.

    huggingface_hub 2.4 downloads a file under a name of its own each time, and removes what is not whole.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    from ivt_utils.paper_scale.plan import configuration, weight_bytes

    tag, cache = MISS if cuda() else NOTE, Path(constants.HF_HUB_CACHE)
    folder = (
        cache / repo_folder_name(repo_id=profile.student, repo_type="model") / "snapshots" / profile.student_revision
    )
    held = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    left = weight_bytes(configuration(profile)) - held
    if left <= 0:
        return [(OK, f"the weights of {profile.student} in {cache}")]
    try:
        place = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
        with tempfile.TemporaryDirectory(dir=place):
            free = shutil.disk_usage(place).free
    except OSError as error:
        return [(tag, f"{cache} cannot be written ({error.strerror}): name a folder for the weights in HF_HOME")]
    text = (
        f"disk {free / 1e9:.1f} GB free in {cache}, for {left / 1e9:.1f} GB of weights to download; a file whose "
        "download breaks off begins anew"
    )
    return [(OK, text) if free >= left else (tag, f"{text}; HF_HOME names another folder")]

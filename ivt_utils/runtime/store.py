"""What a run leaves behind: stages that are finished once, files that are whole or absent, and the reference results.

A stage writes under a temporary name, is renamed when whole, and is noted with its checksum in `stages.json`. The
next run takes it from there. A stage that this run has not made can be taken from `data/reference/`.
"""

import json
import os
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from ivt_utils.runtime import distributed
from ivt_utils.runtime.files import (
    DATA,
    ROOT,
    ArtefactError,
    checksum,
    matches,
    read_json,
    read_jsonl,
    replace_folder,
    restoring,
    write_text,
)

REFERENCE = DATA / "reference"
SEEDS = "seeds"  # in the folder of a run: the runs of other seeds (`stages.seeds`)
COUNTED = ("ablation_", "closer_", "confidence_", "control_", "sampled_", "second_")  # of them boxes count
PROBE = "probe.json"  # in the folder of an adapter: its learning curve (`grpo.read_probe`)
DIVISION = ("sft_device_batch", "grpo_device_batch", "grpo_generated")  # how many samples of a batch at once
LATE = 90  # seconds after which a file that process 0 has written is seen on every machine of a run
LIBRARIES = (
    "torch",
    "torchvision",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "numpy",
    "scipy",
    "pillow",
    "matplotlib",
    "papermill",
)
OPTIONAL = ("bitsandbytes",)  # noted where they are installed


def versions() -> dict[str, str]:
    """Return the installed versions of the libraries that results depend on."""
    needed = {name: installed(name) or "missing" for name in LIBRARIES}
    return needed | {name: version for name in OPTIONAL if (version := installed(name))}


def installed(name: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the project's git commit, with "+" when files differ from it; None outside a clone of the project.

    A project that was unpacked inside somebody else's repository has no commit of its own.
    """
    outside = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # as in a git hook

    def git(*words):
        process = subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=True, env=outside)
        return process.stdout.strip()

    try:
        if not os.path.samefile(git("rev-parse", "--show-toplevel"), ROOT):
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


class Run:
    """One run of the course: its profile, seed and folder, and the stages that it has finished.

    A folder belongs to one profile and seed: opening it with other values raises an ArtefactError.
    """

    def __init__(self, profile, seed: int = 0, root: Path | str | None = None):
        self.profile, self.seed = profile, seed
        self.root = Path(root) if root else ROOT / "runs" / profile.name
        values = {"profile": profile.name, "seed": seed, "values": profile.recipe()}
        note = self.root / "run.json"
        there = distributed.agree(note.exists())
        if not there and distributed.rank() == 0:
            write_text(note, json.dumps(values, indent=1))
        distributed.wait()
        await_file(note)
        if there:
            recorded = read_json(note)
            noted = recorded.get("values", {}).get("engine", "local")
            if noted != profile.engine:
                raise ArtefactError(
                    f"{self.root} holds answers of another engine ({noted}, not {profile.engine}), and those of two "
                    "are not compared: name another --run-dir."
                )
            same = recorded.keys() == values.keys() and all(recorded[key] == values[key] for key in ("profile", "seed"))
            if not same or profile.changed(recorded["values"]):
                raise ArtefactError(
                    f"{self.root} holds a run with another profile, seed or values; choose another "
                    "RUN_DIR, or delete that folder."
                )

    # ------------------------------------------------------------------ stages
    def rollouts(self, name: str, make) -> list[Any]:
        """Return the rollouts of a stage: read when finished, else made by `make()` and written as JSONL.

        The stage notes the profile's `batch_size`, on which a text may depend.
        """
        path, noted = self.root / "rollouts" / f"{name}.jsonl", {"batch_size": self.profile.batch_size}
        self._stage(f"rollouts/{name}", path, make, lambda rows: write_text(path, _lines(rows)), noted)
        return read_jsonl(path)

    def rows(self, name: str, make):
        """Return a stage's JSON value: read when finished, else made by `make()` and written."""
        path = self.root / "tables" / f"{name}.json"
        self._stage(f"tables/{name}", path, make, lambda value: write_text(path, json.dumps(value, indent=1)))
        return read_json(path)

    def adapter(self, name: str, make) -> Path:
        """Return the folder of a trained adapter; `make(folder)` trains it, and may resume in the folder it is given.

        Training happens in `<name>.training`, which is kept until it is whole. The stage notes how the profile divides
        batches, where it does: in 16 bits that may change a weight.
        """
        noted = {name: value for name in DIVISION if (value := getattr(self.profile, name))}
        path = self.root / "adapters" / name
        scratch = path.with_name(name + ".training")

        def train():
            scratch.mkdir(parents=True, exist_ok=True)
            make(scratch)

        def keep(_):
            for checkpoint in scratch.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(scratch, path)

        self._stage(f"adapters/{name}", path, train, keep, noted)
        return path

    def _stage(self, key: str, path: Path, make, keep, noted: dict | None = None) -> None:
        """Let all processes make what is not there yet; process 0 keeps what came of it, and the others wait.

        `noted`: what its entry in stages.json says, besides the seconds and the checksum.
        """
        if distributed.agree(key in self.stages() and path.exists()):
            check_stage(self.root, path)
            return
        started = time.time()
        product = make()
        if distributed.rank() == 0:
            keep(product)
            entry = {"seconds": round(time.time() - started, 1), "sha256": checksum(path)} | (noted or {})
            write_text(self.root / "stages.json", json.dumps(self.stages() | {key: entry}, indent=1, sort_keys=True))
        distributed.wait()
        await_file(path)

    def stages(self) -> dict:
        """Return what is finished, as `finished_stages` does."""
        return finished_stages(self.root)

    def seconds(self, key: str) -> float:
        """Return the wall seconds of a finished stage, such as "adapters/sft"; 0.0 when it was not run here."""
        return self.stages().get(key, {}).get("seconds", 0.0)

    def took(self, key: str) -> str:
        """Return "in 3.2 minutes" for a finished stage, or that it came with the course and was not run here."""
        timed = "seconds" in self.stages().get(key, {})
        return f"in {self.seconds(key) / 60:.1f} minutes" if timed else "(this training comes with the course)"

    # ------------------------------------------------------------------ what earlier notebooks made
    def find(self, relative: str) -> Path:
        """Return an artefact of an earlier stage, such as "adapters/sft": this run's, or else the reference's.

        Using the reference is said on the terminal; it is the micro student's, so only runs on the synthetic data may
        do so. When neither is there, or the reference is damaged, an ArtefactError says what to do.
        """
        own = self.root / relative
        if own.exists():
            check_stage(self.root, own)
            return own
        if self.profile.data != "synthetic" or self.profile.engine != "local":
            raise ArtefactError(f"{relative} is not in {self.root}; run the notebook or command that makes it.")
        if not (REFERENCE / relative).exists():
            raise ArtefactError(f"{relative} is neither in {self.root} nor in {REFERENCE}; run the earlier notebooks.")
        shipped = find_reference(relative)
        print(f"This run has no {relative} yet: using the reference result that comes with the project.")
        return shipped


def find_reference(relative: str) -> Path:
    """Return a reference result, such as "adapters/sft"; an ArtefactError when its checksum is not the noted one."""
    path = REFERENCE / relative
    note = REFERENCE / "stages.json"
    if not matches(read_json(note, restoring(note)), stage_key(relative), path):
        raise ArtefactError(
            f"{path} is missing or damaged (its checksum is not the one in stages.json); {restoring(path)}"
        )
    return path


def check_stage(root: Path, product: Path, noted_only: bool = False) -> Path:
    """Return `product`, a file or folder of a run; an ArtefactError where the run's stages.json notes another checksum.

    `noted_only`: also where it notes others and not this one.
    """
    stages, key = finished_stages(root), stage_key(product.relative_to(root).as_posix())
    if ("sha256" in stages.get(key, {}) or noted_only and stages) and not matches(stages, key, product):
        remedy = "delete it and run its stage again" if root != REFERENCE else restoring(product)
        raise ArtefactError(f"{product} is damaged (its checksum is not the one in stages.json); {remedy}.")
    return product


def finished_stages(root: Path) -> dict[str, dict]:
    """Return what stages.json notes of a run, {"rollouts/base_ivt": {"seconds", "sha256"}, ...}; {} without a note."""
    note = root / "stages.json"
    stages = read_json(note) if note.exists() else {}
    if not isinstance(stages, dict) or not all(isinstance(stage, dict) for stage in stages.values()):
        raise ArtefactError(f"{note} is damaged, so nothing tells what is finished; restore it or begin another run.")
    return stages


def await_file(path: Path) -> None:
    """Return when this process sees what process 0 has written, which may be on another machine.

    A folder shared by NFS may show it a minute late; after LATE seconds, an ArtefactError says that it is not shared.
    """
    deadline = time.monotonic() + LATE
    while distributed.rank() > 0 and not path.exists():
        if time.monotonic() > deadline:
            raise ArtefactError(
                f"Process 0 has written {path}, and process {distributed.rank()} does not see it: the machines of a "
                "run need one folder that they share; name it with --run-dir."
            )
        time.sleep(1)


def _lines(rows) -> str:
    """Return rows as JSONL, without a space too many."""
    return "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)


def ship_reference(root: Path, adapters) -> Path:
    """Copy a finished micro run's artefacts to `data/reference/`, with their checksums, and return that folder.

    `adapters`: the names of those that are shipped. Of the other seeds and of the stages in `COUNTED` the boxes are
    shipped without the words that came with them; of a seed's short loop nothing, for it is the beginning of the long
    one.
    """
    names = ["results.json", "run.json", "figures", "tables", *(f"adapters/{name}" for name in adapters)]
    names += [f"rollouts/{path.name}" for path in sorted((root / "rollouts").glob("*.jsonl"))]
    of_seeds = [
        path.relative_to(root).as_posix()
        for kind in ("*_long", "grpo_single", "sampled_*")
        for path in sorted((root / SEEDS).glob(f"*/rollouts/{kind}.jsonl"))
    ]
    names += of_seeds
    with replace_folder(REFERENCE) as folder:
        notes = {}
        for name in names:
            source, target = root / name, folder / name
            if not source.exists():
                raise ArtefactError(f"{source} is missing: finish the run before it becomes the reference.")
            target.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".jsonl"):
                boxes_only = name in of_seeds or target.name.startswith(COUNTED)
                rows = [_without_words(row) if boxes_only else row for row in read_jsonl(source)]
                target.write_text(_lines(rows), encoding="utf-8")
            else:
                (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
            place = target.parent.parent if name in of_seeds else folder
            for part in sorted(target.glob("*")) if name in ("figures", "tables") else [target]:
                key = stage_key(part.relative_to(place).as_posix())
                notes.setdefault(place, {})[key] = {"sha256": checksum(part)}
        for place, sums in notes.items():
            write_text(place / "stages.json", json.dumps(sums, indent=1, sort_keys=True))
    return REFERENCE


def _without_words(rollout: dict) -> dict:
    steps = [{key: value for key, value in step.items() if key != "text"} for step in rollout["steps"]]
    return {key: value for key, value in rollout.items() if key != "expression"} | {"steps": steps}


def stage_key(relative: str) -> str:
    """Return the name of the stage that makes a file or folder: its path in the run, without the ending."""
    return relative.removesuffix(".jsonl").removesuffix(".json")

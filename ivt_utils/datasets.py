"""One record schema for every data set, and the shipped benchmark.

A record: {"id", "image_id", "image" (PIL RGB), "expression", "bbox" (x1, y1, x2, y2 floats 0..1000), "subset"}.
Splits share no image.
"""

import io
import json
import random
from pathlib import Path

from ivt_utils import scenes
from ivt_utils.artefacts import DATA, ArtefactError, checksum, read_json, write_text
from ivt_utils.profiles import Profile, get_profile

BENCHMARK = DATA / "benchmark"
SPLITS = ("train", "val", "test")
THINGS, QUESTIONS = (4, 8), 2  # a benchmark scene has 4..8 things and up to 2 expressions


def load_split(profile: Profile, split: str, folder: Path = BENCHMARK):
    """Return the first records of a split ("train", "val", "test") as a datasets.Dataset, as many as the profile says.

    The file's SHA-256 is checked against the manifest; a damaged or missing file raises an ArtefactError.
    """
    from datasets import Dataset
    from pyarrow import parquet

    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}; choose one of {', '.join(SPLITS)}.")
    if profile.data != "synthetic":
        raise ArtefactError(f"The profile {profile.name!r} needs the data sets from the Hub, which this version "
                            "cannot prepare yet; run with PROFILE=micro.")  # fmt: skip
    path = folder / f"{split}.parquet"
    manifest = read_json(folder / "manifest.json")
    noted = manifest.get("files", {}).get(path.name, {}) if isinstance(manifest, dict) else {}
    if not path.exists() or checksum(path) != noted.get("sha256"):
        raise ArtefactError(f"{path} is missing or damaged (checksum); restore it with: git checkout -- data/benchmark")
    rows = Dataset(parquet.read_table(path))
    return rows.select(range(min(getattr(profile, split), len(rows))))


def numbered(records) -> dict[str, int]:
    """Return the place of each id in a list of records, or in a data set of them, whose images are not read for it."""
    names = records["id"] if hasattr(records, "column_names") else [record["id"] for record in records]
    return {name: number for number, name in enumerate(names)}


def sample_split(split: str, size: int, seed: int) -> list[dict]:
    """Return `size` synthetic records of a split with JPEG bytes as image; subsets in turn, balanced to one."""
    records: list[dict] = []
    number = 0
    while len(records) < size:
        subset = scenes.SUBSETS[number % len(scenes.SUBSETS)]
        quota = size // len(scenes.SUBSETS) + (scenes.SUBSETS.index(subset) < size % len(scenes.SUBSETS))
        room = quota - sum(record["subset"] == subset for record in records)
        rng = random.Random(f"benchmark {seed} {split} {number}")
        image_id = f"{split}-{number:05d}"
        number += 1
        if room <= 0:
            continue
        scene, pairs = scenes.sample_questions(rng, subset, rng.randint(*THINGS), QUESTIONS)
        buffer = io.BytesIO()
        scenes.draw_scene(scene).save(buffer, "JPEG", quality=85)
        for k, (expression, target) in enumerate(pairs[:room]):
            records.append({
                "id": f"{image_id}-{k}", "image_id": image_id,
                "image": {"bytes": buffer.getvalue(), "path": f"{image_id}.jpg"},
                "expression": expression, "bbox": [round(v, 2) for v in scene.things[target].box], "subset": subset,
            })  # fmt: skip
    return records


def build_benchmark(folder: Path = BENCHMARK, seed: int = 0) -> Path:
    """Write the benchmark's three parquet files and their manifest; the same bytes for the same seed."""
    from datasets import Dataset, Features, Image, List, Value

    features = Features({
        "id": Value("string"), "image_id": Value("string"), "image": Image(), "expression": Value("string"),
        "bbox": List(Value("float32"), length=4), "subset": Value("string"),
    })  # fmt: skip
    profile, manifest = get_profile("micro"), {"seed": seed, "files": {}}
    for split in SPLITS:
        path = folder / f"{split}.parquet"
        folder.mkdir(parents=True, exist_ok=True)
        rows = Dataset.from_list(sample_split(split, getattr(profile, split), seed), features=features)
        rows.to_parquet(path)
        manifest["files"][path.name] = {"rows": len(rows), "sha256": checksum(path)}
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1))
    return folder

"""The shipped benchmark: synthetic scenes and expressions, in three splits that share no image."""

import io
import json
import random
from pathlib import Path

from ivt_utils.micro import scenes
from ivt_utils.profiles import get_profile
from ivt_utils.records import BENCHMARK, SPLITS, write_split
from ivt_utils.runtime.files import write_text

THINGS, QUESTIONS = (4, 8), 2  # a benchmark scene has 4..8 things and up to 2 expressions


def subset_of(number: int) -> str:
    """Return the subset of the scene of this number in a split."""
    return scenes.SUBSETS[number % len(scenes.SUBSETS)]


def scene_of(image_id: str, seed: int):
    """Return (the scene that an image of the benchmark was drawn from, [(expression, index of its referent), ...])."""
    split, _, digits = image_id.rpartition("-")
    rng = random.Random(f"benchmark {seed} {split} {int(digits)}")
    return scenes.sample_questions(rng, subset_of(int(digits)), rng.randint(*THINGS), QUESTIONS)


def sample_split(split: str, size: int, seed: int) -> list[dict]:
    """Return `size` synthetic records of a split with JPEG bytes as image; subsets in turn, balanced to one."""
    records: list[dict] = []
    number = 0
    while len(records) < size:
        subset = subset_of(number)
        quota = size // len(scenes.SUBSETS) + (scenes.SUBSETS.index(subset) < size % len(scenes.SUBSETS))
        room = quota - sum(record["subset"] == subset for record in records)
        image_id = f"{split}-{number:05d}"
        number += 1
        if room <= 0:
            continue
        scene, pairs = scene_of(image_id, seed)
        buffer = io.BytesIO()
        scenes.draw_scene(scene).save(buffer, "JPEG", quality=85)
        for k, (expression, target) in enumerate(pairs[:room]):
            records.append(
                {
                    "id": f"{image_id}-{k}",
                    "image_id": image_id,
                    "image": {"bytes": buffer.getvalue(), "path": f"{image_id}.jpg"},
                    "expression": expression,
                    "bbox": [round(v, 2) for v in scene.things[target].box],
                    "subset": subset,
                }
            )
    return records


def build_benchmark(folder: Path = BENCHMARK, seed: int = 0) -> Path:
    """Write the benchmark's three parquet files and their manifest; the same bytes for the same seed."""
    profile, files = get_profile("micro"), {}
    for split in SPLITS:
        path = folder / f"{split}.parquet"
        files[path.name] = write_split(path, sample_split(split, getattr(profile, split), seed))
    write_text(folder / "manifest.json", json.dumps({"seed": seed, "files": files}, indent=1))
    return folder

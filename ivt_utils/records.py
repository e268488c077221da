"""One record schema for every data set, and the shipped benchmark.

A record: {"id", "image_id", "image" (PIL RGB), "expression", "bbox" (x1, y1, x2, y2 floats 0..1000), "subset"}.
Splits share no image. The data of the profiles `colab` and `paper` are prepared by `hub.py` (`ivt data`).
"""

from pathlib import Path

from ivt_utils.profiles import Profile
from ivt_utils.runtime.files import DATA, ArtefactError, checksum, intact, read_json

BENCHMARK = DATA / "benchmark"
HUB = DATA / "hub"  # a folder for each profile whose data come from the Hub
SPLITS = ("train", "val", "test")


def load_split(profile: Profile, split: str, folder: Path | None = None):
    """Return the first records of a split ("train", "val", "test") as a datasets.Dataset, as many as the profile says.

    `folder` is by default the benchmark, or `data/hub/<profile>` for a profile with data from the Hub. The file's
    SHA-256 is checked against the manifest; a damaged or missing file, and data prepared for other sizes or another
    seed than the profile's, raise an ArtefactError.
    """
    from datasets import Dataset
    from pyarrow import parquet

    if split not in SPLITS:
        raise ValueError(f"There is no split {split!r}; choose one of {', '.join(SPLITS)}.")
    from_hub = profile.data == "hub"
    folder = Path(folder or (HUB / profile.name if from_hub else BENCHMARK))
    path, note = folder / f"{split}.parquet", folder / "manifest.json"
    if from_hub and not (path.exists() and note.exists()):
        raise ArtefactError(
            f"The data of the profile {profile.name!r} are not in {folder}; run: ivt data --profile {profile.name}"
        )
    if from_hub and not fits(profile, read_json(note)):
        raise ArtefactError(
            f"The data in {folder} were prepared for other sizes or another seed; "
            f"run: ivt data --profile {profile.name}"
        )
    intact(path, f"make it anew with: ivt data --profile {profile.name}" if from_hub else None)
    rows = Dataset(parquet.read_table(path))
    return first(rows, getattr(profile, split))


def first(records, count: int):
    """Return the first records, as many as `count`; all of them where there are no more."""
    return records.select(range(min(count, len(records))))


def sizes(profile: Profile) -> dict[str, int]:
    """Return {split: number of records} of a profile."""
    return {split: getattr(profile, split) for split in SPLITS}


def fits(profile: Profile, manifest) -> bool:
    """Return whether a manifest of prepared data names the sizes and the data seed of a profile."""
    wanted = {"sizes": sizes(profile), "data_seed": profile.data_seed}
    return isinstance(manifest, dict) and all(manifest.get(key) == value for key, value in wanted.items())


def numbered(records) -> dict[str, int]:
    """Return the place of each id in a list of records, or in a data set of them, whose images are not read for it."""
    names = records["id"] if hasattr(records, "column_names") else [record["id"] for record in records]
    return {name: number for number, name in enumerate(names)}


def lazy_dataset(rows: list[dict], make):
    """Return a datasets.Dataset of `rows`; what is read of it is `make(row)`, a dict, so that no image is kept."""
    from datasets import Dataset

    def read(batch):
        values_read = [make(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
        return {key: [row[key] for row in values_read] for key in values_read[0]}

    return Dataset.from_list(rows).with_transform(read)


def write_split(path: Path, records) -> dict:
    """Return {"rows", "sha256"} of the parquet file that is written from any iterable of records.

    A record's image is {"bytes" (JPEG), "path"}. The records are never all held in memory.
    """
    from datasets import Dataset, Features, Image, List, Value
    from datasets.arrow_writer import ArrowWriter

    features = Features(
        {
            "id": Value("string"),
            "image_id": Value("string"),
            "image": Image(),
            "expression": Value("string"),
            "bbox": List(Value("float32"), length=4),
            "subset": Value("string"),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    arrow = path.with_suffix(".arrow.tmp")
    try:
        with ArrowWriter(path=str(arrow), features=features) as writer:
            for record in records:
                writer.write(record)
            writer.finalize()
        rows = Dataset.from_file(str(arrow))
        rows.to_parquet(path)
        return {"rows": len(rows), "sha256": checksum(path)}
    finally:
        arrow.unlink(missing_ok=True)

"""The data of the profiles `colab` and `paper`: three sets of the Hub, brought to one schema and split by image.

An adapter is a `Source`: what a set calls its columns, and which convention its boxes follow. None of the sets could
be downloaded where this was written, so `data/hub_revisions.json` says what is known of each, and from where. A set
that is not as described here stops the preparation with a sentence. Not known is what the paper drew from each set:
equal thirds, drawn by `profile.data_seed`, are our choice.
"""

import io
import json
import math
import re
import shutil
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image, ImageOps

from ivt_utils import records
from ivt_utils.boxes import SCALE
from ivt_utils.overlay import ImageError, load_image
from ivt_utils.paper_scale.download import DOWNLOADS, sources
from ivt_utils.paper_scale.download import fetch as fetch_from_hub
from ivt_utils.paper_scale.split import choose
from ivt_utils.profiles import Profile
from ivt_utils.runtime.files import ArtefactError, checksum, read_json, replace_folder, write_text

OVERHANG = 1.0  # pixels that a box may leave its image by: rounding in the annotations
SLIPS = 0.01  # the share of a set's rows that may be wrong, and are left out and counted; more: another convention
COCO = re.compile(r"(?<![0-9a-f])(\d{12})(?![0-9a-f])")  # COCO_train2014_000000546154_298801.jpg, 000000547144.jpg
REMEDY = "note another revision of it in data/hub_revisions.json, and run again"


class Slip(ArtefactError):
    """What is wrong with one row, as a sentence; `kind` is what it is counted as, such as "without an expression"."""

    def __init__(self, where: str, kind: str, wrong: str):
        super().__init__(f"{where}: {wrong}; {REMEDY}.")
        self.kind = kind


@dataclass(frozen=True)
class Source:
    """How one set of the Hub is read; all boxes are absolute pixels."""

    subset: str
    repo: str
    tables: tuple  # names or patterns of the parquet files, one for each split
    expression: str  # the column; a list of expressions of one box counts as its first that is not blank
    box: str  # the column
    convention: str  # of the boxes: "xywh" or "xyxy"
    sized: bool = False  # whether there are columns `width` and `height`
    archive: str | None = None  # a tar of the images, by `file_name`; None: the column `image` holds them

    @property
    def columns(self) -> list[str]:
        return [self.expression, self.box, "file_name"] + ["width", "height"] * self.sized


SOURCES = (
    Source("refcocog", "lmms-lab/RefCOCOg", ("data/val-*.parquet", "data/test-*.parquet"), "answer", "bbox", "xywh"),
    Source("ref_adv_s", "dddraxxx/ref-adv-s", ("*.parquet",), "normal_caption", "solution", "xyxy", sized=True),
    Source(
        "ref_l4",
        "JierunChen/Ref-L4",
        ("ref-l4-val.parquet", "ref-l4-test.parquet"),
        "caption",
        "bbox",
        "xywh",
        sized=True,
        archive="images.tar.gz",
    ),
)


# ---------------------------------------------------------------------------------------------- preparation
def announce(profile: Profile, folder: Path | None = None) -> str:
    """Return what `prepare` is about to do: the sets with their sizes and licences, and where the data will lie."""
    noted = {source.repo: sources()[source.repo] for source in SOURCES}
    counts = ", ".join(f"{count:,} {split}" for split, count in records.sizes(profile).items())
    return "\n".join(
        [
            f"The profile {profile.name} draws its records ({counts}) from three sets of the Hub:",
            *(f"- {repo}: {entry['bytes'] / 1e9:.2f} GB; {entry['license']}" for repo, entry in noted.items()),
            f"To download: {sum(entry['bytes'] for entry in noted.values()) / 1e9:.1f} GB, to {DOWNLOADS}, "
            "which may be deleted afterwards.",
            f"The prepared data: {folder or records.HUB / profile.name}.",
        ]
    )


def prepare(profile: Profile, folder: Path | None = None, fetch=None) -> Path:
    """Return the folder of the profile's prepared data: three parquet files and their manifest, made when needed.

    `fetch(repo, patterns, revision)` returns (commit hash, files), as `download.fetch` does. Says what it will do
    before it starts. Data that already fit the profile are kept. Raises an ArtefactError for a profile with data of
    its own, for a set that is not as expected, and when the counts cannot be reached; nothing half-made is left.
    """
    if profile.data != "hub":
        raise ArtefactError(f"The profile {profile.name!r} comes with its data; there is nothing to prepare.")
    folder = Path(folder or records.HUB / profile.name)
    if is_prepared(profile, folder):
        print(f"The data of the profile {profile.name} are prepared already: {folder}")
        return folder
    print(announce(profile, folder), flush=True)
    noted, rows, used, slips = sources(), [], [], {}
    for source in SOURCES:
        patterns = source.tables + ((source.archive,) if source.archive else ())
        revision = noted[source.repo]["revision"] or earlier_revision(source.repo)
        commit, files = (fetch or fetch_from_hub)(source.repo, patterns, revision)
        found, slips[source] = read_rows(source, files)
        rows += found
        listed = [{key: file[key] for key in ("name", "size", "sha256")} for file in files]
        used.append(
            {
                "repo": source.repo,
                "revision": commit,
                "license": noted[source.repo]["license"],
                "left_out": slips[source],
                "files": listed,
            }
        )
    manifest = {"data_seed": profile.data_seed, "sizes": records.sizes(profile), "files": {}, "sources": used}
    with replace_folder(folder) as fresh:
        pictures, unusable = fresh / "pictures", {"none yet"}
        while unusable:  # a few rows may turn out to have no usable image: then it is drawn again without them
            shutil.rmtree(pictures, ignore_errors=True)
            pictures.mkdir()
            rows = [row for row in rows if row["id"] not in unusable]
            chosen = choose(rows, records.sizes(profile), profile.data_seed)
            drawn, unusable = [row for part in chosen.values() for row in part], set()
            for source in SOURCES:
                found = read_pictures(source, [row for row in drawn if row["source"] == source], pictures)
                slips[source].update(found.values())
                unusable |= found.keys()
        for split, part in chosen.items():
            path = fresh / f"{split}.parquet"
            manifest["files"][path.name] = records.write_split(path, map(record, part))
        shutil.rmtree(pictures)
        write_text(fresh / "manifest.json", json.dumps(manifest, indent=1))
    for source, kinds in slips.items():
        if kinds:
            told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
            print(f"Rows of {source.repo} that were left out: {told}.")
    return folder


def earlier_revision(repo: str) -> str | None:
    """Return the commit of a set that data prepared here before came from, so that profiles agree; None without any."""
    for note in sorted(records.HUB.glob("*/manifest.json")):
        for used in read_json(note).get("sources", []):
            if used["repo"] == repo and "dry-run" not in note.parent.name:
                return used["revision"]
    return None


def is_prepared(profile: Profile, folder: Path) -> bool:
    """Return whether a folder holds whole data of the profile's sizes and seed."""
    if not (folder / "manifest.json").exists():
        return False
    manifest = read_json(folder / "manifest.json")
    if not records.fits(profile, manifest):
        return False
    pinned = {repo: entry["revision"] for repo, entry in sources().items() if entry["revision"]}
    came = {used["repo"]: used["revision"] for used in manifest.get("sources", [])}
    if any(came.get(source.repo) != pinned.get(source.repo, came.get(source.repo)) for source in SOURCES):
        return False
    paths = [folder / f"{split}.parquet" for split in records.SPLITS]
    noted = manifest.get("files", {})
    return all(path.exists() and checksum(path) == noted.get(path.name, {}).get("sha256") for path in paths)


def record(row: dict) -> dict:
    """Return the record of a chosen row whose picture has been read."""
    return {
        "id": row["id"],
        "image_id": row["image_id"],
        "expression": row["expression"],
        "bbox": row["bbox"],
        "image": {"bytes": row["picture"].read_bytes(), "path": f"{row['image_id']}.jpg"},
        "subset": row["source"].subset,
    }


# ---------------------------------------------------------------------------------------------- annotations
def read_rows(source: Source, files: list[dict]) -> tuple[list[dict], Counter]:
    """Return (rows, how many were left out by the kind of their slip) of one set, without the images.

    A row: {"source", "id", "image_id", "expression", "box" (four pixels, as in the file), "size" ((width, height)
    in pixels, or None), "name" (of the image file), "path" and "number" (the parquet file, and the row in it)}.
    Raises the first slip of the most frequent kind when more than SLIPS of the set's rows have one.
    """
    rows, wrong = [], []
    for file in files:
        if not file["name"].endswith(".parquet"):
            continue
        part = PurePosixPath(file["name"]).name.removesuffix(".parquet")
        for number, values in enumerate(read_columns(source, file, source.columns)):
            where = f"{source.repo}, row {number} of {file['name']}"
            try:
                text, name, size = read_words(source, values, where)
                to_xyxy(source, values[source.box], size, where)
            except Slip as slip:
                wrong.append(slip)
                continue
            rows.append(
                {
                    "source": source,
                    "id": f"{source.subset}-{part}-{number}",
                    "image_id": image_id(name),
                    "expression": text,
                    "box": values[source.box],
                    "size": size,
                    "where": where,
                    "name": PurePosixPath(name).name,
                    "path": file["path"],
                    "number": number,
                }
            )
    kinds = Counter(slip.kind for slip in wrong)
    if len(wrong) > SLIPS * (len(rows) + len(wrong)):
        (worst, _), *_ = kinds.most_common(1)
        raise next(slip for slip in wrong if slip.kind == worst)
    return rows, kinds


def read_words(source: Source, values: dict, where: str) -> tuple[str, str, tuple[int, int] | None]:
    """Return (expression, file name, size in pixels or None) of a row; a Slip where one of them is not there."""
    texts, name = values[source.expression], values["file_name"]
    texts = texts if isinstance(texts, list) else [texts]
    text = next((" ".join(text.split()) for text in texts if isinstance(text, str) and text.strip()), None)
    if not text:
        raise Slip(where, "without an expression", f"{source.expression} holds no text")
    if not isinstance(name, str):
        raise Slip(where, "without a file name", "file_name holds no text")
    if not source.sized:
        return text, name, None
    width, height = values["width"], values["height"]
    if not all(isinstance(side, int | float) and side > 0 and side % 1 == 0 for side in (width, height)):
        raise Slip(where, "without a size", f"width and height are {width} and {height}, no size")
    return text, name, (int(width), int(height))


def read_columns(source: Source, file: dict, columns: list[str], groups: list[int] | None = None):
    """Yield the rows of a parquet file as {column: value}, a few at a time in memory; `groups`: of these row groups."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file["path"]) as table:
            missing = [column for column in columns if column not in table.schema_arrow.names]
            if missing:
                raise ArtefactError(
                    f"{source.repo} has no column {' and '.join(missing)} in {file['name']}, only "
                    f"{', '.join(table.schema_arrow.names)}; {REMEDY}."
                )
            for batch in table.iter_batches(batch_size=64, columns=columns, row_groups=groups):
                yield from batch.to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise ArtefactError(f"{file['path']} is not a whole parquet file; delete it and run again.") from None


def image_id(name: str) -> str:
    """Return the name by which all three sets know an image: its COCO id where it has one, else its file name."""
    stem = PurePosixPath(name).name.rpartition(".")[0] or name
    found = COCO.search(stem)
    return f"coco-{found[1]}" if found else stem


def to_xyxy(source: Source, box, size: tuple | None, where: str) -> tuple[float, float, float, float]:
    """Return a set's box as (x1, y1, x2, y2) in pixels; `size` is (width, height), or None when it is not known yet.

    Raises a Slip for what is not four numbers, for numbers of 0..1, which are no pixels, and for a box that, by the
    set's convention, is empty, reversed or leaves the image: the sign of the other convention.
    """
    numbers = isinstance(box, list) and all(isinstance(v, int | float) and math.isfinite(v) for v in box)
    if not (numbers and len(box) == 4):
        raise Slip(where, "with a box that is not four numbers", f"{source.box} is {box}, not four numbers")
    if 0 < max(box) <= 1:
        raise Slip(
            where,
            "with a box of 0..1",
            f"{source.box} {box} lies within 0..1, as a share of the image's sides does, and the boxes of "
            f"{source.repo} are expected in pixels",
        )
    x1, y1, x2, y2 = box
    if source.convention == "xywh":
        x2, y2 = x1 + x2, y1 + y2
    width, height = size or (math.inf, math.inf)
    inside = min(x1, y1) >= -OVERHANG and x2 <= width + OVERHANG and y2 <= height + OVERHANG
    if not (inside and x1 < x2 and y1 < y2):
        within = f" within {width} x {height} pixels" if size else ""
        raise Slip(
            where,
            "with a box that is empty or leaves its image",
            f"{source.box} {box} is not a box{within} by the convention {source.convention} that is expected of this "
            "set",
        )
    return x1, y1, x2, y2


# ---------------------------------------------------------------------------------------------- images
def read_pictures(source: Source, rows: list[dict], folder: Path) -> dict[str, str]:
    """Write the images of the chosen rows of one set to `folder`, and set each row's "picture" (path) and "bbox".

    Returns {id: kind of slip} of the rows that are of no use: one, or SLIPS of all where that is more. A further one
    is raised.
    """
    from tqdm.auto import tqdm

    found = tar_pictures(source, rows) if source.archive else table_pictures(source, rows)
    written: dict[str, tuple] = {}
    unusable: dict[str, str] = {}
    for row, content in tqdm(found, total=len(rows), desc=f"images of {source.subset}", unit="row"):
        try:
            if row["name"] not in written:
                if not content:
                    raise Slip(row["where"], "without an image of use", "there is no image")
                content, size = to_jpeg(content, row["size"], row["where"])
                written[row["name"]] = folder / f"{source.subset}-{len(written)}.jpg", size
                written[row["name"]][0].write_bytes(content)
            row["picture"], size = written[row["name"]]
            if row["size"] and tuple(row["size"]) != size:
                seen, said = (f"{width} x {height}" for width, height in (size, row["size"]))
                raise Slip(
                    row["where"],
                    "of another size than their image",
                    f"the image is {seen} pixels, not {said} as it says",
                )
            x1, y1, x2, y2 = to_xyxy(source, row["box"], size, row["where"])
        except Slip as slip:
            unusable[row["id"]] = slip.kind
            if len(unusable) > max(1, SLIPS * len(rows)):
                raise
            print(f"Left out: {slip}")
            continue
        scaled = (x1 / size[0], y1 / size[1], x2 / size[0], y2 / size[1])
        row["bbox"] = [round(min(SCALE, max(0.0, SCALE * v)), 2) for v in scaled]
    return unusable


def table_pictures(source: Source, rows: list[dict]):
    """Yield (row, image bytes) from the parquet files, reading the row groups that hold a chosen row and no other."""
    from pyarrow import parquet

    for path in sorted({row["path"] for row in rows}):
        wanted = {row["number"]: row for row in rows if row["path"] == path}
        with parquet.ParquetFile(path) as table:
            counts = [table.metadata.row_group(k).num_rows for k in range(table.num_row_groups)]
        first = 0
        for group, count in enumerate(counts):
            if any(first <= number < first + count for number in wanted):
                file = {"path": path, "name": path.name}
                for number, values in enumerate(read_columns(source, file, ["image"], [group]), first):
                    if number in wanted:
                        yield wanted[number], (values["image"] or {}).get("bytes")
            first += count


def tar_pictures(source: Source, rows: list[dict]):
    """Yield (row, image bytes) from the set's tar, which is read as a stream: only the chosen members are unpacked."""
    wanted: dict[str, list] = {}
    for row in rows:
        wanted.setdefault(row["name"], []).append(row)
    archive = rows[0]["path"].parent / source.archive if rows else None
    try:
        with tarfile.open(archive, mode="r|*") as tar:
            for member in tar:
                found = wanted.pop(PurePosixPath(member.name).name, []) if member.isfile() else []
                file = tar.extractfile(member) if found else None
                if file:
                    content = file.read()
                    yield from ((row, content) for row in found)
                if not wanted:
                    break
    except (tarfile.TarError, EOFError):
        raise ArtefactError(f"{archive} is not a whole tar file; delete it and run again.") from None
    if wanted:
        name, (row, *_) = next(iter(wanted.items()))
        raise ArtefactError(f"{row['where']}: {source.archive} has no image {name}; {REMEDY}.")


def to_jpeg(content: bytes, size: tuple | None, where: str) -> tuple[bytes, tuple[int, int]]:
    """Return (JPEG bytes, (width, height)) of an image: the bytes as they come when they are an RGB JPEG.

    An image that says it is to be shown turned (EXIF) is turned only when `size`, the pixels that the boxes refer to,
    says so, and then says so no more. Raises a Slip for an image that is truncated or of no known kind.
    """
    try:
        image = load_image(content)
        raw = Image.open(io.BytesIO(content))
    except ImageError as error:
        reason = str(error)[0].lower() + str(error)[1:].rstrip(".")
        raise Slip(where, "without an image of use", reason) from None
    turned = raw.getexif().get(0x0112, 1) != 1
    if raw.format == "JPEG" and raw.mode == "RGB" and not turned:
        return content, image.size
    if turned and size and image.size != tuple(size):
        image = load_image(ImageOps.exif_transpose(raw))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue(), image.size

"""Small files with the schemas of the Hub's three sets, drawn from our synthetic scenes.

The tests and the dry run of the profile `paper` prepare their data from these, without a network. Columns, types and
conventions are those of the real sets (`hub.py` says from where they are known); the expressions are within the micro
student's vocabulary. Images are landscape and portrait, so that a box scaled by the wrong side shows.
"""

import io
import random
import shutil
import tarfile
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from ivt_utils import records
from ivt_utils.boxes import to_pixels
from ivt_utils.micro import scenes
from ivt_utils.paper_scale import hub
from ivt_utils.runtime.files import checksum

SHARED = 8  # images that each two of the three sets have in common
SHAPES = ((640, 480), (480, 640))  # pixels
FILES = {
    "lmms-lab/RefCOCOg": ("data/val-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
    "dddraxxx/ref-adv-s": ("data/train-00000-of-00001.parquet",),
    "JierunChen/Ref-L4": ("ref-l4-val.parquet", "ref-l4-test.parquet", "images.tar.gz"),
}


def prepare_fixture(profile) -> Path:
    """Return the folder of a dry run's data, prepared from small made-up sets as `ivt data` prepares the real ones."""
    print(
        f"{profile.name}: samples made up in the schemas of the Hub's sets, the micro student, and the settings of "
        f"{profile.name.partition('-')[0]}. Its numbers mean nothing."
    )
    shutil.rmtree(records.HUB / profile.name, ignore_errors=True)  # made anew by the present code
    with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):  # it would speak of the real sizes
        return hub.prepare(profile, fetch=write_hub(Path(folder), 3 * SHARED))


def write_hub(folder: Path, rows: int, seed: int = 0):
    """Return a `fetch` for `hub.prepare` after writing three sets of about `rows` rows each to `folder`/<repo>/.

    Every third image has two rows in a set. `rows` must be 24 or more for the shared images to have room.
    """
    folder = Path(folder)
    if rows < 3 * SHARED:
        raise ValueError(f"A set needs at least {3 * SHARED} rows to share images with both others, not {rows}.")
    rng = random.Random(f"hub fixture {seed}")
    images = rows * 3 // 4
    shared = [[sample_picture(rng, "coco") for _ in range(SHARED)] for _ in range(3)]
    own = [[sample_picture(rng, kind) for _ in range(images - 2 * SHARED)] for kind in ("coco", "open", "objects")]
    write_refcocog(folder / "lmms-lab/RefCOCOg", shared[0] + shared[1] + own[0])
    write_ref_adv_s(folder / "dddraxxx/ref-adv-s", shared[0] + shared[2] + own[1])
    write_ref_l4(folder / "JierunChen/Ref-L4", shared[1] + shared[2] + own[2])

    def fetch(repo: str, patterns: tuple, revision: str | None) -> tuple[str, list[dict]]:
        paths = [(name, folder / repo / name) for name in FILES[repo]]
        return revision or f"{seed:040x}", [
            {"name": name, "path": path, "size": path.stat().st_size, "sha256": checksum(path)} for name, path in paths
        ]

    return fetch


def sample_picture(rng: random.Random, kind: str) -> dict:
    """Return {"number", "kind", "size", "jpeg", "pairs": [(expression, pixel box), ...]} of a random scene.

    `kind`: "coco", "open" (OpenImages) or "objects" (Objects365), which name their files in different ways.
    """
    scene, pairs = scenes.sample_questions(rng, rng.choice(scenes.SUBSETS), rng.randint(4, 6), 4)
    size, buffer = rng.choice(SHAPES), io.BytesIO()
    scenes.draw_scene(scene).resize(size, Image.Resampling.BILINEAR).save(buffer, "JPEG", quality=85)
    boxes = [(text, to_pixels(scene.things[target].box, *size)) for text, target in pairs]
    return {"number": rng.randrange(10**6), "kind": kind, "size": size, "jpeg": buffer.getvalue(), "pairs": boxes}


def file_name(picture: dict, style: str = "") -> str:
    """Return the name that a set gives to a picture's file; `style` is what stands before a COCO number."""
    names = {
        "coco": f"{style}{picture['number']:012d}.jpg",
        "open": f"{picture['number']:015x}f.jpg",
        "objects": f"objects365_v2_{picture['number']:08d}.jpg",
    }
    return names[picture["kind"]]


def questions(pictures: list[dict], first: int):
    """Yield (number, picture, expression, (x1, y1, x2, y2) pixels): one for each picture, two for every third.

    `first` differs between the sets, so that they ask differently about a picture that they share.
    """
    number = 0
    for place, picture in enumerate(pictures):
        for k in range(2 if place % 3 == 0 and len(picture["pairs"]) > 1 else 1):
            text, box = picture["pairs"][(first + k) % len(picture["pairs"])]
            yield number, picture, text, box
            number += 1


def write_refcocog(folder: Path, pictures: list[dict]) -> None:
    """Write the files of RefCOCOg: splits val and test, boxes xywh, expressions in a list, images in the table."""
    from datasets import Features, Image, List, Value

    features = Features(
        {
            "question_id": Value("string"),
            "image": Image(),
            "question": Value("string"),
            "answer": List(Value("string")),
            "segmentation": List(Value("float32")),
            "bbox": List(Value("float32")),
            "iscrowd": Value("int8"),
            "file_name": Value("string"),
        }
    )
    rows = []
    for number, picture, text, (x1, y1, x2, y2) in questions(pictures, 0):
        name = file_name(picture, "COCO_train2014_").replace(".jpg", f"_{number}.jpg")
        rows.append(
            {
                "question_id": str(number),
                "image": {"bytes": picture["jpeg"], "path": name},
                "question": "Please describe the marked region.",
                "answer": [text, text],
                "segmentation": [x1, y1, x2, y1, x2, y2, x1, y2],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "iscrowd": 0,
                "file_name": name,
            }
        )
    write_table(folder / FILES["lmms-lab/RefCOCOg"][0], rows[::2], features)
    write_table(folder / FILES["lmms-lab/RefCOCOg"][1], rows[1::2], features)


def write_ref_adv_s(folder: Path, pictures: list[dict]) -> None:
    """Write the file of Ref-Adv-s: one split train, boxes xyxy, images of COCO and OpenImages in the table."""
    from datasets import Features, Image, List, Value

    features = Features(
        {
            "row_idx": Value("int64"),
            "image": Image(),
            "file_name": Value("string"),
            "normal_caption": Value("string"),
            "solution": List(Value("float64")),
            "width": Value("int64"),
            "height": Value("int64"),
            "distractors": Value("int64"),
            "image_source": Value("string"),
            "human_authored": Value("bool"),
            "use_negation": Value("bool"),
        }
    )
    rows = [
        {
            "row_idx": number,
            "image": {"bytes": picture["jpeg"], "path": file_name(picture)},
            "file_name": file_name(picture),
            "normal_caption": text,
            "solution": list(box),
            "width": picture["size"][0],
            "height": picture["size"][1],
            "distractors": 3,
            "human_authored": False,
            "use_negation": " not " in text,
            "image_source": "coco_val2017" if picture["kind"] == "coco" else "openimages",
        }
        for number, picture, text, box in questions(pictures, 1)
    ]
    write_table(folder / FILES["dddraxxx/ref-adv-s"][0], rows, features)


def write_ref_l4(folder: Path, pictures: list[dict]) -> None:
    """Write the files of Ref-L4: splits val and test, boxes xywh, and a tar with the images and some others."""
    from datasets import Features, List, Value

    features = Features(
        {
            "id": Value("int64"),
            "caption": Value("string"),
            "bbox": List(Value("float64")),
            "bbox_area": Value("float64"),
            "bbox_id": Value("string"),
            "ori_category_id": Value("string"),
            "image_id": Value("string"),
            "height": Value("int64"),
            "width": Value("int64"),
            "file_name": Value("string"),
            "is_rewrite": Value("bool"),
            "split": Value("string"),
        }
    )
    parts: dict[str, list] = {"val": [], "test": []}
    for number, picture, text, (x1, y1, x2, y2) in questions(pictures, 2):
        split, origin = ("val", "test")[number % 2], "coco" if picture["kind"] == "coco" else "o365"
        parts[split].append(
            {
                "id": number,
                "caption": text,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "bbox_area": (x2 - x1) * (y2 - y1),
                "bbox_id": f"{origin}_{number}",
                "ori_category_id": f"{origin}_1",
                "image_id": f"{origin}_{picture['number']}",
                "height": picture["size"][1],
                "width": picture["size"][0],
                "file_name": file_name(picture, "COCO_train2014_"),
                "is_rewrite": False,
                "split": split,
            }
        )
    for split, rows in parts.items():
        write_table(folder / f"ref-l4-{split}.parquet", rows, features)
    with tarfile.open(folder / "images.tar.gz", "w:gz", compresslevel=1) as tar:
        for picture in pictures:
            for name in (file_name(picture, "COCO_train2014_"), f"unused_{picture['number']}.jpg"):
                member = tarfile.TarInfo(name)
                member.size = len(picture["jpeg"])
                tar.addfile(member, io.BytesIO(picture["jpeg"]))


def write_table(path: Path, rows: list[dict], features) -> None:
    """Write rows to a parquet file as the Hub's sets are written."""
    from datasets import Dataset

    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=features).to_parquet(path)

"""What a web page needs to talk to the students without a server (`ivt build live`): one folder of files.

The words of the loop and the tokens are written from their own sources, so that a page holds no second copy of them.
Which pictures it shows: scenes of the validation split, lossless, for browsers decode JPEG differently.
"""

import base64
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from ivt_utils import metrics, protocol
from ivt_utils.closer import SHIPPED
from ivt_utils.grpo import image_tokens
from ivt_utils.micro import scenes
from ivt_utils.micro.benchmark import scene_of
from ivt_utils.overlay import load_image
from ivt_utils.profiles import STUDENT_RECIPE, get_profile
from ivt_utils.records import BENCHMARK, load_split
from ivt_utils.runtime.files import DATA, ROOT, ArtefactError, checksum, read_json, replace_folder, write_text
from ivt_utils.runtime.store import find_reference, installed
from ivt_utils.student import Student, load_student

LIVE = ROOT / "build" / "live"
CLOSER = "closer"  # the student whose later questions are about a closer look
STUDENTS = {  # by the name of its network: its name on the page, and its adapter; the base student has none
    "base": ("base", None),
    "sft": ("SFT", "sft"),
    "grpo": ("SFT + GRPO", "grpo"),
    CLOSER: ("closer look", SHIPPED),
}
SCENES = 24
EYES, WORDS = "eyes.onnx", "live.json"
# What computes the networks in a browser: one release from npm, by its checksum there, and the files of it that a page
# without WebGPU needs.
RUNTIME = "onnxruntime-web@1.30.0"
RUNTIME_SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
RUNTIME_FILES = ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def build_live(folder: Path = LIVE) -> Path:
    """Return the folder after writing into it what the page "Try it" loads: networks, words, scenes and the runtime.

    A folder that `is_current` stays as it is. An ArtefactError where packages of the book or npm are missing.
    """
    if is_current(folder):
        return folder
    print("Writing four students for a browser: half a minute, and npm fetches what computes them there.")
    if missing := [name for name in ("onnx", "onnxscript") if not installed(name)]:
        verb = "are" if len(missing) > 1 else "is"
        raise ArtefactError(f"{' and '.join(missing)} {verb} missing: pip install -e '.[book]'")
    from ivt_utils.course.live_networks import write_eyes, write_readers

    profile = get_profile("micro")
    shown = validation_scenes(profile)
    image = load_image(base64.b64decode(shown[0]["image"].partition(",")[2]))
    students = {name: load_live(name) for name in STUDENTS}
    base, *_ = students.values()
    with replace_folder(folder) as made:
        fetch_runtime(made, folder)
        write_eyes(base, *image.size, made / EYES)  # one pair for all: no training has changed them
        write_readers({made / f"{name}.onnx": student for name, student in students.items()}, *image.size)
        known = words(base, profile, image) | {"drawing": drawing(), "scenes": shown, "made_of": made_of()}
        known["bytes"] = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
        known["checksums"] = {path.name: checksum(path) for path in sorted(made.iterdir())}
        write_text(made / WORDS, json.dumps(known))
    return folder


def load_live(name: str) -> Student:
    """Return a student of the page, by its name in STUDENTS."""
    _, adapter = STUDENTS[name]
    return load_student(get_profile("micro"), adapter and find_reference(f"adapters/{adapter}"))


def made_of() -> str:
    """Return a checksum of all that the networks and the words are made of: weights, benchmark and code."""
    weights = [
        DATA / "student",
        *(find_reference(f"adapters/{adapter}") for _, adapter in STUDENTS.values() if adapter),
    ]
    code = sorted(path for path in (ROOT / "ivt_utils").rglob("*") if path.suffix in (".py", ".jinja"))
    parts = [checksum(path) for path in (*weights, BENCHMARK / "manifest.json", *code)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def is_current(folder: Path = LIVE) -> bool:
    """Return whether the folder is whole and undamaged, and was made of today's weights, benchmark and code."""
    try:
        names = {EYES, *RUNTIME_FILES, *(f"{name}.onnx" for name in STUDENTS)}
        return noted(folder).get("made_of") == made_of() and names <= intact(folder)
    except ArtefactError:  # what it is made of is missing or damaged
        return False


def noted(folder: Path) -> dict:
    """Return the words that a folder of the page holds; {} where they are missing or damaged."""
    try:
        known = read_json(folder / WORDS)
    except ArtefactError:
        return {}
    return known if isinstance(known, dict) else {}


def intact(folder: Path) -> set[str]:
    """Return the names of the folder's files whose checksum is the one that its words note."""
    sums = noted(folder).get("checksums", {})
    return {name for name, wanted in sums.items() if (folder / name).is_file() and checksum(folder / name) == wanted}


def words(student: Student, profile, image) -> dict:
    """Return what a page must know to speak with the student about images of this size.

    The tokenizer: "tokens" (the vocabulary in order), "whole" (what is cut out of a text first), "pattern" (what the
    rest is cut by), "silent" (the ids that no answer's text shows), "unknown" and "end" (one id each). The text of a
    chat: for every turn "open", what is said, "ask", the answer, "done". What is said: "prompt" around the expression,
    then "feedback", or "no_box" where the last answer had no box.
    """
    tokenizer, text = student.processor.tokenizer, student.model.config.text_config
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    chat = [protocol.follow_up(True, "SAID"), protocol.answer("ANSWERED"), protocol.follow_up(True, "SAID")]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    begin, rest = rendered.split("SAID", 1)
    ask, after = rest.split("ANSWERED")
    token = student.processor.image_token
    return {
        "width": image.width,
        "height": image.height,
        "grid": profile.grid,
        "turns": profile.long_turns,
        "max_new_tokens": profile.max_new_tokens,
        "temperature": profile.temperature,
        "generations": profile.generations,
        "format_bonus": profile.format_bonus,
        "tokens": tokenizer.convert_ids_to_tokens(range(len(tokenizer))),
        "whole": [token["content"] for token in backend["added_tokens"]],
        "pattern": backend["pre_tokenizer"]["pattern"]["Regex"],
        "silent": [token["id"] for token in backend["added_tokens"] if token["special"]],
        "unknown": tokenizer.unk_token_id,
        "end": tokenizer.eos_token_id,
        "open": begin.replace(token, token * image_tokens(student, image)),
        "ask": ask,
        "done": after.removesuffix(f"{begin}SAID{ask}"),
        "prompt": protocol.PROMPT,
        "feedback": protocol.FEEDBACK,
        "no_box": protocol.FEEDBACK_NO_BOX,
        "past": [text.num_hidden_layers, 2, text.num_key_value_heads, 0, text.head_dim],
        "features": text.hidden_size,
        "students": {name: label for name, (label, _) in STUDENTS.items()},
        "closer": CLOSER,
        "right": metrics.RIGHT,
        "runtime": RUNTIME_FILES,
        "runtime_from": RUNTIME,
        "zoom": profile.zoom,
        "least_view": profile.least_view,
    }


def drawing() -> dict:
    """Return what a page must know to draw a scene and to say what is meant in it (`micro.scenes`).

    "sides": the side of a small, a medium and a large thing, 0..1000.
    """
    return {
        "colors": scenes.COLORS,
        "shapes": scenes.SHAPES,
        "sides": {size: round(sum(bounds) / 2) for size, bounds in scenes.SIDES.items()},
        "outlines": scenes.OUTLINES,
        "edge": scenes.EDGE,
        "edge_shade": scenes.EDGE_SHADE,
        "relations": scenes.RELATIONS,
        "superlatives": scenes.SUPERLATIVES,
        "halves": scenes.HALVES,
        "strict": scenes.STRICT,
        "lenient": scenes.LENIENT,
        "most_covered": scenes.MOST_COVERED,
        "things": STUDENT_RECIPE.things,
    }


def validation_scenes(profile, count: int = SCENES) -> list[dict]:
    """Return the first scenes of the validation split: {"image" (PNG as a data URI), "questions", "things", ...}.

    "questions": [{"id", "expression", "truth" (four numbers 0..1000)}], all that the split asks about this scene. The
    other keys are those of `micro.scenes.Scene`, with each thing as a dict.
    """
    seed = read_json(BENCHMARK / "manifest.json")["seed"]
    shown: dict[str, dict] = {}
    for record in load_split(profile, "val"):
        if record["image_id"] not in shown:
            if len(shown) == count:
                continue
            scene, _ = scene_of(record["image_id"], seed)
            shown[record["image_id"]] = {"image": as_png(record["image"]), "questions": [], **asdict(scene)}
        truth = [round(float(v), 2) for v in record["bbox"]]
        question = {"id": record["id"], "expression": record["expression"], "truth": truth}
        shown[record["image_id"]]["questions"].append(question)
    return [*shown.values()]


def as_png(source) -> str:
    """Return an image as the address (a data URI) of a PNG."""
    content = io.BytesIO()
    load_image(source).save(content, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def fetch_runtime(folder: Path, before: Path) -> None:
    """Write the files of the browser's runtime: those of an earlier folder, or those of the package that npm fetches.

    An ArtefactError where there is no npm, it gets nothing, or the package is not the one whose checksum is noted.
    """
    if noted(before).get("runtime_from") == RUNTIME and set(RUNTIME_FILES) <= intact(before):
        for name in RUNTIME_FILES:
            shutil.copyfile(before / name, folder / name)
        return
    with TemporaryDirectory() as place:
        try:
            options = [
                "--prefer-offline",
                "--fetch-retries=1",
                "--fetch-retry-mintimeout=1000",
                "--pack-destination",
                place,
            ]
            command = [shutil.which("npm") or "npm", "pack", RUNTIME, *options]
            subprocess.run(command, check=True, capture_output=True, text=True, cwd=place)
        except (OSError, subprocess.CalledProcessError) as error:
            said, *_ = (getattr(error, "stderr", "") or str(error)).strip().splitlines()  # the last one names a log
            raise ArtefactError(f"npm could not fetch {RUNTIME}, which the page computes with: {said}") from error
        package = next(Path(place).glob("*.tgz"), None)
        found = package and base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode()
        if package is None or found != RUNTIME_SHA512:
            raise ArtefactError(f"npm brought another {RUNTIME} than the one whose checksum is noted in live.py.")
        with tarfile.open(package) as packed:
            for name in RUNTIME_FILES:
                content = packed.extractfile(f"package/dist/{name}")
                assert content is not None
                (folder / name).write_bytes(content.read())

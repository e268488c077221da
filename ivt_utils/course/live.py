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
from pathlib import Path
from tempfile import TemporaryDirectory

from ivt_utils import protocol
from ivt_utils.methods import METHODS
from ivt_utils.overlay import load_image
from ivt_utils.profiles import get_profile
from ivt_utils.records import load_split
from ivt_utils.runtime.files import ROOT, ArtefactError, replace_folder, write_text
from ivt_utils.runtime.store import find_reference, installed
from ivt_utils.student import Student, load_student

LIVE = ROOT / "build" / "live"
STUDENTS = {"base_ivt": "base", "sft_ivt": "SFT", "sft_grpo_ivt": "SFT + GRPO"}  # by the method whose student it is
SCENES = 24
EYES, WORDS = "eyes.onnx", "live.json"
# What computes the networks in a browser: one release from npm, by its checksum there, and the files of it that a page
# without WebGPU needs.
RUNTIME = "onnxruntime-web@1.30.0"
RUNTIME_SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
RUNTIME_FILES = ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def build_live(folder: Path = LIVE, students=tuple(STUDENTS)) -> Path:
    """Return the folder after writing into it what the page "Try it" loads: networks, words, scenes and the runtime.

    An ArtefactError where the packages of the extra `live` or npm are missing.
    """
    if missing := [name for name in ("onnx", "onnxscript") if not installed(name)]:
        verb = "are" if len(missing) > 1 else "is"
        raise ArtefactError(f"{' and '.join(missing)} {verb} missing: pip install -e '.[live]'")
    from ivt_utils.course.live_networks import write_eyes, write_reader

    profile = get_profile("micro")
    scenes = validation_scenes(profile)
    width, height = load_image(base64.b64decode(scenes[0]["image"].partition(",")[2])).size
    with replace_folder(folder) as made:
        for name in students:
            adapter = METHODS[name].adapter
            student = load_student(profile, adapter and find_reference(f"adapters/{adapter}"))
            if name == students[0]:  # one pair of eyes for all: no training has changed them
                write_eyes(student, width, height, made / EYES)
                write_text(made / WORDS, json.dumps(words(student, profile, width, height) | {"scenes": scenes}))
            write_reader(student, width, height, made / f"{name}.onnx")
        fetch_runtime(made)
    return folder


def words(student: Student, profile, width: int, height: int) -> dict:
    """Return what a page must know to speak with the student.

    The tokenizer: "tokens" (the vocabulary in order), "whole" (what is cut out of a text first), "pattern" (what the
    rest is cut by), "silent" (the ids that no answer's text shows), "unknown" and "end" (one id each). The text of a
    chat: for every turn "open", what is said, "ask", the answer, "done". What is said: "prompt" around the expression,
    then "feedback", or "no_box" where the last answer had no box.
    """
    from ivt_utils.course.live_networks import image_grid

    tokenizer, text = student.processor.tokenizer, student.model.config.text_config
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    merge = student.processor.image_processor.merge_size
    chat = [protocol.follow_up(True, "SAID"), protocol.answer("ANSWERED"), protocol.follow_up(True, "SAID")]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    begin, rest = rendered.split("SAID", 1)
    ask, after = rest.split("ANSWERED")
    image = student.processor.image_token
    per_image = int(image_grid(student, width, height).prod()) // merge**2
    return {
        "width": width,
        "height": height,
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
        "open": begin.replace(image, image * per_image),
        "ask": ask,
        "done": after.removesuffix(f"{begin}SAID{ask}"),
        "prompt": protocol.PROMPT,
        "feedback": protocol.FEEDBACK,
        "no_box": protocol.FEEDBACK_NO_BOX,
        "past": [text.num_hidden_layers, 2, text.num_key_value_heads, 0, text.head_dim],
        "features": text.hidden_size,
        "students": STUDENTS,
    }


def validation_scenes(profile, count: int = SCENES) -> list[dict]:
    """Return the first scenes of the validation split: {"image" (PNG as a data URI), "questions"}.

    "questions": [{"id", "expression", "truth" (four numbers 0..1000)}], all that the split asks about this scene.
    """
    scenes: dict[str, dict] = {}
    for record in load_split(profile, "val"):
        if record["image_id"] not in scenes:
            if len(scenes) == count:
                continue
            content = io.BytesIO()
            load_image(record["image"]).save(content, "PNG", optimize=True)
            address = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
            scenes[record["image_id"]] = {"image": address, "questions": []}
        truth = [round(float(v), 2) for v in record["bbox"]]
        question = {"id": record["id"], "expression": record["expression"], "truth": truth}
        scenes[record["image_id"]]["questions"].append(question)
    return [*scenes.values()]


def fetch_runtime(folder: Path) -> None:
    """Write the files of the browser's runtime, out of its package, which npm fetches or has in its cache.

    An ArtefactError where there is no npm, it gets nothing, or the package is not the one whose checksum is noted.
    """
    with TemporaryDirectory() as place:
        try:
            command = [shutil.which("npm") or "npm", "pack", RUNTIME, "--prefer-offline", "--pack-destination", place]
            subprocess.run(command, check=True, capture_output=True, text=True, cwd=place)
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
            raise ArtefactError(f"npm could not fetch {RUNTIME}, which the page computes with: {said}") from error
        (package,) = Path(place).glob("*.tgz")
        found = base64.b64encode(hashlib.sha512(package.read_bytes()).digest()).decode()
        if found != RUNTIME_SHA512:
            raise ArtefactError(f"npm brought another {RUNTIME} than the one whose checksum is noted in live.py.")
        with tarfile.open(package) as packed:
            for name in RUNTIME_FILES:
                content = packed.extractfile(f"package/dist/{name}")
                assert content is not None
                (folder / name).write_bytes(content.read())

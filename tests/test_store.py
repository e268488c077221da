"""What a run leaves behind: a stage is made once, a file is whole or absent, and every trouble is one sentence."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ivt_utils.methods import ADAPTERS
from ivt_utils.profiles import get_profile
from ivt_utils.runtime import files, store
from ivt_utils.runtime.files import ArtefactError
from ivt_utils.runtime.store import Run

SMOKE = get_profile("smoke")
ROWS = [
    {"id": "a", "expression": "links\u2028of the \x85 “star”", "steps": [{"text": "\ud800", "box": [1, 2, 3, 4]}]},
    {"id": "b", "expression": "", "steps": [{"text": "", "box": None}]},
]


def sentence(caught) -> str:
    message = str(caught.value)
    assert message and "\n" not in message and not message.startswith("[Errno")
    return message


def never():
    raise AssertionError("a finished stage was made again")


@pytest.fixture
def run(tmp_path):
    return Run(SMOKE, 0, tmp_path / "run")


needs_git = pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")


def git(folder: Path, *words: str) -> None:
    author = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *author, *words], cwd=folder, check=True)


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# --- stages


def test_rollouts_are_made_once_and_read_afterwards(run):
    made = run.rollouts("base_ivt", lambda: ROWS)
    assert made == ROWS and run.rollouts("base_ivt", never) == ROWS
    assert Run(SMOKE, 0, run.root).rollouts("base_ivt", never) == ROWS  # another session
    assert files_in(run.root) == ["rollouts/base_ivt.jsonl", "run.json", "stages.json"]
    assert len((run.root / "rollouts/base_ivt.jsonl").read_text().split("\n")) == 3


def test_the_batch_size_is_noted_by_stage(run):
    run.rollouts("first", lambda: ROWS)
    Run(replace(SMOKE, batch_size=3), 0, run.root).rollouts("second", lambda: ROWS)
    run.rows("table", lambda: 1)
    noted = {key: stage.get("batch_size") for key, stage in run.stages().items()}
    assert noted == {"rollouts/first": SMOKE.batch_size, "rollouts/second": 3, "tables/table": None}


def test_rows_hold_any_json_value(run):
    value = {"a": [1, 2.5, None], "ü": "x"}
    assert run.rows("ablations", lambda: value) == value and run.rows("ablations", never) == value


def test_a_value_is_as_it_was_read_even_when_it_is_new(run):
    assert run.rows("t", lambda: {"box": (1, 2)}) == {"box": [1, 2]} == run.rows("t", never)


def test_stages_say_how_long_they_took_and_what_they_left(run):
    run.rows("slow", lambda: time.sleep(0.11) or 1)
    run.rollouts("quick", lambda: ROWS)
    assert 0.1 <= run.seconds("tables/slow") < 5 and run.seconds("tables/never") == 0.0
    assert set(run.stages()) == {"tables/slow", "rollouts/quick"}
    for key, path in (("tables/slow", "tables/slow.json"), ("rollouts/quick", "rollouts/quick.jsonl")):
        assert run.stages()[key]["sha256"] == files.checksum(run.root / path)


@pytest.mark.parametrize("kind, path", [("rollouts", "rollouts/a.jsonl"), ("rows", "tables/a.json")])
def test_a_damaged_file_is_one_sentence_and_deleting_it_helps(run, kind, path):
    getattr(run, kind)("a", lambda: ROWS)
    with open(run.root / path, "a") as file:
        file.write(" ")
    with pytest.raises(ArtefactError) as caught:
        getattr(run, kind)("a", never)
    assert path in sentence(caught) and "damaged" in sentence(caught) and "delete" in sentence(caught)
    (run.root / path).unlink()
    assert getattr(run, kind)("a", lambda: ROWS) == ROWS


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_a_stage_that_stops_in_the_middle_is_made_again_and_leaves_nothing(run, stop):
    def half():
        yield ROWS[0]
        raise stop("now")

    for kind in ("rollouts", "rows"):
        with pytest.raises(stop):
            getattr(run, kind)("a", lambda: list(half()))
    assert files_in(run.root) == ["run.json"] and run.stages() == {}
    assert run.rollouts("a", lambda: ROWS) == ROWS


def test_a_finished_stage_stays_when_a_later_one_stops(run):
    run.rollouts("first", lambda: ROWS)
    with pytest.raises(KeyboardInterrupt):
        run.rollouts("second", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run.rollouts("first", never) == ROWS and list(run.stages()) == ["rollouts/first"]


# --- adapters


def train(folder: Path):
    (folder / "checkpoint-2").mkdir()
    (folder / "checkpoint-2" / "optimizer.pt").write_text("big")
    (folder / "adapter_model.safetensors").write_text("weights")


def test_an_adapter_is_trained_once_and_its_checkpoints_go(run):
    path = run.adapter("sft", train)
    assert path == run.root / "adapters" / "sft" and files_in(path) == ["adapter_model.safetensors"]
    assert run.adapter("sft", never) == path and not path.with_name("sft.training").exists()
    assert "grpo_generated" not in run.stages()["adapters/sft"]
    run.profile = replace(run.profile, grpo_generated=6)
    run.adapter("grpo", train)
    assert run.stages()["adapters/grpo"]["grpo_generated"] == 6  # which a card may have decided


def test_a_training_that_stops_finds_its_checkpoint_next_time(run):
    def stopped(folder):
        (folder / "checkpoint-1").mkdir()
        (folder / "checkpoint-1" / "state").write_text("one step")
        raise KeyboardInterrupt

    def resumed(folder):
        assert (folder / "checkpoint-1" / "state").read_text() == "one step"
        train(folder)

    with pytest.raises(KeyboardInterrupt):
        run.adapter("sft", stopped)
    assert not (run.root / "adapters" / "sft").exists() and run.stages() == {}
    assert files_in(run.adapter("sft", resumed)) == ["adapter_model.safetensors"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "adapter_model.safetensors").write_text("weightz"),
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        lambda folder: (folder / "more").write_text(""),
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "renamed"),
    ],
)
def test_a_damaged_adapter_is_one_sentence(run, damage):
    damage(run.adapter("sft", train))
    with pytest.raises(ArtefactError) as caught:
        run.adapter("sft", never)
    assert "adapters/sft is damaged" in sentence(caught) and "delete" in sentence(caught)


# --- one folder, one run


@pytest.mark.parametrize(
    "other",
    [
        lambda root: Run(SMOKE, 1, root),
        lambda root: Run(get_profile("micro"), 0, root),
        lambda root: Run(replace(SMOKE, sft_lr=0.5), 0, root),
    ],
)
def test_another_seed_profile_or_value_in_the_same_folder_is_one_sentence(run, other):
    with pytest.raises(ArtefactError) as caught:
        other(run.root)
    assert str(run.root) in sentence(caught) and "RUN_DIR" in sentence(caught)
    Run(SMOKE, 0, run.root)


def test_a_run_from_before_a_value_was_one_goes_on_with_what_was_fixed_then(run):
    note = run.root / "run.json"
    noted = json.loads(note.read_text())
    del noted["values"]["sft_warmup"]
    note.write_text(json.dumps(noted))
    Run(SMOKE, 0, run.root)
    with pytest.raises(ArtefactError, match="another profile, seed or values"):
        Run(replace(SMOKE, sft_warmup=0.1), 0, run.root)


def test_how_a_run_is_made_to_fit_a_machine_does_not_matter(run):
    Run(replace(SMOKE, batch_size=SMOKE.batch_size * 2), 0, run.root)


def test_the_folder_is_named_after_the_profile_unless_told_otherwise(monkeypatch, tmp_path):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    assert Run(SMOKE).root == tmp_path / "runs" / "smoke"
    assert Run(SMOKE, 3, str(tmp_path / "mine")).root == tmp_path / "mine"


@pytest.mark.parametrize("name", ["run.json", "stages.json"])
def test_a_damaged_note_is_one_sentence(run, name):
    run.rows("a", lambda: 1)
    (run.root / name).write_text('{"half')
    with pytest.raises(ArtefactError) as caught:
        Run(SMOKE, 0, run.root).rows("a", lambda: 1)
    assert name in sentence(caught)


# --- what earlier notebooks made


@pytest.fixture
def reference(tmp_path, monkeypatch):
    """A folder of reference results with one adapter, one table and one file of rollouts."""
    folder = tmp_path / "reference"
    monkeypatch.setattr(store, "REFERENCE", folder)
    made = Run(SMOKE, 0, folder)
    made.adapter("sft", train)
    made.rows("ablations", lambda: [1])
    made.rollouts("base_ivt", lambda: ROWS)
    return folder


RELATIVE = ["adapters/sft", "tables/ablations.json", "rollouts/base_ivt.jsonl"]


@pytest.mark.parametrize("relative", RELATIVE)
def test_what_this_run_has_not_made_is_taken_from_the_reference_and_said(run, reference, relative, capsys):
    assert run.find(relative) == reference / relative
    said = capsys.readouterr().out
    assert relative in said and "reference" in said and said.count("\n") == 1


def test_what_this_run_has_made_comes_first_and_nothing_is_said(run, reference, capsys):
    run.adapter("sft", train)
    run.rows("ablations", lambda: [2])
    assert run.find("adapters/sft") == run.root / "adapters" / "sft"
    assert json.loads(run.find("tables/ablations.json").read_text()) == [2]
    assert capsys.readouterr().out == ""


def test_what_is_in_neither_place_is_one_sentence(run, reference):
    with pytest.raises(ArtefactError) as caught:
        run.find("adapters/grpo")
    assert "adapters/grpo" in sentence(caught) and "run the earlier notebooks" in sentence(caught)


def spoil(path: Path) -> None:
    path = path / "adapter_model.safetensors" if path.is_dir() else path
    path.write_text(path.read_text() + " ")


@pytest.mark.parametrize("relative", RELATIVE)
def test_a_damaged_reference_is_one_sentence(run, reference, relative):
    spoil(reference / relative)
    with pytest.raises(ArtefactError) as caught:
        run.find(relative)
    assert "damaged" in sentence(caught) and "restore it from where it came" in sentence(caught)


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"adapters/sft": null}', '{"adapters/sft": []}'])
def test_odd_notes_of_the_reference_are_one_sentence(run, reference, content):
    (reference / "stages.json").write_text(content)
    with pytest.raises(ArtefactError, match="missing or damaged"):
        run.find("adapters/sft")


@pytest.mark.parametrize("relative", RELATIVE)
def test_a_damaged_artefact_of_this_run_is_not_used(run, reference, relative):
    run.adapter("sft", train)
    run.rows("ablations", lambda: [2])
    run.rollouts("base_ivt", lambda: ROWS)
    spoil(run.root / relative)
    with pytest.raises(ArtefactError) as caught:
        run.find(relative)
    assert "damaged" in sentence(caught) and str(run.root) in sentence(caught)


@pytest.fixture
def finished(run):
    """A run with everything that becomes the reference."""
    for name in ADAPTERS:
        run.adapter(name, train)
    run.rows("ablations", lambda: [2])
    run.rollouts("base_ivt", lambda: ROWS)
    for name in ("results.json", "figures/final.png"):
        files.write_text(run.root / name, "{}")
    return run


def test_a_finished_run_becomes_the_reference(finished, reference, tmp_path, capsys):
    assert store.ship_reference(finished.root, ADAPTERS) == reference
    other = Run(SMOKE, 1, tmp_path / "other")
    for relative in (*RELATIVE, "figures/final.png", "adapters/grpo"):
        assert other.find(relative) == reference / relative
        assert files.checksum(reference / relative) == files.checksum(finished.root / relative)
    assert capsys.readouterr().out.count("reference") == 5
    assert not [path for path in files_in(reference) if "checkpoint" in path or "training" in path]


def test_of_what_is_only_counted_the_boxes_are_shipped(finished, reference):
    asked = {"id": "a", "expression": "the star", "steps": [{"text": "It fits.", "box": [1, 2, 3, 4], "shown": None}]}
    finished.rollouts("control_sft_ivt_no_box", lambda: [asked])
    finished.rollouts("sft_ivt", lambda: [asked])
    seed = Run(finished.profile, 3, finished.root / store.SEEDS / "3")
    for name in ("sft_ivt", "sft_ivt_long", "grpo_single", "train_step0"):
        seed.rollouts(name, lambda: [asked])
    store.ship_reference(finished.root, ADAPTERS)
    boxes = [{"id": "a", "steps": [{"box": [1, 2, 3, 4], "shown": None}]}]
    assert files.read_jsonl(reference / "rollouts" / "control_sft_ivt_no_box.jsonl") == boxes
    assert files.read_jsonl(reference / "rollouts" / "sft_ivt.jsonl") == [asked]
    shipped = sorted(path.name for path in (reference / "seeds" / "3").rglob("*.*"))
    assert shipped == ["grpo_single.jsonl", "sft_ivt_long.jsonl", "stages.json"]  # a long loop begins as the short one
    assert files.read_jsonl(reference / "seeds" / "3" / "rollouts" / "sft_ivt_long.jsonl") == boxes
    assert set(files.read_json(reference / "seeds" / "3" / "stages.json")) == {
        "rollouts/grpo_single",
        "rollouts/sft_ivt_long",
    }


@pytest.mark.parametrize("missing", ["results.json", "adapters/grpo"])
def test_an_unfinished_run_does_not_become_the_reference(finished, reference, missing):
    before = {path: (reference / path).read_bytes() for path in files_in(reference)}
    (finished.root / missing).rename(finished.root / "elsewhere")
    with pytest.raises(ArtefactError) as caught:
        store.ship_reference(finished.root, ADAPTERS)
    assert missing in sentence(caught) and {p: (reference / p).read_bytes() for p in files_in(reference)} == before
    assert not list(reference.parent.glob(".*"))


# --- files


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_text_is_written_with_its_folders_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "a" / "b" / "note.txt"
    files.write_text(path, "ä\n")
    files.write_text(path, "second")
    assert path.read_text(encoding="utf-8") == "second" and files_in(tmp_path) == ["a/b/note.txt"]


@pytest.mark.parametrize("call", ["write_text", "mkdir"])
def test_no_disk_space_is_one_sentence_and_the_old_file_stays(tmp_path, monkeypatch, call):
    path = tmp_path / "note.txt"
    files.write_text(path, "old")
    monkeypatch.setattr(Path, call, full)
    with pytest.raises(ArtefactError) as caught:
        files.write_text(path, "new")
    monkeypatch.undo()
    assert "No space left on the disk for" in sentence(caught) and "note.txt" in sentence(caught)
    assert path.read_text() == "old" and files_in(tmp_path) == ["note.txt"]


def test_a_disk_that_fills_up_while_writing_leaves_no_half_file(tmp_path, monkeypatch):
    path, whole = tmp_path / "note.txt", Path.write_text

    def half(self, text, **options):
        whole(self, text[: len(text) // 2], **options)
        full()

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(ArtefactError):
        files.write_text(path, "a long text")
    assert files_in(tmp_path) == []


def test_no_disk_space_in_a_stage_is_the_same_sentence(run, monkeypatch):
    monkeypatch.setattr(store.os, "replace", full)
    with pytest.raises(ArtefactError) as caught:
        run.rollouts("a", lambda: ROWS)
    monkeypatch.undo()
    assert "No space left on the disk" in sentence(caught) and run.rollouts("a", lambda: ROWS) == ROWS


@pytest.mark.parametrize(
    ("number", "path", "says", "never_says"),
    [
        (errno.ENOSPC, "runs/a.json", "No space left on the disk for runs/a.json: free some", "--run-dir"),
        (errno.EDQUOT, "runs/a.json", "No space left on the disk for runs/a.json: free some", "--run-dir"),
        (errno.ENOSPC, None, "No space left on the disk for what was to be written", "--run-dir"),
        (
            errno.EROFS,
            "runs/a.json",
            "runs/a.json cannot be written (Read-only file system): name a folder of yours with "
            "--run-dir (in a notebook: RUN_DIR).",
            "free some",
        ),
        (errno.EACCES, "runs/a.json", "(Permission denied): name a folder of yours with --run-dir", "free some"),
        (errno.EACCES, files.DATA / "hub/paper-dry-run", "copy the course into a folder of yours", "--run-dir"),
        (errno.EIO, "runs/a.json", "runs/a.json: Input/output error.", "free some"),
        (errno.EINVAL, None, "Invalid argument", "free some"),
    ],
)
def test_the_remedy_fits_what_the_disk_says(number, path, says, never_says):
    told = files.trouble(OSError(number, os.strerror(number)), path)
    assert says in told and never_says not in told and "\n" not in told


def test_what_may_not_be_read_is_not_told_to_be_written(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("{}")
    monkeypatch.setattr(store.os, "access", lambda *_: False)  # root may read everything
    told = files.trouble(PermissionError(errno.EACCES, "Permission denied", str(path)))
    assert told == f"{path} cannot be read: Permission denied."


CLOSED = """
import os, sys, tempfile
from pathlib import Path
from ivt_utils.course import doctor
from ivt_utils.runtime import files
if os.getuid() == 0:  # root may write everywhere, so become nobody
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
place = Path(sys.argv[1])
try:
    files.write_text(place / "run" / "a.json", "{}")
except files.ArtefactError as error:
    print(error)
print(*doctor.writable(place))
"""


@pytest.mark.parametrize("name", [b"runs/a.json", "runs/a.json", Path("runs/a.json")])
def test_a_file_may_be_named_in_any_way(name):
    assert files.trouble(OSError(errno.EIO, "Input/output error"), name) == "runs/a.json: Input/output error."
    assert "what was to be written" in files.trouble(OSError(errno.ENOSPC, "No space left on device", 3))


def test_a_folder_that_really_may_not_be_written_names_the_way_out():
    with tempfile.TemporaryDirectory() as outer:  # pytest's own folders are closed to others
        os.chmod(outer, 0o755)
        closed = Path(outer, "closed")
        closed.mkdir(mode=0o555)
        done = subprocess.run([sys.executable, "-c", CLOSED, closed], cwd=files.ROOT, text=True, capture_output=True)
        if "setgroups" in done.stderr or "setuid" in done.stderr:
            pytest.skip("this root may not become another user")
        assert done.returncode == 0, done.stderr
        first, second = done.stdout.splitlines()
        assert first.startswith(f"{closed}/run/a.json cannot be written (Permission denied): name a folder of yours")
        assert "--run-dir" in first and "RUN_DIR" in first and "space" not in first
        assert second.startswith(f"NOTE {closed}/runs cannot be written (Permission denied)")
        assert not list(closed.iterdir())


@needs_git
def test_the_advice_restores_a_clone_that_was_made_with_other_line_ends(tmp_path, monkeypatch):
    """In a clone of before .gitattributes, git takes the files with CRLF for unchanged, and leaves them alone."""
    here, there = tmp_path / "here", tmp_path / "there"
    (here / "data").mkdir(parents=True)
    files.write_text(here / "data" / "a.json", "{}\n")
    files.note_files(here / "data", ["a.json"])
    git(here, "init", "-q")
    git(here, "add", "-A")
    git(here, "commit", "-q", "-m", "first")
    git(tmp_path, "clone", "-q", "-c", "core.autocrlf=true", "here", "there")
    monkeypatch.setattr(files, "ROOT", there)
    (there / ".gitattributes").write_text("* text=auto eol=lf\n")
    with pytest.raises(ArtefactError, match="damaged") as caught:
        files.intact(there / "data" / "a.json")
    subprocess.run(sentence(caught).rpartition("restore it with: ")[2], shell=True, cwd=there, check=True)
    assert files.intact(there / "data" / "a.json")


@needs_git
def test_a_project_inside_another_repository_has_no_commit(tmp_path, monkeypatch):
    inside = tmp_path / "theirs" / "ivt-course"
    inside.mkdir(parents=True)
    monkeypatch.setattr(store, "ROOT", inside)
    for folder in (inside.parent, inside):  # first theirs alone, then one of our own as well
        assert store.commit() is None
        git(folder, "init", "-q")
        git(folder, "commit", "-q", "-m", "first", "--allow-empty")
    assert len(store.commit()) == 40


def test_advice_fits_a_clone_an_archive_and_a_folder_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "ROOT", tmp_path)
    assert "git" not in files.restoring(tmp_path / "data" / "student")
    assert "archive (ZIP)" in files.restoring(tmp_path / "data" / "student")
    (tmp_path / ".git").mkdir()
    told = files.restoring(tmp_path / "data" / "student")
    assert told == "restore it with: rm -rf data/student && git checkout -- data/student"
    assert "git" not in files.restoring(tmp_path.parent / "mine")


def test_a_kill_at_any_moment_leaves_the_old_text_or_the_new_one(tmp_path):
    path = tmp_path / "note.txt"
    code = (
        "import itertools, sys; from pathlib import Path; from ivt_utils.runtime.store import write_text\n"
        "for i in itertools.count(): write_text(Path(sys.argv[1]), 'ab'[i % 2] * 3_000_000)"
    )
    for pause in (0.0, 0.013, 0.029):
        path.unlink(missing_ok=True)
        child = subprocess.Popen([sys.executable, "-c", code, path], cwd=files.ROOT)
        try:
            until = time.monotonic() + 60
            while not path.exists() and time.monotonic() < until:
                time.sleep(0.005)
            time.sleep(pause)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        text = path.read_text()
        assert len(text) == 3_000_000 and set(text) in ({"a"}, {"b"})


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "old").write_text("old")
    return path


def test_a_folder_is_replaced_as_a_whole(folder):
    with files.replace_folder(folder) as new:
        assert files_in(new) == [] and files_in(folder) == ["old"]
        (new / "new").write_text("new")
    assert files_in(folder.parent) == ["folder/new"]


@pytest.mark.parametrize("stop", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_an_error_while_a_folder_is_written_keeps_the_old_one(folder, stop):
    with pytest.raises(type(stop)):
        with files.replace_folder(folder) as new:
            (new / "new").write_text("new")
            raise stop
    assert files_in(folder.parent) == ["folder/old"]


@pytest.mark.parametrize("failing", [1, 2])
def test_an_error_while_a_folder_is_renamed_keeps_the_old_one(folder, monkeypatch, failing):
    real, calls = os.replace, []

    def replace_or_fail(source, target):
        calls.append(target)
        if len(calls) == failing:
            full()
        real(source, target)

    monkeypatch.setattr(store.os, "replace", replace_or_fail)
    with pytest.raises((OSError, ArtefactError)):
        with files.replace_folder(folder) as new:
            (new / "new").write_text("new")
    assert files_in(folder.parent) == ["folder/old"]


def test_a_first_folder_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ValueError):
        with files.replace_folder(tmp_path / "deep" / "folder"):
            raise ValueError
    assert files_in(tmp_path) == [] and not (tmp_path / "deep" / "folder").exists()


# --- reading


def test_an_unreadable_file_is_one_sentence(tmp_path):
    with pytest.raises(ArtefactError) as caught:
        files.read_json(tmp_path / "gone.json")
    assert "gone.json is missing" in sentence(caught)
    for name, content in (("a.json", b"{"), ("b.json", b"\xff\xfe")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ArtefactError) as caught:
            files.read_json(tmp_path / name)
        assert f"{name} is not valid JSON" in sentence(caught)
    (tmp_path / "c.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ArtefactError) as caught:
        files.read_jsonl(tmp_path / "c.jsonl")
    assert "damaged in line 2" in sentence(caught) and "c.jsonl" in sentence(caught)


@pytest.mark.parametrize("content", [None, b"\xff\xfe", '{"a": "line\u2028separator"}\n'.encode()])
def test_rows_that_are_missing_or_of_another_encoding_are_one_sentence_and_other_separators_stay(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    if content and content[0] == ord("{"):
        assert files.read_jsonl(path) == [{"a": "line\u2028separator"}]
    else:
        with pytest.raises(ArtefactError) as caught:
            files.read_jsonl(path)
        assert "rows.jsonl" in sentence(caught)


def test_a_checksum_knows_names_and_contents(tmp_path):
    for name, content in (("x/a", "1"), ("y/a", "1"), ("z/b", "1"), ("w/a", "2"), ("v/sub/a", "1")):
        files.write_text(tmp_path / name, content)
    sums = {name: files.checksum(tmp_path / name) for name in "vwxyz"}
    assert sums["x"] == sums["y"] and len(set(sums.values())) == 4
    assert files.checksum(tmp_path / "x/a").startswith("6b86b273ff34fce1")  # SHA-256 of "1"


# --- where results come from


def test_the_version_of_bitsandbytes_is_noted_where_it_is_installed(monkeypatch):
    for there in ("0.50.2", None):
        monkeypatch.setattr(store, "installed", lambda name, there=there: there if name == "bitsandbytes" else "1")
        assert store.versions().get("bitsandbytes") == there


def test_versions_of_all_that_matters(monkeypatch):
    found = store.versions()
    assert set(found) >= {"torch", "transformers", "trl", "peft", "datasets"} and "missing" not in found.values()
    monkeypatch.setattr(store, "LIBRARIES", ("numpy", "no-such-library"))
    assert store.versions()["no-such-library"] == "missing"


def test_the_commit_with_a_plus_for_changed_files_and_none_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert store.commit() is None
    (tmp_path / "file").write_text("1")
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "file"], [*identity, "commit", "-qm", "one"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    clean = store.commit()
    assert len(clean) == 40 and set(clean) <= set("0123456789abcdef")
    (tmp_path / "file").write_text("2")
    assert store.commit() == clean + "+"

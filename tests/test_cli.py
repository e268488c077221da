"""The command `ivt`: notebooks in order, each once; one sentence for everything that goes wrong."""

import errno
import io
import json
import re
import shutil
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from packaging.version import Version

from ivt_utils import pipeline, records
from ivt_utils.cli import main
from ivt_utils.course import doctor, execute
from ivt_utils.course import lessons as lessons_module
from ivt_utils.paper_scale import vlm_teacher
from ivt_utils.profiles import DRY_RUN, get_profile
from ivt_utils.runtime import files, store
from ivt_utils.runtime.files import ArtefactError


def write_notebook(folder: Path, stem: str, *cells: str) -> Path:
    """A notebook with a text, a tagged `parameters` cell and these code cells."""
    parameters = nbformat.v4.new_code_cell("PROFILE = 'smoke'\nSEED = 0\nRUN_DIR = 'runs/smoke'")
    parameters.metadata["tags"] = ["parameters"]
    code = [nbformat.v4.new_code_cell(cell) for cell in cells]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A title"), parameters, *code])
    folder.mkdir(exist_ok=True)
    nbformat.write(notebook, folder / f"{stem}.ipynb")
    return folder / f"{stem}.ipynb"


def log(text: str) -> str:
    """A cell that appends `text`, an f-string's inside, to a log in the run."""
    opening = "from pathlib import Path\nwith open(Path(RUN_DIR) / 'log', 'a') as file:\n"
    return f"{opening}    print(f{text!r}, file=file)"


@pytest.fixture
def lessons(tmp_path, monkeypatch):
    """A folder for notebooks; profiles and the report are stand-ins."""
    profiles, report = types.ModuleType("ivt_utils.profiles"), types.ModuleType("ivt_utils.show.report")

    def get_profile(name):
        if name != "tiny":
            raise ValueError(f"There is no profile {name}; choose from tiny.")
        return types.SimpleNamespace(name=name, hub_student=False)

    profiles.get_profile, profiles.DRY_RUN = get_profile, DRY_RUN
    report.report_from = lambda run_dir: print(f"the report of {run_dir.name}")
    seconds = {"01_first": {"Start": 120.0}, "02_second": {"Start": 90.0}}
    monkeypatch.setattr(execute, "section_seconds", lambda name: seconds)
    monkeypatch.setitem(sys.modules, "ivt_utils.profiles", profiles)
    monkeypatch.setitem(sys.modules, "ivt_utils.show.report", report)
    package, folder = tmp_path / "ivt_utils", tmp_path / "lessons"
    package.mkdir()
    (package / "boxes.py").write_text("1")
    monkeypatch.setattr(execute, "PACKAGE", package)  # its sources may be edited while the tests run
    folder.mkdir()
    return folder


def ivt_run(folder: Path, *more: str) -> int:
    run_dir = str(folder.parent / "run")
    return main(["run", "--profile", "tiny", "--seed", "3", "--run-dir", run_dir, "--notebooks", str(folder), *more])


def logged(folder: Path) -> list[str]:
    return (folder.parent / "run" / "log").read_text().splitlines()


@pytest.mark.slow
def test_notebooks_run_in_order_once_and_again_when_changed(lessons, capsys):
    write_notebook(lessons, "02_second", log("second"))
    write_notebook(lessons, "01_first", log("first {PROFILE} {SEED} {Path.cwd().name} {Path(RUN_DIR).is_absolute()}"))
    write_notebook(lessons, "exercise", log("not of the course"))
    assert ivt_run(lessons) == 0
    first = f"first tiny 3 {execute.PROJECT.name} True"
    assert logged(lessons) == [first, "second"]
    said = capsys.readouterr().out
    first_line = said.splitlines()[0]  # the cost comes first
    assert "2 notebooks, 3m30s from scratch on" in first_line and "(01: 2m00s, 02: 1m30s)" in first_line
    assert said.splitlines()[-1] == "the report of run"
    assert "[2/2] 02_second: done in" in said
    done = lessons.parent / "run" / "notebooks"
    assert sorted(path.name for path in done.iterdir()) == ["01_first.ipynb", "02_second.ipynb"]

    assert ivt_run(lessons) == 0  # nothing has changed
    assert logged(lessons) == [first, "second"]
    assert "nothing has changed" in capsys.readouterr().out

    write_notebook(lessons, "02_second", log("second, better"))
    assert ivt_run(lessons) == 0  # only what changed
    assert logged(lessons) == [first, "second", "second, better"]

    write_notebook(lessons, "01_first", "import ivt_utils.boxes\n" + log("first, better"))
    assert ivt_run(lessons, "--only", "01") == 0
    assert ivt_run(lessons) == 0  # and what comes after it
    assert logged(lessons)[3:] == ["first, better", "second, better"]

    for name, again in (("cli.py", 0), ("boxes.py", 2)):  # the code of the package that a notebook reaches
        (execute.PACKAGE / name).write_text("2")
        before = len(logged(lessons))
        assert ivt_run(lessons) == 0
        assert len(logged(lessons)) == before + again


@pytest.mark.slow
def test_a_notebook_of_an_older_format_runs_as_well(lessons, capsys):
    """Colab and older Jupyter write cells without ids."""
    path = write_notebook(lessons, "01_first", log("first"))
    content = json.loads(path.read_text()) | {"nbformat_minor": 4}
    for cell in content["cells"]:
        del cell["id"]
    path.write_text(json.dumps(content))
    assert ivt_run(lessons) == 0
    assert logged(lessons) == ["first"]


def test_over_the_reference_no_training_is_announced(lessons, capsys, monkeypatch):
    monkeypatch.setattr(lessons_module, "seed_run", lambda *_: None)
    write_notebook(lessons, "01_first", log("first"))
    assert ivt_run(lessons, "--reference") == 0
    first_line = capsys.readouterr().out.splitlines()[0]
    assert "nothing is trained" in first_line and "from scratch" not in first_line


@pytest.mark.slow
def test_failing_cell_is_one_sentence_and_the_rest_is_kept(lessons, capsys):
    write_notebook(lessons, "01_first", log("first"))
    write_notebook(lessons, "02_second", "print('so far')", "raise ValueError('no box\\nat all')", "1 + 1")
    assert ivt_run(lessons) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "02_second.ipynb stopped in cell 4 of 5: ValueError: no box." in told
    partial = lessons.parent / "run" / "notebooks" / "02_second.partial.ipynb"
    assert str(partial) in told and "so far" in partial.read_text()
    assert not partial.with_name("02_second.ipynb").exists()

    write_notebook(lessons, "02_second", log("second"))
    assert ivt_run(lessons) == 0  # goes on where it stopped
    assert logged(lessons) == ["first", "second"]
    assert not partial.exists()


@pytest.mark.slow
def test_dead_process_is_one_sentence(lessons, capsys):
    write_notebook(lessons, "01_first", "import os; os._exit(9)")
    assert ivt_run(lessons) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "cell 3 of 3" in told and "memory" in told


def test_ctrl_c_says_what_is_finished(lessons, capsys, monkeypatch):
    write_notebook(lessons, "01_first", "1")
    write_notebook(lessons, "02_second", "2")

    def run_one(notebook, *_):
        if notebook.stem == "02_second":
            raise KeyboardInterrupt

    monkeypatch.setattr(execute, "execute", run_one)
    assert ivt_run(lessons) == 130
    told = capsys.readouterr().err
    assert told == "Stopped in 02_second. Finished: 01_first. The same command goes on from there.\n"


def test_executed_notebook_names_no_path_of_the_machine(lessons, monkeypatch):
    monkeypatch.setattr(execute, "PROJECT", lessons.parent)
    write_notebook(lessons, "01_first", log("first"))
    assert ivt_run(lessons) == 0
    text = (lessons.parent / "run" / "notebooks" / "01_first.ipynb").read_text()
    assert str(lessons.parent) not in text and 'RUN_DIR = \\"run\\"' in text


def test_a_run_is_stale_without_its_artefacts(tmp_path):
    metadata = {
        "papermill": {"exception": None},
        execute.MARK: {"made_from": "x", "artefacts": ["tables/a.json"]},
    }
    executed = tmp_path / "01.ipynb"
    executed.write_text(json.dumps({"metadata": metadata}))
    assert not execute.is_current(executed, "x", tmp_path)
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "a.json").write_text("1")
    assert execute.artefacts_in(tmp_path) == ["tables/a.json"]
    assert execute.is_current(executed, "x", tmp_path)
    assert not execute.is_current(executed, "y", tmp_path)
    executed.write_text(executed.read_text()[:-5])  # cut off
    assert not execute.is_current(executed, "x", tmp_path)


# ---------------------------------------------------------------------------------------------- bad input
def one_sentence(capsys) -> str:
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "Traceback" not in told
    return told


def test_unknown_profile(lessons, capsys):
    assert main(["run", "--profile", "huge"]) == 2
    assert "choose from tiny" in one_sentence(capsys)
    assert main(["doctor", "--profile", "huge"]) == 2
    assert "choose from tiny" in one_sentence(capsys)


def test_no_notebooks_and_unknown_notebook(lessons, capsys):
    assert ivt_run(lessons) == 2
    assert "No notebooks" in one_sentence(capsys)
    write_notebook(lessons, "01_first", "1")
    assert ivt_run(lessons, "--only", "07_mirage") == 2
    assert "no notebook 07_mirage; choose from 01_first" in one_sentence(capsys)


def test_report_without_a_run(tmp_path, capsys):
    assert main(["report", "--from", str(tmp_path / "runs" / "micro")]) == 2
    assert "no run" in one_sentence(capsys)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ArtefactError("The file a is damaged; delete it and run again."), "delete it"),
        (
            OSError(errno.ENOSPC, "No space left on device", "x.jsonl"),
            "No space left on the disk for x.jsonl",
        ),
        (OSError(errno.EROFS, "Read-only file system", "x.jsonl"), "name a folder of yours with --run-dir"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "x cannot be written (Permission denied): name"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "x.jsonl"), "x.jsonl: Is a directory."),
    ],
)
def test_what_a_user_can_put_right_is_one_sentence(lessons, tmp_path, capsys, monkeypatch, error, said):
    def report_from(_):
        raise error

    monkeypatch.setattr(sys.modules["ivt_utils.show.report"], "report_from", report_from)
    assert main(["report", "--from", str(tmp_path)]) == 2
    assert said in one_sentence(capsys)


def test_only_some_notebooks_may_leave_no_report(lessons, capsys, monkeypatch):
    def report_from(_):
        raise ArtefactError("No predictions yet.")

    monkeypatch.setattr(sys.modules["ivt_utils.show.report"], "report_from", report_from)
    monkeypatch.setattr(execute, "execute", lambda *_: None)
    write_notebook(lessons, "01_first", "1")
    assert ivt_run(lessons, "--only", "01") == 0
    assert "No report yet: No predictions yet." in capsys.readouterr().out
    assert ivt_run(lessons) == 2


# ---------------------------------------------------------------------------------------------- terminal
class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("out", "term", "live"), [(Terminal(), "xterm", True), (Terminal(), "dumb", False), (io.StringIO(), "xterm", False)]
)
def test_progress_rewrites_its_line_only_on_a_terminal(out, term, live, monkeypatch):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(execute, "PLAIN_SECONDS", 0.2)
    with execute.progress(lambda: "cell 3/9", out):
        time.sleep(1.5)
    assert "cell 3/9" in out.getvalue()
    assert ("\r" in out.getvalue()) is live and ("\n" in out.getvalue()) is not live


@pytest.mark.slow
def test_the_line_says_what_is_left_on_this_machine(lessons, monkeypatch):
    """Measured: 3.5 minutes. Here the first notebook takes two seconds, so much less is left than that."""
    monkeypatch.setattr(execute, "PLAIN_SECONDS", 0.3)
    write_notebook(lessons, "01_first", "import time; time.sleep(2)")
    write_notebook(lessons, "02_second", "import time; time.sleep(2)")
    out = io.StringIO()
    profile = sys.modules["ivt_utils.profiles"].get_profile("tiny")
    execute.run_course(profile, 0, lessons.parent / "run", lessons, out=out)
    left = re.findall(r"\[(\d)/2\].*cell \d/3, .*, about (\d+)m(\d\d)s to go", out.getvalue())
    seconds = [(number, 60 * int(m) + int(s)) for number, m, s in left]
    assert max(s for number, s in seconds if number == "1") > 150
    assert max(s for number, s in seconds if number == "2") < 30


# ---------------------------------------------------------------------------------------------- doctor
def test_doctor_compares_with_the_lock(tmp_path):
    lock = tmp_path / "requirements.lock"
    lock.write_text("# why\nnumpy==1.0\nnbformat>=5\nno-such-package==1\nother==1 ; python_version < '3'\n")
    lines = doctor.packages(lock)
    assert [tag for tag, _ in lines] == [doctor.NOTE, doctor.MISS, doctor.OK]
    assert "tested with 1.0" in lines[0][1] and "no-such-package" in lines[1][1] and lines[2][1].startswith("1 ")


def test_doctor_takes_a_cpu_only_torch_for_the_locked_one(tmp_path, monkeypatch):
    (tmp_path / "requirements.lock").write_text("torch==2.14.1\n")
    monkeypatch.setattr(doctor, "installed", lambda name: "2.14.1+cpu")
    assert doctor.packages(tmp_path / "requirements.lock")[0] == (doctor.OK, "torch 2.14.1+cpu")


def test_doctor_fails_only_when_something_needed_is_missing(lessons, capsys, monkeypatch):
    found = [(doctor.OK, "python 3.11.7"), (doctor.NOTE, "memory 1.0 GB free")]
    monkeypatch.setattr(doctor, "examine", lambda project, profile: found)
    assert main(["doctor", "--profile", "tiny"]) == 0
    assert "[ OK ] python 3.11.7\n[NOTE] memory" in capsys.readouterr().out
    found.append((doctor.MISS, "benchmark"))
    assert main(["doctor", "--profile", "tiny"]) == 1
    assert "[MISS] benchmark" in capsys.readouterr().out


def test_doctor_sees_what_a_clone_lacks(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "gpu", lambda profile: [])
    (tmp_path / "data" / "reference" / "adapter").mkdir(parents=True)
    (tmp_path / "data" / "reference" / "adapter" / "a.safetensors").touch()
    for name in ("paper_results.json", "timings.json", "manifest.json"):
        shutil.copy(files.DATA / name, tmp_path / "data")
    lines = doctor.examine(tmp_path, get_profile("micro"))
    missing = [text.split(":")[0] for tag, text in lines if tag == doctor.MISS]
    assert {"benchmark", "micro student", "notebooks"} <= set(missing)
    assert (doctor.OK, "the paper's numbers in data/") in lines
    noted = [text for tag, text in doctor.examine(tmp_path, get_profile("paper")) if tag == doctor.NOTE]
    assert any("ivt data --profile paper" in text for text in noted)
    assert not any("No CUDA card" in text for text in noted)  # its line says that, and once is enough


@pytest.fixture
def card(monkeypatch):
    """Pretend a card, a driver's newest CUDA and a torch build's CUDA; None: there is none."""
    import torch

    def pretend(there: bool, known: str | None, wheel: str | None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(name="H100", total_memory=8e10)
        )
        monkeypatch.setattr(torch.version, "cuda", wheel)
        monkeypatch.setattr(doctor, "driver", lambda: known and Version(known))

    return pretend


@pytest.mark.parametrize(
    "there, known, wheel, tag, said",
    [
        (False, None, "13.0", doctor.MISS, "none; paper needs it"),
        (False, "12.4", None, doctor.MISS, "built without it, but an NVIDIA driver is here (CUDA 12.4)"),
        (False, "12.4", "13.0", doctor.MISS, "torch is built for 13.0, and the driver knows none above 12.4"),
        (False, "13.0", "13.0", doctor.MISS, "CUDA_VISIBLE_DEVICES"),
        (True, "12.4", "12.8", doctor.NOTE, "torch is built for 12.8, newer than the driver's 12.4"),
        (True, "13.1", "13.0", doctor.OK, "H100, 80 GB"),
    ],
)
def test_doctor_holds_the_driver_against_torchs_cuda(card, there, known, wheel, tag, said):
    card(there, known, wheel)
    lines = [line for line in doctor.gpu(get_profile("paper")) if line[1].startswith("CUDA")]
    assert lines[-1][0] == tag and said in lines[-1][1]
    assert doctor.MISS not in dict(doctor.gpu(get_profile("micro")))


@pytest.mark.skipif(sys.platform != "linux", reason="Triton comes with PyTorch on Linux only")
def test_doctor_looks_for_what_triton_compiles_with(card, monkeypatch, tmp_path):
    def said(profile):
        return doctor.compiling(get_profile(profile))

    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    (tmp_path / "gcc").touch(mode=0o755)
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path / "include")})
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    card(True, "13.0", "13.0")
    assert said("paper") == said("micro") == [(doctor.OK, f"C compiler {tmp_path / 'gcc'} and Python's headers")]
    (tmp_path / "include" / "Python.h").unlink()
    ((tag, text),) = said("paper")
    assert tag == doctor.MISS and "Python.h" in text and "C compiler" not in text
    monkeypatch.setenv("CC", "no-such-compiler")
    ((tag, text),) = said("paper")
    assert tag == doctor.MISS and "CC is no-such-compiler" in text and "Python.h" in text
    card(False, None, None)
    assert [tag for tag, _ in said("paper")] == [doctor.NOTE] and said("micro") == []


def test_doctor_looks_for_the_weights_or_room_for_them_in_the_hubs_cache(card, monkeypatch, tmp_path):
    from huggingface_hub import constants

    from ivt_utils.paper_scale.plan import configuration, weight_bytes

    def said():
        ((tag, text),) = doctor.weights(paper)
        assert str(cache) in text
        return tag, text

    paper, cache = get_profile("paper"), tmp_path / "hub"
    size, snapshots = weight_bytes(configuration(paper)), cache / "models--Qwen--Qwen3-VL-4B-Instruct" / "snapshots"
    own, other = snapshots / paper.student_revision, snapshots / ("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    card(True, "13.0", "13.0")
    free = {"bytes": size}
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: types.SimpleNamespace(free=free["bytes"]))
    assert said()[0] == doctor.OK and f"{size / 1e9:.1f} GB of weights" in said()[1] and "begins anew" in said()[1]
    free["bytes"] -= 1
    assert said()[0] == doctor.MISS and "HF_HOME" in said()[1]
    card(False, None, None)
    assert said()[0] == doctor.NOTE
    for folder, name, held in ((own, "a", 5 * 10**9), (other, "b", size)):  # weights of another revision are of no use
        folder.mkdir(parents=True)
        with open(folder / f"{name}.safetensors", "wb") as file:
            file.truncate(held)  # takes no room
    free["bytes"] = size - 5 * 10**9
    assert said()[0] == doctor.OK and f"{free['bytes'] / 1e9:.1f} GB of weights" in said()[1]
    with open(own / "b.safetensors", "wb") as file:
        file.truncate(size - 5 * 10**9)
    free["bytes"] = 0
    assert said() == (doctor.OK, f"the weights of {paper.student} in {cache}")


def test_doctor_tries_to_write_into_the_hubs_cache(card, monkeypatch, tmp_path):
    def full(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    card(True, "13.0", "13.0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(doctor.tempfile, "TemporaryDirectory", full)
    ((tag, text),) = doctor.weights(get_profile("paper"))
    assert tag == doctor.MISS and "hub cannot be written (Permission denied)" in text and "HF_HOME" in text


def test_doctor_says_all_of_it_before_a_run_of_the_papers_scale(monkeypatch, card):
    card(False, None, None)
    lines = doctor.examine(store.ROOT, get_profile("paper"))
    assert {*doctor.compiling(get_profile("paper")), *doctor.weights(get_profile("paper"))} <= {*lines}
    assert not {*doctor.compiling(get_profile("paper"))} & {*doctor.examine(store.ROOT, get_profile("micro"))}


# ---------------------------------------------------------------------------------------------- the paper's scale
TEACH = ("--base-url", "http://127.0.0.1:9/v1", "--model", "teacher")


@pytest.mark.parametrize(
    "words, said",
    [
        (("data",), "comes with the project"),
        (("teach", *TEACH), "is for colab and paper"),
        (("run", "--dry-run"), "for the profiles colab and paper"),
        (("sft", "--dry-run"), "for the profiles colab and paper"),
        (("grpo", "--profile", "huge"), "There is no profile 'huge'"),
        (("plan", "--profile", "huge"), "There is no profile 'huge'"),
        (("eval", "--profile", "paper"), "ivt data --profile paper"),
        (("sft", "--profile", "paper"), "ivt data --profile paper"),
        (("grpo", "--profile", "paper"), "adapters/sft is not in"),
        (("mirage", "--profile", "paper"), "ivt data --profile paper"),
        (("teach", "--profile", "paper", *TEACH), "ivt data --profile paper"),
    ],
)
def test_what_the_papers_scale_lacks_is_one_sentence(words, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(records, "HUB", tmp_path / "hub")
    where = [] if words[0] in ("data", "plan") else ["--run-dir", str(tmp_path / "run")]
    assert main([*words, *where]) == 2
    assert said in one_sentence(capsys)


def test_a_plan_is_printed(capsys):
    assert main(["plan", "--profile", "colab"]) == 0
    assert "Memory in GB" in capsys.readouterr().out


def test_a_teacher_writes_the_traces_once(tmp_path, capsys, monkeypatch):
    """The command around `vlm_teacher.teach`: the harvest's errors go in, the stage that notebook 2 reads comes out."""
    profile = replace(get_profile("smoke"), name="paper", train=6)
    monkeypatch.setattr(type(profile), "hub_student", property(lambda self: True))
    monkeypatch.setattr(sys.modules["ivt_utils.profiles"], "get_profile", lambda name: profile)
    truth, wrong = [100.0, 100.0, 300.0, 300.0], {"text": "", "box": [100, 100, 300, 200]}
    kept = {"image_id": "i", "subset": "s", "expression": "e", "truth": truth, "steps": [wrong]}
    monkeypatch.setattr(pipeline, "own_answers", lambda run, train: [{"id": train[0]["id"], **kept}])

    def teach(rollouts, records, profile, **ask):
        assert (ask["model"], ask["base_url"]) == ("teacher", "http://127.0.0.1:9/v1") and len(records) == 6
        return [{**r, "steps": r["steps"] * 3, "teacher": ask["model"], "stood_in": 1} for r in rollouts]

    monkeypatch.setattr(vlm_teacher, "teach", teach)
    run_dir = tmp_path / "run"
    assert main(["teach", "--profile", "paper", *TEACH, "--run-dir", str(run_dir)]) == 2
    assert "run ivt eval first" in one_sentence(capsys)
    store.Run(profile, 0, run_dir).rollouts("train_step0", lambda: [{"id": "answered"}])
    assert main(["teach", "--profile", "paper", *TEACH, "--run-dir", str(run_dir)]) == 0
    said = capsys.readouterr().out
    assert "2 traces for 1 rollouts" in said and "2 traces, 1 of them by the geometric teacher" in said
    (made,) = [json.loads(line) for line in (run_dir / "rollouts" / "trajectories.jsonl").open()]
    assert made["teacher"] == "teacher" and len(made["steps"]) == 3
    assert main(["teach", "--profile", "paper", *TEACH, "--run-dir", str(run_dir)]) == 2
    assert "has its trajectories already" in one_sentence(capsys)


def test_doctor_asks_for_the_bitsandbytes_of_the_project(card, monkeypatch):
    assert f'"bitsandbytes=={doctor.BITSANDBYTES}"' in (execute.PROJECT / "pyproject.toml").read_text()
    card(True, "13.0", "13.0")
    for there, missing in ((None, True), ("0.45.0", True), (doctor.BITSANDBYTES, False)):
        monkeypatch.setattr(doctor, "installed", lambda name, there=there: there)
        lines = [text for tag, text in doctor.gpu(get_profile("paper")) if tag == doctor.MISS]
        assert any("bitsandbytes" in text for text in lines) == missing

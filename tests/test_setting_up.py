"""The first cell of the notebooks: what it finds, fetches and installs, when it asks for a restart, and the badges."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import packaging
import pytest
import yaml
from packaging.requirements import Requirement

from ivt_utils import cli
from ivt_utils.course import setting_up
from ivt_utils.course.execute import find_notebooks
from ivt_utils.course.setting_up import (
    NotReady,
    badge_links,
    badges,
    name_repository,
    needed,
    readme_badges,
    ready,
    repository,
    setup_cell,
)
from ivt_utils.runtime.files import ROOT

ADDRESS = "https://github.com/someone/course"
NOTEBOOKS = find_notebooks(ROOT / "notebooks")
# What Colab's GPU runtime had in June 2026 of what the course asks for (googlecolab/backend-info, pip-freeze.gpu.txt).
COLAB = {
    "accelerate": "1.13.0",
    "anywidget": "0.9.21",
    "datasets": "4.0.0",
    "huggingface_hub": "1.17.0",
    "ipykernel": "6.17.1",
    "ipywidgets": "7.7.1",
    "matplotlib": "3.10.0",
    "nbclient": "0.10.4",
    "nbformat": "5.10.4",
    "numpy": "2.0.2",
    "packaging": "26.2",
    "pandas": "2.2.2",
    "peft": "0.19.1",
    "pillow": "11.3.0",
    "psutil": "5.9.5",
    "pyarrow": "18.1.0",
    "safetensors": "0.7.0",
    "scipy": "1.16.3",
    "tokenizers": "0.22.2",
    "torch": "2.11.0+cu128",
    "torchvision": "0.26.0+cu128",
    "tqdm": "4.67.3",
    "transformers": "5.9.0",
}


# ------------------------------------------------------------------------------------------------ cell and badges
def test_the_repository_is_named_in_one_place():
    assert repository().startswith("https://")
    named = [
        path
        for pattern in ("ivt_utils/**/*.py", "tests/*.py", "Makefile", ".binder/*", ".ci/*", "*.toml")
        for path in ROOT.glob(pattern)
        if repository() in path.read_text(encoding="utf-8")
    ]
    assert named == [ROOT / "pyproject.toml"]


def test_the_cell_is_short_and_says_what_it_does():
    cell = setup_cell(ADDRESS)
    assert len(cell.splitlines()) <= 20 and max(map(len, cell.splitlines())) <= 120
    assert cell.startswith("#") and "again is safe" in cell and f'"{ADDRESS}"' in cell and 'REPOSITORY",' in cell
    imported = [node for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert "torch" not in {name.name for node in imported for name in node.names}


@pytest.mark.parametrize("notebook", [path.name for path in NOTEBOOKS])
def test_each_badge_opens_a_file_of_the_repository(notebook):
    links = badge_links(notebook, ADDRESS)
    paths = {
        "colab": links["colab"].removeprefix("https://colab.research.google.com/github/someone/course/blob/main/"),
        "kaggle": links["kaggle"].removeprefix(f"https://kaggle.com/kernels/welcome?src={ADDRESS}/blob/main/"),
        "binder": unquote(links["binder"].removeprefix("https://mybinder.org/v2/gh/someone/course/main?labpath=")),
    }
    assert all((ROOT / path).is_file() for path in paths.values()) and set(paths.values()) == {f"notebooks/{notebook}"}
    assert links == badge_links(notebook.removesuffix(".ipynb"), ADDRESS + ".git")


@pytest.mark.parametrize("folder, images", [("notebooks", "../docs/badges"), (".", "docs/badges")])
def test_a_badge_is_a_picture_of_ours_whose_title_is_its_alt_text(folder, images):
    line = badges("01_self_correction_gap", ADDRESS, images=images)
    found = re.findall(r"\[!\[([^]]+)\]\(([^)]+)\)\]\((https://[^)]+)\)", line)
    assert len(found) == 3 and "\n" not in line
    for alt, image, _ in found:
        picture = ElementTree.parse(ROOT / folder / image).getroot()
        assert picture.find("{http://www.w3.org/2000/svg}title").text == alt


def test_without_github_there_are_no_badges_and_a_reason():
    line = badges("01_self_correction_gap", "https://git.example.org/course")
    assert badge_links("01", "https://git.example.org/course") == {}
    assert line.startswith("<!--") and "https://git.example.org/course" in line and "](" not in line


def test_the_readme_has_badges_or_the_one_command_that_makes_them(tmp_path):
    assert readme_badges("01", ADDRESS) == badges("01", ADDRESS, "docs/badges") + "\n"
    how = readme_badges("01", "https://example.org/course")
    assert "](" not in how and "<!--" not in how
    command = re.search(r"`ivt (.+)`", how)[1].split()
    address = cli.parser().parse_args(command).repository
    assert len(badge_links("01", address)) == 3
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    name_repository(address, tmp_path)
    assert repository(tmp_path) == address
    before, after = ((folder / "pyproject.toml").read_text().splitlines() for folder in (ROOT, tmp_path))
    assert len([None for old, new in zip(before, after, strict=True) if old != new]) == 1


@pytest.mark.parametrize("address", ["you/course", 'https://github.com/"', "https://github.com", "git@github.com:a/b"])
def test_what_is_no_address_is_refused_and_not_written(address, tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with pytest.raises(ValueError, match="is no address of a repository, such as https://github.com/you"):
        name_repository(address, tmp_path)
    assert (tmp_path / "pyproject.toml").read_bytes() == (ROOT / "pyproject.toml").read_bytes()


def test_an_address_goes_with_the_notebooks_alone(capsys):
    assert cli.main(["build", "docs", "--repository", ADDRESS]) == 2
    assert "--repository goes with ivt build notebooks" in capsys.readouterr().err


def test_binder_gets_what_conda_gets_with_a_cpu_only_torch():
    names = ("environment.yml", ".binder/environment.yml")
    conda, binder = (yaml.safe_load((ROOT / name).read_text()) for name in names)
    ours, theirs = (entry["dependencies"].pop()["pip"] for entry in (conda, binder))
    assert conda == binder
    assert theirs[0] == "--extra-index-url https://download.pytorch.org/whl/cpu"
    moved = [line.replace("../", "").replace("..", ".") for line in theirs[1:]]  # pip runs in the folder of the file
    assert moved == ours


# ------------------------------------------------------------------------------------------------ what is needed
def test_only_a_computer_with_an_nvidia_card_needs_the_extra_gpu(monkeypatch):
    found = {}
    monkeypatch.setattr(setting_up.shutil, "which", found.get)
    assert "bitsandbytes" not in {want.name for want in needed(ROOT)}
    found["nvidia-smi"] = "/usr/bin/nvidia-smi"
    assert "bitsandbytes" in {want.name for want in needed(ROOT)}


def test_colab_keeps_its_torch_and_its_front_end(monkeypatch):
    monkeypatch.setattr(setting_up, "installed", COLAB.get)
    lacking = {want.name for want in needed(ROOT) if not setting_up.suits(want)}
    assert {"trl", "peft", "transformers", "datasets"} <= lacking
    kept = {
        "torch",
        "torchvision",
        "numpy",
        "pandas",
        "matplotlib",
        "scipy",
        "pillow",
        "psutil",
        "ipywidgets",
        "ipykernel",
        "jupyterlab",
    }
    assert not kept & lacking


def test_here_everything_is_there_and_torch_stays_unloaded():
    code = (
        "import sys, time; from ivt_utils.course.setting_up import ready; "
        "t = time.process_time(); ready(); ready(); "
        "print('torch' in sys.modules, time.process_time() - t < 1)"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == ["The course is ready: all its packages are there, nothing was installed."] * 2 + [
        "False True"
    ]


def test_another_python_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setattr(setting_up, "PYTHONS", ((3, 98), (3, 99)))
    with pytest.raises(NotReady, match="3.98 or newer.*another kernel") as caught:
        ready()
    assert caught.value._render_traceback_() == [str(caught.value)]


def test_a_package_without_its_project_says_so(tmp_path):
    with pytest.raises(NotReady, match="git clone"):
        ready(tmp_path)


# ------------------------------------------------------------------------------------------------ what pip is asked
@pytest.fixture
def pip(monkeypatch):
    """A stand-in for pip: it fails with each of `answers` in turn, then does well; `asked` keeps its arguments."""

    class Pip:
        answers, asked, kept, there = [], [], [], {}

        def run(self, words, **_):
            self.asked.append(words[words.index("install") + 1 :])
            constraints = next(word for word in words if word.startswith("--constraint="))
            self.kept.append(Path(constraints.removeprefix("--constraint=")).read_text().split())
            if self.answers:
                return subprocess.CompletedProcess(words, 1, "", self.answers.pop(0))
            self.there.update({Requirement(w).name: "2.0" for w in words if not w.startswith("-") and "==" in w})
            return subprocess.CompletedProcess(words, 0, "", "")

    fake = Pip()
    fake.answers, fake.asked, fake.kept, fake.there = [], [], [], {"torch": "2.11.0+cu128", "numpy": "9.9"}
    monkeypatch.setattr(setting_up.subprocess, "run", fake.run)
    monkeypatch.setattr(setting_up, "installed", fake.there.get)
    return fake


@pytest.fixture
def folder(tmp_path):
    """A project that needs one package, locked at 2.0."""
    write_project(tmp_path, ["tiny>=1,<3"])
    return tmp_path


def write_project(folder: Path, dependencies: list[str]) -> None:
    (folder / "pyproject.toml").write_text(
        f"[project]\ndependencies = {json.dumps(dependencies)}\n[project.optional-dependencies]\ngpu = []\n"
    )
    (folder / "requirements.lock").write_text("tiny==2.0\npulled-in==3.1\nnumpy==1.1\n")


def test_missing_packages_come_in_the_locks_version_and_torch_is_held(pip, folder):
    """So does what they pull in; what is there already stays as it is, torch above all."""
    setting_up.install([Requirement("tiny>=1,<3")], folder)
    assert len(pip.asked) == 1 and pip.asked[0][-1] == "tiny==2.0"
    assert pip.kept == [["torch==2.11.0+cu128", "numpy==9.9", "pulled-in==3.1"]]


def test_when_the_locks_version_does_not_fit_any_of_the_range_will_do(pip, folder):
    pip.answers = ["ERROR: ResolutionImpossible: for help visit"]
    pip.there["tiny"] = "1.5"
    setting_up.install([Requirement("tiny>=1,<3")], folder)
    assert [words[-1] for words in pip.asked] == ["tiny==2.0", "tiny<3,>=1"]
    assert "pulled-in==3.1" in pip.kept[0] and "pulled-in==3.1" not in pip.kept[1]


def test_no_network_is_said_in_one_sentence_and_not_tried_twice(pip, folder):
    pip.answers = ["WARNING: Retrying after connection broken by 'NewConnectionError'\nERROR: No matching distribution"]
    with pytest.raises(NotReady, match="No package index answers.*tiny.*network on"):
        setting_up.install([Requirement("tiny>=1,<3")], folder)
    assert len(pip.asked) == 1


def test_a_failure_of_pip_is_told_with_its_last_error(pip, folder):
    pip.answers = ["ERROR: one\nERROR: No space left on device\nnote: more"] * 2
    with pytest.raises(NotReady, match="could not install tiny: ERROR: No space left on device. See README"):
        setting_up.install([Requirement("tiny>=1,<3")], folder)


# ------------------------------------------------------------------------------------------------ with the real pip
@pytest.fixture(scope="module")
def python(slow, tmp_path_factory):
    """A bare Python with pip and `packaging`, and wheels of a package `tiny` on the disk for an index."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder / "venv", with_pip=True, symlinks=True)
    (folder / "lent").mkdir()
    (folder / "lent" / "packaging").symlink_to(Path(packaging.__file__).parent)
    (next((folder / "venv").rglob("site-packages")) / "lent.pth").write_text(str(folder / "lent"))
    for version in ("1.0", "2.0"):
        write_wheel(folder, version)

    def run(code: str, cwd: Path = folder, **environment) -> subprocess.CompletedProcess:
        mine = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(folder),
            "PIP_CONFIG_FILE": os.devnull,
        }
        return subprocess.run(
            [folder / "venv" / "bin" / "python", "-c", code],
            cwd=cwd,
            capture_output=True,
            text=True,
            env=mine | environment,
        )

    return run


def write_wheel(folder: Path, version: str) -> None:
    """Write a wheel of `tiny`: one module, the least metadata."""
    info = f"tiny-{version}.dist-info"
    files = {
        "tiny.py": f"version = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"tiny-{version}-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)


READY = "from ivt_utils.course.setting_up import ready; from pathlib import Path; ready(Path.cwd())"


@pytest.mark.parametrize("before, loads, restart", [(None, False, False), ("1.0", False, False), ("1.0", True, True)])
def test_a_restart_is_needed_exactly_when_a_loaded_package_changed(python, tmp_path, before, loads, restart):
    write_project(tmp_path, ["tiny>=2"])
    python(
        "import subprocess, sys; pip = [sys.executable, '-m', 'pip', '-q']; "
        "subprocess.run([*pip, 'uninstall', '-y', 'tiny']); "
        f"{before is not None} and subprocess.check_call([*pip, 'install', 'tiny=={before}'])"
    )
    again = "\ntry: ready(Path.cwd())\nexcept RuntimeError as error: print(error)"
    code = ("import tiny\n" if loads else "") + READY.replace("; ready(Path.cwd())", "") + again + again
    out = python(code, tmp_path, PYTHONPATH=str(ROOT))
    lines = out.stdout.splitlines()
    assert lines[0] == "Installing tiny: this may take some minutes."
    if restart:
        assert len(lines) == 3 and lines[1] == lines[2]  # also when the cell is run again without the restart
        assert lines[1].startswith("Restart needed: this kernel has loaded tiny 1.0 (now 2.0).")
    else:
        was = f"was {before}" if before else "was missing"
        assert lines[1] == f"The course is ready: installed tiny 2.0 ({was})."
        assert lines[2] == "The course is ready: all its packages are there, nothing was installed."


def test_the_real_pip_failing_is_told_in_one_sentence(python, tmp_path):
    write_project(tmp_path, ["unheard>=1"])
    out = python(READY, tmp_path, PYTHONPATH=str(ROOT))
    assert "NotReady: pip could not install unheard: ERROR: No matching distribution found for unheard" in out.stderr


# ------------------------------------------------------------------------------------------------ the cell, run
@pytest.fixture
def package(tmp_path):
    """A stand-in for the course's clone, whose `ready` says where it lies."""
    (tmp_path / "clone" / "ivt_utils" / "course").mkdir(parents=True)
    (tmp_path / "clone" / "ivt_utils" / "profiles.py").touch()
    (tmp_path / "clone" / "ivt_utils" / "course" / "setting_up.py").write_text(
        "from pathlib import Path\ndef ready():\n    print(Path(__file__).parents[2])\n"
    )
    return tmp_path / "clone"


def test_the_cell_finds_the_course_above_it(python, package):
    (package / "notebooks" / "mine").mkdir(parents=True)
    out = python(setup_cell(ADDRESS), package / "notebooks" / "mine", IVT_REPOSITORY="file:///nowhere")
    assert out.stdout.split() == [str(package)], out.stderr


def test_the_cell_clones_once_and_uses_that_clone_again(python, package, tmp_path):
    author = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "-A"], [*author, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *words], cwd=package, check=True)
    work = tmp_path / "work"
    work.mkdir()
    for source in (f"file://{package}", "file:///nowhere"):
        out = python(setup_cell(ADDRESS), work, IVT_REPOSITORY=source)
        assert out.stdout.split() == [str(work / "ivt-course")], out.stderr


@pytest.mark.parametrize("path", [os.environ["PATH"], "/nowhere"], ids=["no such repository", "no git"])
def test_the_cell_that_cannot_clone_says_what_to_do(python, tmp_path, path):
    out = python(setup_cell(ADDRESS), tmp_path, IVT_REPOSITORY="file:///nowhere", PATH=path)
    assert out.returncode == 1 and "Traceback" not in out.stderr
    assert "git could not fetch file:///nowhere. Is the network on" in out.stderr
    assert not (tmp_path / "ivt-course").exists()


def test_loaded_packages_are_found_fast():
    started = time.perf_counter()
    assert "packaging" in setting_up.loaded()
    assert time.perf_counter() - started < 3


def test_the_hook_of_setuptools_is_not_setuptools():
    """Every Python with setuptools loads the hook at its start, and many packages bring another setuptools."""
    code = "import _distutils_hack; from ivt_utils.course.setting_up import loaded; print('setuptools' in loaded())"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout == "False\n"

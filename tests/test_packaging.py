"""The files that install the course agree with each other, and `make` does with them what the README says."""

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from ivt_utils.runtime import files, store

PROJECT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text())
LOCK_LINES = [line for line in (PROJECT / "requirements.lock").read_text().splitlines() if line and line[0] != "#"]
LOCK = {canonicalize_name(want.name): want for want in map(Requirement, LOCK_LINES)}
CONDA = yaml.safe_load((PROJECT / "environment.yml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]


needs_make = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
needs_git = pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
AUTHOR = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]


def pinned(name):
    return str(LOCK[canonicalize_name(name)].specifier).removeprefix("==")


@pytest.mark.parametrize("dependency", [*PYPROJECT["project"]["dependencies"], *EXTRAS["test"], *EXTRAS["book"]])
def test_dependency_is_locked_within_its_range(dependency):
    want = Requirement(dependency)
    assert want.specifier.contains(pinned(want.name)), f"{dependency} against {pinned(want.name)}"


def test_lock_is_exact_and_says_each_package_once():
    names = [canonicalize_name(Requirement(line).name) for line in LOCK_LINES]
    assert len(names) == len(set(names))
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+( ; .+)?", line) for line in LOCK_LINES)


@needs_make
def test_lock_says_in_its_head_how_it_is_made_and_make_does_so():
    head = [line for line in (PROJECT / "requirements.lock").read_text().splitlines() if line.startswith("#")]
    command = next(line.strip("# ") for line in head if "pip compile" in line)
    assert "--universal --python-version 3.11 " in command  # a resolver that knows 3.11.0
    told = make(PROJECT, "-n", "lock").stdout
    assert command.split() == told[told.index("uv pip") :].replace("\\\n", "").split()


# ---------------------------------------------------------------------------------------------- every Python
FIRST = ("3.11.0", "3.12.0", "3.13.0")  # of every minor release that the README names, the first patch release


def environments(version: str) -> list[dict]:
    """The values of markers in a Python of this version, on Linux and on a Mac."""
    here = default_environment()
    systems = {"Linux": ("linux", "x86_64"), "Darwin": ("darwin", "arm64")}
    return [
        here
        | {
            "python_full_version": version,
            "python_version": version.rpartition(".")[0],
            "os_name": "posix",
            "implementation_version": version,
            "platform_system": name,
            "sys_platform": platform,
            "platform_machine": machine,
        }
        for name, (platform, machine) in systems.items()
    ]


def misfits(lock, requires_python, versions=FIRST) -> list[str]:
    """The packages of a lock that some Python cannot have: {name: Requirement}, and `requires_python(name)`."""
    return [
        f"{name} {want.specifier} wants Python {asked}, which {version} is not"
        for name, want in lock.items()
        for version in versions
        if any(want.marker is None or want.marker.evaluate(values) for values in environments(version))
        and (asked := requires_python(name))
        and not SpecifierSet(asked).contains(version)
    ]


def test_the_readme_names_the_pythons_that_are_tested():
    named = re.search(r"Python (3\.\d+) to (3\.\d+)", (PROJECT / "README.md").read_text())
    assert (named[1], named[2]) == (FIRST[0].rpartition(".")[0], FIRST[-1].rpartition(".")[0])
    allowed = SpecifierSet(PYPROJECT["project"]["requires-python"])
    minors = [f"3.{minor}.0" for minor in range(5, 30) if f"3.{minor}.0" in allowed]
    assert tuple(minors) == FIRST


def test_every_locked_release_accepts_every_python_of_the_readme():
    """Read in the metadata of what is installed. What is not is for another system or Python, by its marker."""
    here = [name for name, want in LOCK.items() if want.marker is None or want.marker.evaluate()]
    there = {name: store.installed(name) for name in here}
    if wrong := [name for name, version in there.items() if version is None or version.split("+")[0] != pinned(name)]:
        pytest.skip(f"not the lock's versions are installed here, but others or none, of {', '.join(wrong)}")
    assert len(here) > 170
    there = {name: metadata.metadata(name) for name in here}
    assert not misfits({name: LOCK[name] for name in here}, lambda name: there[name].get("Requires-Python"))


def test_a_release_that_begins_at_a_later_patch_is_found():
    """What happened: soupsieve 4.1.2 wants 3.11.5, and Debian 12 has 3.11.2."""
    lock = {
        line.split("==")[0]: Requirement(line)
        for line in (
            "soupsieve==4.1.2",
            "late==1 ; python_full_version >= '3.12'",
            "apple==1 ; sys_platform == 'darwin'",
            "old==1",
        )
    }
    wants = {"soupsieve": ">=3.11.5", "late": ">=3.12", "apple": ">=3.13", "old": None}
    assert [line.split()[0] for line in misfits(lock, wants.get)] == ["soupsieve", "apple", "apple"]
    assert misfits(lock, wants.get, ("3.11.2",))[0].startswith("soupsieve ==4.1.2 wants Python >=3.11.5, which 3.11.2")


@pytest.mark.slow
def test_a_resolver_finds_the_lock_whole_for_every_python():
    """The index is asked about the releases that no Python here has installed, too."""
    if not (uv := shutil.which("uv")):
        pytest.skip("uv is not installed here")
    for version in FIRST:
        done = subprocess.run(
            [uv, "pip", "compile", "--quiet", "--no-deps", "--python-version", version, "requirements.lock"],
            cwd=PROJECT,
            capture_output=True,
            text=True,
        )
        if any(sign in done.stderr for sign in ("error sending request", "dns error", "network was disabled")):
            pytest.skip("no package index answers")
        assert done.returncode == 0, done.stderr


def test_lock_does_not_force_cuda_on_a_cpu_only_torch():
    assert not [name for name in LOCK if re.match(r"nvidia|cuda|triton", name)]
    assert LOCK["torch"].specifier.contains(pinned("torch") + "+cpu")
    assert Version(pinned("torch") + "+cpu") > Version(pinned("torch"))


def test_build_backend_is_locked_for_an_install_without_isolation():
    want = Requirement(PYPROJECT["build-system"]["requires"][0])
    assert want.specifier.contains(pinned(want.name))
    assert PYPROJECT["dependency-groups"]["build"] == PYPROJECT["build-system"]["requires"]


def test_conda_installs_the_lock_and_this_package():
    pip = next(entry["pip"] for entry in CONDA["dependencies"] if isinstance(entry, dict))
    assert pip == ["-r requirements.lock", "-e ."]


def test_python_versions_agree():
    allowed = SpecifierSet(PYPROJECT["project"]["requires-python"])
    conda = next(d for d in CONDA["dependencies"] if isinstance(d, str) and d.startswith("python="))
    assert allowed.contains(conda.split("=")[1] + ".0")
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py311" and "3.11.0" in allowed
    makefile = (PROJECT / "Makefile").read_text()
    for version in re.findall(r"python3\.(\d+)", makefile):
        assert allowed.contains(f"3.{version}.0")
    from ivt_utils.course import doctor

    low, high = (".".join(map(str, pair)) for pair in doctor.PYTHONS)
    assert PYPROJECT["project"]["requires-python"] == f">={low},<{high}"


def test_version_is_said_once():
    import ivt_utils

    assert "version" not in PYPROJECT["project"] and PYPROJECT["project"]["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "ivt_utils.__version__"}
    assert f"\n## {ivt_utils.__version__} " in (PROJECT / "CHANGELOG.md").read_text()
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text())
    assert "version" not in citation and citation["license"] == "Apache-2.0"
    assert any("2606.13156" in entry["url"] for entry in citation["references"])


def test_the_workflow_tests_every_python_and_knows_no_secret():
    text = (PROJECT / ".github" / "workflows" / "test.yml").read_text()
    matrix = yaml.safe_load(text)["jobs"]["test"]["strategy"]["matrix"]
    assert [f"{version}.0" for version in matrix["python"]] == list(FIRST)
    assert "run: make test" in text and "secrets" not in text


def test_the_hooks_are_the_projects_own_ruff():
    repos = yaml.safe_load((PROJECT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    assert all(hook["language"] == "system" for hook in repos[0]["hooks"])
    assert [hook["entry"].split()[:2] for hook in repos[0]["hooks"]] == [
        [".venv/bin/ruff", "check"],
        [".venv/bin/ruff", "format"],
    ]


@pytest.mark.parametrize("name", ["requirements.lock", "environment.yml", "pyproject.toml"])
def test_no_direct_url_and_no_path_of_a_machine(name):
    text = (PROJECT / name).read_text()
    if name == "pyproject.toml":  # the one place that names the repository
        table = re.search(r"^\[project\.urls\]\nRepository = .*\n(?=\n\[)", text, re.MULTILINE)
        text = text.replace(table[0], "")
    said = "\n".join(line.split("#")[0] for line in text.splitlines())
    assert not re.search(r"://| @ |(^|[\s\"'=])/\w|file:", said)


def test_license_is_apache():
    text = (PROJECT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert re.search(r"Copyright \d{4} The IVT course authors", text)


def test_import_is_light():
    code = (
        "import time, sys; t = time.perf_counter(); import ivt_utils, ivt_utils.cli; "
        "print(time.perf_counter() - t, 'torch' in sys.modules, 'papermill' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    seconds, torch, papermill = out.stdout.split()
    assert (torch, papermill) == ("False", "False")
    assert float(seconds) < 3


# ---------------------------------------------------------------------------------------------- make
def make(folder, *words, **environment):
    """Runs make in a nearly empty environment."""
    bare = {
        "PATH": f"{folder}:/usr/bin:/bin",
        "HOME": str(folder),
        "LANG": "C",
        "TERM": "dumb",
        **environment,
    }
    return subprocess.run(["make", *words], cwd=folder, capture_output=True, text=True, env=bare)


@needs_make
def test_make_has_its_targets():
    for target, said in {
        "setup": "-r requirements.lock",
        "course": ".venv/bin/ivt run --profile micro",
        "check": '-m "not slow"',
        "test": ".venv/bin/python -m pytest",
        "lab": "jupyter lab",
        "book": "sphinx-build",
        "bundle": "pip --disable-pip-version-check --no-input wheel",
        "clean": "rm -rf .venv",
        "help": "make course",
    }.items():
        assert said in make(PROJECT, "-nB", target).stdout  # -B: also where the set-up is done already
    assert "--profile smoke" in make(PROJECT, "-n", "course", "PROFILE=smoke").stdout
    assert "make test" in (PROJECT / ".ci" / "run").read_text()


@pytest.fixture
def stage(tmp_path):
    """A folder with our Makefile and a stand-in for Python that notes what it is asked to do."""
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(PROJECT / name, tmp_path)
    fake = tmp_path / "python3.11"
    fake.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> {tmp_path}/asked\n'
        'case "$*" in\n'
        f'  "-m venv"*) mkdir -p .venv/bin; cp {fake} .venv/bin/python;;\n'
        '  *"install -r requirements.lock"*) exit ${PIP_RESULT:-0};;\n'
        "esac\n"
    )
    fake.chmod(0o755)
    return tmp_path


def installs(stage):
    return [line for line in (stage / "asked").read_text().splitlines() if " install " in line]


@needs_make
def test_setup_installs_once_and_again_when_the_lock_changes(stage):
    first = make(stage, "setup")
    assert first.returncode == 0, first.stderr
    assert "3 GB" in first.stdout and "6.4 GB" in first.stdout
    assert len(installs(stage)) == 2 and "-m venv --clear .venv" in (stage / "asked").read_text()
    make(stage, "setup")
    assert len(installs(stage)) == 2
    later = time.time() + 5
    os.utime(stage / "requirements.lock", (later, later))
    make(stage, "setup")
    assert len(installs(stage)) == 4
    assert (stage / "asked").read_text().count("-m venv") == 1  # the environment itself stays


@needs_make
def test_setup_that_failed_is_taken_up_again(stage):
    assert make(stage, "setup", PIP_RESULT="1").returncode != 0
    assert make(stage, "setup").returncode == 0
    assert (stage / "asked").read_text().count("-m venv") == 1


@needs_make
def test_cpu_only_torch_comes_from_its_own_index_first(stage):
    assert make(stage, "setup", "TORCH_INDEX=https://example.org/cpu").returncode == 0
    first, second, third = installs(stage)
    assert "--index-url https://example.org/cpu" in first and "--index-url" not in second + third
    wanted = (stage / ".venv" / "torch.txt").read_text().split()
    assert wanted == [f"torch=={pinned('torch')}", f"torchvision=={pinned('torchvision')}"]


@needs_make
def test_without_a_suitable_python_one_sentence_says_so(stage):
    out = make(stage, "setup", "PYTHON=/nowhere/python3.9")
    assert out.returncode != 0 and "/nowhere/python3.9" in out.stderr and "PYTHON=" in out.stderr


@needs_make
def test_a_python_that_does_not_fit_is_told_by_its_version_before_anything_is_downloaded(stage):
    old = stage / "python3"
    old.write_text('#!/bin/sh\ncase "$*" in --version) echo Python 3.10.12;; "-c ") ;; *) exit 1;; esac\n')
    old.chmod(0o755)
    out = make(stage, "setup", "PYTHON=python3")
    assert out.returncode != 0 and "needs Python 3.11, 3.12 or 3.13" in out.stderr
    assert "python3 is Python 3.10.12." in out.stderr and not (stage / "asked").exists()
    bare = stage / "python3.12"
    bare.write_text('#!/bin/sh\ncase "$*" in --version) echo Python 3.12.3;; *ensurepip*) exit 1;; esac\n')
    bare.chmod(0o755)
    out = make(stage, "setup", "PYTHON=python3.12")
    assert out.returncode != 0 and "python3.12 lacks venv or ensurepip (Debian: python3-venv)." in out.stderr
    (stage / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(old, stage / ".venv" / "bin" / "python")
    out = make(stage, "setup")
    assert out.returncode != 0 and ".venv holds Python 3.10.12" in out.stderr and "rm -r .venv" in out.stderr
    assert not (stage / "asked").exists()


@needs_make
def test_the_lock_needs_uv_and_says_so(stage):
    out = make(stage, "lock", "UV=")
    assert out.returncode != 0 and "make lock needs uv" in out.stderr


@needs_make
def test_uv_installs_where_it_is_there(stage):
    uv = stage / "uv"
    uv.write_text(f'#!/bin/sh\necho "uv $@" >> {stage}/asked\n')
    uv.chmod(0o755)
    out = make(stage, "setup", "TORCH_INDEX=https://example.org/cpu")
    assert out.returncode == 0 and "with uv" in out.stdout
    first, second, third = installs(stage)
    ours = "uv pip install --python .venv/bin/python "
    assert make(stage, "setup", "-B", "UV=").returncode == 0  # unless it is not wanted, or pip was told of an index
    assert make(stage, "setup", "-B", PIP_INDEX_URL="https://example.org/simple").returncode == 0
    assert not [line for line in installs(stage)[3:] if line.startswith("uv")] and len(installs(stage)) == 7
    assert first == f"{ours}--no-deps --index-url https://example.org/cpu -r .venv/torch.txt"
    assert second == f"{ours}-r requirements.lock" and third == f"{ours}--no-deps --no-build-isolation -e ."


@needs_git
def test_a_clone_has_the_same_bytes_whatever_git_does_to_line_ends(tmp_path):
    """With autocrlf, Windows' usual setting, every checksum over a text failed."""
    for name in (".gitattributes", "data/student/manifest.json", "data/student/tokenizer.json", "LICENSE"):
        (tmp_path / "here" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, tmp_path / "here" / name)
    for words in (["init", "-q"], ["add", "-A"], [*AUTHOR, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path / "here", check=True)
    subprocess.run(["git", "clone", "-q", "-c", "core.autocrlf=true", "here", "there"], cwd=tmp_path, check=True)
    assert files.intact(tmp_path / "there" / "data" / "student" / "tokenizer.json")
    assert (tmp_path / "there" / "LICENSE").read_bytes() == (PROJECT / "LICENSE").read_bytes()


@needs_git
def test_every_file_of_the_project_is_known_as_text_with_lf_or_as_binary():
    if store.commit() is None:
        pytest.skip("not a git clone")
    git = ["git", "-C", PROJECT, "ls-files", "--eol"]
    lines = subprocess.run(git, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) > 200
    for line in lines:
        about, name = line.split("\t")
        if name.endswith((".parquet", ".png", ".safetensors")):
            assert "i/-text" in about and "attr/-text" in about, line
        else:  # none: a text of one line without its end
            assert ("i/lf" in about or "i/none" in about) and "eol=lf" in about, line


# ---------------------------------------------------------------------------------------------- the offline bundle
@pytest.fixture
def clone(stage):
    """The stage as a git clone; its Python names the bundle, and makes a wheel when asked for wheels."""
    fake = stage / "python3.11"
    answers = (
        '  *sysconfig*) echo ivt-course-1-here-py311;;\n  *"import sys; print"*) echo 3.11;;\n'
        '  *" wheel "*) touch build/ivt-course-1-here-py311/wheels/one.whl; exit ${WHEEL_RESULT:-0};;\n'
    )
    fake.write_text(fake.read_text().replace('case "$*" in\n', f'case "$*" in\n{answers}'))
    (stage / ".gitignore").write_text("build/\n.venv/\npython3.11\nasked\n")
    for words in (["init", "-q"], ["add", "-A"], [*AUTHOR, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *words], cwd=stage, check=True)
    return stage


@needs_make
def test_a_bundle_holds_the_committed_project_its_wheels_and_how_to_start(clone, tmp_path_factory):
    (clone / "not_committed.txt").write_text("")
    out = make(clone, "bundle")
    assert out.returncode == 0, out.stderr
    assert "about 3 GB" in out.stdout and "Made build/ivt-course-1-here-py311.tar" in out.stdout
    assert [path.name for path in (clone / "build").iterdir()] == ["ivt-course-1-here-py311.tar"]
    unpacked = tmp_path_factory.mktemp("unpacked")
    subprocess.run(["tar", "-xf", clone / "build" / "ivt-course-1-here-py311.tar", "-C", unpacked], check=True)
    folder = unpacked / "ivt-course-1-here-py311"
    names = {"Makefile", "requirements.lock", "pyproject.toml", ".gitignore", "wheels", "START.txt"}
    assert {path.name for path in folder.iterdir()} == names and list((folder / "wheels").glob("*.whl"))
    start = (folder / "START.txt").read_text()
    assert "make setup WHEELS=wheels PYTHON=python3.11" in start
    shutil.copy(clone / "python3.11", folder)
    assert make(folder, "setup", "WHEELS=wheels").returncode == 0
    made = installs(clone)[-2]  # the stand-in keeps writing to the first folder
    assert "install -r requirements.lock --no-index --find-links wheels" in made


@needs_make
def test_a_bundle_with_a_cpu_only_torch_asks_its_index_first(clone):
    assert make(clone, "bundle", "TORCH_INDEX=https://example.org/cpu").returncode == 0
    first, second = [line for line in (clone / "asked").read_text().splitlines() if " wheel " in line]
    assert "--no-deps --index-url https://example.org/cpu" in first and "--index-url" not in second
    assert "-r build/ivt-course-1-here-py311/requirements.lock" in second and "--find-links build" in second


@needs_make
def test_a_bundle_that_fails_leaves_no_tar(clone):
    assert make(clone, "bundle", WHEEL_RESULT="1").returncode != 0
    assert not list((clone / "build").glob("*.tar"))


@needs_make
def test_outside_a_clone_and_without_wheels_one_sentence_says_so(stage):
    out = make(stage, "bundle", GIT_CEILING_DIRECTORIES=str(stage.parent))
    assert out.returncode != 0 and "in a git clone" in out.stderr
    out = make(stage, "setup", "-B", "WHEELS=nowhere")
    assert out.returncode != 0 and "no wheels in nowhere" in out.stderr


@needs_make
def test_wheels_leave_out_every_index(stage):
    (stage / "mine").mkdir()
    (stage / "mine" / "one.whl").touch()
    out = make(stage, "setup", "WHEELS=mine", "TORCH_INDEX=https://example.org/cpu")
    assert out.returncode == 0 and "without a network" in out.stdout
    first, second = installs(stage)
    assert first.endswith("install -r requirements.lock --no-index --find-links mine") and "--no-deps" in second

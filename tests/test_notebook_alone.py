"""Each notebook alone, in an empty folder, in a bare environment that has what Colab has and nothing of the course."""

import os
import shutil
import subprocess
import venv
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ivt_utils import cli
from ivt_utils.course.doctor import read_lock
from ivt_utils.course.execute import find_notebooks
from ivt_utils.course.setting_up import NO_NETWORK, repository, setup_cell
from ivt_utils.runtime.files import ROOT, ArtefactError, read_json
from ivt_utils.show.report import report_from

NOTEBOOKS = find_notebooks(ROOT / "notebooks")
COLAB = (
    "torch",
    "torchvision",
    "numpy",
    "pandas",
    "pillow",
    "matplotlib",
    "scipy",
    "pyarrow",
    "tqdm",
    "requests",
    "psutil",
    "huggingface_hub",
    "safetensors",
    "tokenizers",
    "ipykernel",
    "ipywidgets",
    "nbclient",
    "nbformat",
)
LEFT_OUT = {"trl", "peft", "anywidget", "datasets", "accelerate", "papermill", "transformers", "ivt-course"}
RUN = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
try:
    NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
finally:
    nbformat.write(notebook, sys.argv[1])
"""


def with_requirements(names) -> dict[str, metadata.Distribution]:
    """The distributions of this environment with these names, and all that they require."""
    found, todo = {}, [Requirement(name) for name in names]
    while todo:
        want = todo.pop()
        name = canonicalize_name(want.name)
        extras = [{"extra": extra} for extra in ("", *want.extras)]
        if (name in found and not want.extras) or (want.marker and not any(map(want.marker.evaluate, extras))):
            continue
        found[name] = metadata.distribution(name)
        for line in found[name].requires or []:
            further = Requirement(line)
            if not further.marker or any(map(further.marker.evaluate, extras)):
                further.marker = None
                todo.append(further)
    return found


def link(packages, folder: Path) -> None:
    """Link the packages' files into `folder`."""
    folder.mkdir(parents=True)
    for package in packages:
        base = Path(package.locate_file(""))
        for top in {file.parts[0] for file in package.files} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(base / top)


def marks(packages) -> dict:
    """When each package was last installed."""
    return {
        p.name: Path(p.locate_file(next(f for f in p.files if f.name == "RECORD"))).stat().st_mtime_ns for p in packages
    }


@pytest.fixture(scope="module")
def bare(slow, tmp_path_factory):
    """A bare environment: its folder, and what is linked there with the times of its installation.

    None where no package index answers, so that nothing can be installed into it.
    The links lie outside the environment, so pip installs beside them and never through them.
    """
    folder = tmp_path_factory.mktemp("colab")
    packages = with_requirements(COLAB)
    assert not LEFT_OUT & set(packages)
    lent = folder / "lent" / "site-packages"  # dill takes the modules of a folder of this name for installed ones
    link(packages.values(), lent)
    venv.create(folder / "venv", with_pip=True, symlinks=True)
    site = next((folder / "venv").rglob("site-packages"))
    (site / "colab.pth").write_text(f"{lent}\n")
    trl = next(str(want) for want in read_lock(ROOT / "requirements.lock") if want.name == "trl")
    words = ["-m", "pip", "install", "--dry-run", "--no-deps", "--retries=1", trl]
    asked = subprocess.run([folder / "venv" / "bin" / "python", *words], capture_output=True, text=True, env=plain())
    answers = not NO_NETWORK.search(asked.stderr)
    assert asked.returncode == 0 or not answers, asked.stderr
    yield (folder, packages, marks(packages.values())) if answers else None
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The address of a git repository of the project as it lies here, committed or not; None without git."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        yield None
        return
    folder = tmp_path_factory.mktemp("published")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    author = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "gc.auto=0"]
    for words in (["init", "-q", "-b", "main"], ["add", "-A", "-f"], [*author, "commit", "-q", "-m", "as it is here"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    yield f"file://{folder}"
    shutil.rmtree(folder)


def plain(**more) -> dict[str, str]:
    """The environment variables without those that lead to this environment or belong to a test run."""
    ours = ("PYTHON", "VIRTUAL_ENV", "JUPYTER", "IVT_", "MPL", "PYTEST", "HF_")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | more


def prepared(path: Path):
    """The notebook at smoke size with its setup cell twice, and a look at what that imported: its cells' numbers."""
    notebook = nbformat.read(path, as_version=4)
    cell = new_code_cell(setup_cell(repository()))
    first = next(i for i, c in enumerate(notebook.cells) if c.cell_type == "code")
    if "ivt_utils.course.setting_up" in notebook.cells[first].source:
        assert notebook.cells[first].source == cell.source, "run: ivt build notebooks"
        del notebook.cells[first]
    look = new_code_cell("import sys\nprint('torch' in sys.modules)")
    notebook.cells[first:first] = [cell, new_code_cell(cell.source), look]
    parameters = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    parameters.source = parameters.source.replace('PROFILE = "micro"', 'PROFILE = "smoke"')
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook, range(first, first + 3)


def said(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def starts_from_the_reference(executed: Path, run: Path) -> None:
    """Assert that a notebook says which earlier results it took from the reference, and left a run that can be told."""
    cells = nbformat.read(executed, as_version=4).cells
    told = "".join(said(cell) for cell in cells if cell.cell_type == "code")
    assert executed.name < "03" or "using the reference result" in told
    assert read_json(run / "stages.json")
    with suppress(ArtefactError):  # as `ivt run --only` does: one notebook may leave no report
        report_from(run)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_alone_sets_itself_up_runs_whole_and_starts_from_the_reference(path, bare, published, tmp_path):
    if not bare or not published:  # then alone, but here
        run = tmp_path / "alone"
        assert cli.main(["run", "--profile", "smoke", "--run-dir", str(run), "--only", path.stem]) == 0
        starts_from_the_reference(run / "notebooks" / path.name, run)
        pytest.skip("it ran in this environment only: no package index answers, or this is no git checkout")
    folder, *_ = bare
    notebook, (first, second, look) = prepared(path)
    nbformat.write(notebook, tmp_path / path.name)
    new = not list((folder / "venv").rglob("site-packages/trl"))  # the environment is shared: the first one installs
    done = subprocess.run(
        [folder / "venv" / "bin" / "python", "-c", RUN, path.name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=plain(IVT_REPOSITORY=published),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cells = nbformat.read(tmp_path / path.name, as_version=4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    nothing = "The course is ready: all its packages are there, nothing was installed.\n"
    if new:
        wanted = {want.name: want for want in read_lock(ROOT / "requirements.lock")}
        for name in ("trl", "peft", "transformers", "datasets", "accelerate", "anywidget"):
            assert f"{name} {wanted[name].specifier}".replace("==", "") + " (was missing)" in said(cells[first])
        assert "torch" not in said(cells[first])
    else:
        assert said(cells[first]) == nothing
    assert said(cells[second]) == nothing
    assert said(cells[look]) == "False\n"
    assert "Restart" not in "".join(map(said, cells[first : look + 1]))
    results = tmp_path / "ivt-course" / "runs" / "smoke"
    assert (results / "run.json").is_file() and any(results.rglob("*.png"))
    starts_from_the_reference(tmp_path / path.name, results)
    shutil.rmtree(tmp_path / "ivt-course")


def test_the_bare_environment_stayed_bare(bare):
    """The packages it was lent are as they were, and are still the ones in use; the course itself was not installed."""
    if not bare:
        pytest.skip("no package index answers, so nothing was installed")
    folder, packages, before = bare
    assert marks(packages.values()) == before
    site = next((folder / "venv").rglob("site-packages"))
    installed = {canonicalize_name(path.name.split("-")[0]) for path in site.glob("*.dist-info")}
    assert "trl" in installed, "run the tests above first: they install what is missing"
    assert {"torch", "numpy", "ipykernel", "papermill", "jupyterlab", "ivt-course"}.isdisjoint(installed)

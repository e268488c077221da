"""The course as a whole: notebooks executed in order, each skipped while what it rests on is unchanged."""

import ast
import hashlib
import io
import json
import logging
import os
import re
import shutil
import sys
import threading
import time
import tokenize
from contextlib import contextmanager
from pathlib import Path

from ivt_utils.runtime.files import read_json
from ivt_utils.runtime.pace import START, Pace, clock, heading, machine, section_seconds

PACKAGE = Path(__file__).resolve().parent.parent
PROJECT = PACKAGE.parent if (PACKAGE.parent / "pyproject.toml").is_file() else Path.cwd()
PLAIN_SECONDS = 15  # between two lines where a line cannot be rewritten
ARTEFACTS = ("rollouts/*.jsonl", "tables/*.json", "adapters/*/*.safetensors", "figures/*.png")
MARK = "ivt_course"  # our key in the metadata of an executed notebook


class NotebookStopped(RuntimeError):
    """One sentence: which notebook stopped, in which cell, why, and where its partial output lies."""


def find_notebooks(folder: Path, only: list[str] | None = None) -> list[Path]:
    """Return the course's notebooks (`0*.ipynb`) in order; with `only`, those whose names begin so.

    ValueError when there are none, or a name in `only` fits none.
    """
    notebooks = sorted(path for path in folder.glob("0*.ipynb") if re.fullmatch(r"\w+", path.stem))  # no "-Copy1"
    if not notebooks:
        raise ValueError(
            f"No notebooks (0*.ipynb) in {shown(folder)}: "
            "run this from a clone of the course, or name their folder with --notebooks."
        )
    if not only:
        return notebooks
    prefixes = [name.removesuffix(".ipynb") for name in only]
    for name in prefixes:
        if not any(path.stem.startswith(name) for path in notebooks):
            names = ", ".join(path.stem for path in notebooks)
            raise ValueError(f"There is no notebook {name}; choose from {names}.")
    return [path for path in notebooks if any(path.stem.startswith(name) for name in prefixes)]


def run_course(profile, seed: int, run_dir: Path, folder: Path, only=None, out=None, cost_told: str = "") -> None:
    """Execute the notebooks of `folder` into `<run_dir>/notebooks/`, with progress on `out`; return nothing.

    `cost_told` is said of the cost in place of `cost`.
    Raises NotebookStopped for a failing cell and KeyboardInterrupt (with one sentence) for Ctrl-C.
    """
    out = out or sys.stdout
    everything = find_notebooks(folder)
    notebooks = find_notebooks(folder, only)
    target = run_dir / "notebooks"
    target.mkdir(parents=True, exist_ok=True)
    parameters = {"PROFILE": profile.name, "SEED": seed, "RUN_DIR": str(run_dir)}
    print(f"{cost_told or cost(profile, notebooks)} Results go to {shown(run_dir)}.", file=out, flush=True)

    started, expected = time.monotonic(), section_seconds(profile.name)
    timed = all(path.stem in expected for path in notebooks)
    pace = Pace({path.stem: expected[path.stem] for path in notebooks} if timed else {})
    finished: list[str] = []
    for number, notebook in enumerate(notebooks, 1):
        label = f"[{number}/{len(notebooks)}] {notebook.stem}"
        earlier = [target / path.name for path in everything if path < notebook]
        stamp = made_from(notebook, parameters, earlier)
        if is_current(target / notebook.name, stamp, run_dir):
            pace.finished(notebook.stem, read_json(target / notebook.name)["metadata"][MARK].get("sections", {}))
            print(f"{label}: executed before, nothing has changed since", file=out, flush=True)
        else:
            begun = time.monotonic()
            print(f"{label}: started", file=out, flush=True)
            try:
                execute(notebook, target / notebook.name, parameters, stamp, label, pace, started, out)
            except KeyboardInterrupt:
                names = ", ".join(finished) or "no notebook yet"
                raise KeyboardInterrupt(
                    f"Stopped in {notebook.stem}. Finished: {names}. The same command goes on from there."
                ) from None
            print(f"{label}: done in {clock(time.monotonic() - begun)}", file=out, flush=True)
        finished.append(notebook.stem)


def execute(notebook, output, parameters, stamp, label, pace, started, out) -> None:
    """Write the executed `notebook` to `output`, whole or not at all; return nothing. `pace` learns from it.

    While it runs, the output lies beside it as NAME.partial.ipynb and stays there when a cell fails.
    """
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError

    partial = output.with_name(f"{output.stem}.partial.ipynb")
    source = nbformat.read(notebook, as_version=4)
    cells = 1 + sum(counts(cell) for cell in source.cells)  # papermill adds the cell with our parameters
    begun, current, section, sections = time.monotonic(), 0, START, [START]  # the first: papermill's cell
    for cell in source.cells:
        section = heading(cell) or section
        sections += [section] * counts(cell)
    pace.enter(notebook.stem, START)

    def count_cell(cell, cell_index):
        nonlocal current
        current += 1
        pace.enter(notebook.stem, sections[min(current, cells) - 1])

    def line() -> str:
        now, left = time.monotonic(), pace.left()
        text = f"{label}: cell {max(current, 1)}/{cells}, {clock(now - begun)}; in all {clock(now - started)}"
        return text + (f", about {clock(left)} to go" if left and left >= 1 else "")

    for name in ("papermill", "asyncio"):  # what matters of their messages is said below
        logging.getLogger(name).setLevel(logging.CRITICAL)
    outside = os.environ.get("IVT_STATIC")
    os.environ["IVT_STATIC"] = "1"  # widgets show their figure: there is nobody to use them
    try:
        with progress(line, out):
            executed = papermill.execute_notebook(
                str(notebook),
                str(partial),
                parameters=parameters,
                kernel_name="python3",
                language="python",
                progress_bar=False,
                cwd=str(PROJECT),
                on_cell_execute=count_cell,
                coalesce_streams=True,  # what a cell prints is one output, however the kernel sent it
                extra_arguments=["--log-level=CRITICAL"],  # the kernel's own; what a cell prints is kept
            )
    except papermill.PapermillExecutionError as error:
        reason = f"{error.ename}: {error.evalue}".strip().splitlines()[0]
        raise NotebookStopped(
            f"{notebook.name} stopped in cell {current} of {cells}: {reason.rstrip('.')}. "
            f"What ran is kept in {shown(partial)}."
        ) from None
    except DeadKernelError:
        raise NotebookStopped(
            f"{notebook.name} stopped in cell {current} of {cells}: its Python process died, "
            "most often for want of memory (`ivt doctor` says what is free). "
            f"What ran is kept in {shown(partial)}."
        ) from None
    finally:
        os.environ.pop("IVT_STATIC")
        os.environ.update({"IVT_STATIC": outside} if outside else {})
    make_portable(executed, notebook, output)
    executed.metadata[MARK] = {
        "made_from": stamp,
        "seconds": round(time.monotonic() - begun, 1),
        "sections": pace.leave(notebook.stem),
        "artefacts": artefacts_in(Path(parameters["RUN_DIR"])),
    }
    nbformat.write(executed, partial)
    os.replace(partial, output)


def counts(cell) -> bool:
    """Return whether papermill will execute this cell of the source notebook."""
    tags = cell.metadata.get("tags", [])
    idle = "skip-execution" in tags or "injected-parameters" in tags
    return cell.cell_type == "code" and bool(cell.source.strip()) and not idle


def make_portable(executed, notebook: Path, output: Path) -> None:
    """Make what papermill noted of paths inside the project relative to it, in place."""
    metadata = executed.metadata.papermill
    metadata["input_path"], metadata["output_path"] = shown(notebook), shown(output)
    prefix = f"{PROJECT}{os.sep}"
    for name, value in metadata.get("parameters", {}).items():
        metadata["parameters"][name] = value.removeprefix(prefix) if isinstance(value, str) else value
    for cell in executed.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.source = cell.source.replace(prefix, "")


def made_from(notebook: Path, parameters: dict, earlier: list[Path]) -> str:
    """Return the hex SHA-256 over all that an executed notebook rests on.

    That is its source (the cells without their outputs), the parameters, the code of the package that it reaches
    (`reached`, without comments and docstrings), and the executed notebooks before it (or their absence): after one is
    executed anew, the later ones are too, quickly, for finished stages stay.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    sources = [[cell["cell_type"], cell["metadata"].get("tags", []), "".join(cell["source"])] for cell in cells]
    resources = sorted(path for kind in ("*.jinja", "*.js") for path in PACKAGE.rglob(kind))
    parts = [("parameters", json.dumps(parameters, sort_keys=True)), (notebook.name, json.dumps(sources))]
    parts += [(path.name, code_of(path)) for path in reached([text for kind, _, text in sources if kind == "code"])]
    parts += [
        (path.name, path.read_text(encoding="utf-8") if path.is_file() else "missing")
        for path in (*resources, *earlier)
    ]
    return hashlib.sha256("\n".join(f"{name} {len(text)}\n{text}" for name, text in parts).encode()).hexdigest()


def reached(texts: list[str]) -> list[Path]:
    """Return the modules of the package that code imports, and those that they import in turn, in alphabetical order.

    Imports inside functions count as well.
    """
    modules, waiting = set(), list(texts)
    while waiting:
        for name in imported(waiting.pop()):
            place = PACKAGE.parent / name.replace(".", "/")
            path = next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)
            if path and path not in modules:
                modules.add(path)
                waiting.append(path.read_text(encoding="utf-8"))
    return sorted(modules)


def imported(text: str):
    """Yield the dotted names that code imports from the package: its modules, and names that may be modules."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == PACKAGE.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def code_of(path: Path) -> str:
    """Return the code of a module without comments, docstrings and empty lines."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            start, end = node.body[0].lineno - 1, node.body[0].end_lineno or node.body[0].lineno
            lines[start:end] = [""] * (end - start)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and lines[token.start[0] - 1]:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def is_current(executed: Path, stamp: str, run_dir: Path) -> bool:
    """Return whether an executed notebook is whole, made from `stamp`, and its artefacts are all there."""
    try:
        metadata = json.loads(executed.read_text(encoding="utf-8"))["metadata"]
        ours = metadata[MARK]
        good = not metadata["papermill"]["exception"] and ours["made_from"] == stamp
        return good and all((run_dir / name).is_file() for name in ours["artefacts"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def artefacts_in(run_dir: Path) -> list[str]:
    """Return the names, relative to the run, of its predictions, tables, adapters and figures."""
    paths = (path for pattern in ARTEFACTS for path in run_dir.glob(pattern))
    return sorted(path.relative_to(run_dir).as_posix() for path in paths)


def cost(profile, notebooks: list[Path]) -> str:
    """Return one sentence: how many notebooks the profile runs, and how long that took where it was measured."""
    stems, usual = [path.stem for path in notebooks], section_seconds(profile.name)
    text = f"Profile {profile.name}: {len(stems)} notebook{'s' if len(stems) != 1 else ''}"
    if profile.hub_student:
        return text + f"; `ivt plan --profile {profile.name}` says what they cost."
    if not all(stem in usual for stem in stems):
        return text + "; they take some minutes, which were not measured."
    whole = {stem: sum(usual[stem].values()) for stem in stems}
    each = ", ".join(f"{stem[:2]}: {clock(seconds)}" for stem, seconds in whole.items())
    return f"{text}, {clock(sum(whole.values()))} from scratch on {machine()} ({each}), less where stages are finished."


@contextmanager
def progress(line, out):
    """Keep `line()` on the terminal: rewritten every second where that works, else a new line every 15 s."""
    live = out.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    stop = threading.Event()

    def write():
        while not stop.wait(1 if live else PLAIN_SECONDS):
            width = shutil.get_terminal_size().columns - 1
            out.write(f"\r{line()[:width]:<{width}}" if live else f"{line()}\n")
            out.flush()

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if live:
            out.write("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r")
            out.flush()


def shown(path: Path) -> str:
    """Return the path as a reader wants it: relative to the project where it lies in it."""
    path = Path(path)
    return str(path.relative_to(PROJECT)) if path.is_relative_to(PROJECT) else str(path)

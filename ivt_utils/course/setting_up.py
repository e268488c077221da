"""The first cell of every notebook, the badges above it, and `ready`, which installs what a kernel lacks.

Light on purpose, for all of it runs before anything is installed: the standard library, `packaging`, and never torch.
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from urllib.parse import quote

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ivt_utils.course.doctor import PYTHONS, read_lock
from ivt_utils.runtime.files import ROOT, write_text
from ivt_utils.runtime.store import installed

BRANCH = "main"
# These start notebooks and serve them. Who runs the cell has a kernel already, and Colab's own must not be replaced.
SERVERS = {"ipykernel", "jupyterlab", "nbclient", "nbformat", "papermill"}
FRONT_END = {"ipywidgets"}  # any version will do, for it must fit the page that shows it: Colab's is 7
KEPT = ("torch", "torchvision", "numpy")  # while they are in range: a CUDA build that fits the driver is kept so
STARTED = {"_distutils_hack"}  # setuptools' hook, which every Python loads at its start; a new version does no harm
NO_NETWORK = re.compile(
    r"connection broken|name resolution|NameResolutionError|Network is unreachable|ConnectTimeout|Connection refused"
    r"|ConnectionError|No address associated",
    re.IGNORECASE,
)
LOADED: dict[str, str] = {}  # distribution: the version of it that this process has loaded, noted before installing

CELL = """\
# Finds the course, or fetches it with git, and installs only what is missing: in Colab, Kaggle, Binder and at home.
# Running it again is safe.
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

if importlib.util.find_spec("ivt_utils") is None:
    places = [Path.cwd(), *Path.cwd().parents, Path.cwd() / "ivt-course"]
    course = next((place for place in places if (place / "ivt_utils" / "profiles.py").is_file()), None)
    if course is None:
        course, source = places[-1], os.environ.get("IVT_REPOSITORY", "REPOSITORY")
        quiet = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}  # no question that nobody sees
        if not shutil.which("git") or subprocess.call(["git", "clone", "-q", "--depth=1", source, course], env=quiet):
            sys.exit(f"git could not fetch {source}. Is the network on? Is a broken {course.name}/ there? Delete it.")
    sys.path.insert(0, str(course))
from ivt_utils.course.setting_up import ready
ready()"""


class NotReady(RuntimeError):
    """One sentence: what stands in the way, and what to do."""

    def _render_traceback_(self) -> list[str]:  # IPython shows this, not a wall of text
        return [str(self)]


# ------------------------------------------------------------------------------------------------ for the notebooks
def repository(root: Path = ROOT) -> str:
    """Return the address of the course's repository; it is said in one place, `[project.urls]` of pyproject.toml."""
    return project(root)["urls"]["Repository"]


def setup_cell(address: str) -> str:
    """Return the source of every notebook's first code cell; the variable IVT_REPOSITORY names another repository."""
    return CELL.replace('REPOSITORY")', f'{address}")')


def badges(notebook: str, address: str, images: str = "../docs/badges") -> str:
    """Return one line of Markdown: three pictures that open `notebook` in Colab, in Kaggle and in Binder.

    These open notebooks from GitHub only; with another repository the line is a comment that says so.
    """
    links = badge_links(notebook, address)
    if not links:
        return f"<!-- No badges: Colab, Kaggle and Binder open notebooks from GitHub, and not from {address} -->"
    titles = {"colab": "Open in Colab", "kaggle": "Open in Kaggle", "binder": "Launch Binder"}
    return " ".join(f"[![{titles[name]}]({images}/{name}.svg)]({link})" for name, link in links.items())


def readme_badges(notebook: str, address: str) -> str:
    """Return the badges for the README, or how to get them where `address` is not one on GitHub."""
    if badge_links(notebook, address):
        return badges(notebook, address, "docs/badges") + "\n"
    return (
        "The buttons of Colab, Kaggle and Binder appear here once the course has a public address. One command writes "
        "yours:\n"
        "`ivt build notebooks --repository https://github.com/you/ivt-course`.\n"
    )


def name_repository(address: str, root: Path = ROOT) -> None:
    """Write the address of the course's repository into pyproject.toml; a ValueError where it is no such address."""
    if not re.fullmatch(r"https://[\w.-]+(/[\w.~-]+)+/?", address):
        raise ValueError(f"{address!r} is no address of a repository, such as https://github.com/you/ivt-course.")
    path = root / "pyproject.toml"
    text = path.read_text(encoding="utf-8")
    write_text(path, re.sub(r'(?m)^Repository = ".*"$', f'Repository = "{address}"', text))


def badge_links(notebook: str, address: str) -> dict[str, str]:
    """Return {"colab", "kaggle", "binder": address that opens the notebook}; nothing when it is not on GitHub."""
    match = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(\.git)?/?", address)
    if not match:
        return {}
    project, path = match[1], f"notebooks/{notebook.removesuffix('.ipynb')}.ipynb"
    return {
        "colab": f"https://colab.research.google.com/github/{project}/blob/{BRANCH}/{path}",
        "kaggle": f"https://kaggle.com/kernels/welcome?src=https://github.com/{project}/blob/{BRANCH}/{path}",
        "binder": f"https://mybinder.org/v2/gh/{project}/{BRANCH}?labpath={quote(path, safe='')}",
    }


def project(root: Path) -> dict:
    """Return the table `[project]` of pyproject.toml; without that file, a NotReady."""
    import tomllib  # not in Python 3.10, which is told so by `ready`

    try:
        return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    except FileNotFoundError:
        raise NotReady("pyproject.toml is not beside ivt_utils: fetch the whole course with git clone.") from None


# ------------------------------------------------------------------------------------------------ run by the cell
def ready(root: Path = ROOT) -> None:
    """Install what the course needs and this Python lacks, say in a sentence what was done, and return nothing.

    The course itself is used where it lies, for its data is beside it. Raises NotReady when something stands in the
    way, or when the kernel has to be restarted because it has loaded a package that is now of another version.
    """
    low, high = PYTHONS
    if not low <= sys.version_info[:2] < high:
        raise NotReady(
            f"The course needs Python {low[0]}.{low[1]} or newer, below {high[0]}.{high[1]}; this kernel is "
            f"Python {sys.version.split()[0]}. Choose another kernel or runtime."
        )
    lacking = [want for want in needed(root) if not suits(want)]
    if lacking and (root / ".venv" / "installed").exists() and Path(sys.prefix).resolve() != (root / ".venv").resolve():
        raise NotReady(
            "The course is set up in .venv, and this kernel is another Python: start JupyterLab with make "
            "lab, or choose .venv/bin/python as kernel."
        )
    if not lacking:
        sentence = "all its packages are there, nothing was installed."
    else:
        had = {want.name: installed(want.name) for want in lacking}
        print(f"Installing {', '.join(had)}: this may take some minutes.", flush=True)
        for name, version in loaded().items():
            LOADED.setdefault(name, version)
        install(lacking, root)
        sentence = (
            "installed "
            + ", ".join(
                f"{name} {installed(name)} ({f'was {version}' if version else 'was missing'})"
                for name, version in had.items()
            )
            + "."
        )
    changed = [f"{name} {old} (now {installed(name)})" for name, old in LOADED.items() if installed(name) != old]
    if changed:
        raise NotReady(
            f"Restart needed: this kernel has loaded {', '.join(changed)}. Restart the kernel (in Colab: "
            "Runtime, Restart session), then run this cell again."
        )
    print(f"The course is ready: {sentence}")


def needed(root: Path) -> list[Requirement]:
    """Return the requirements of a notebook on this computer: with an NVIDIA card, those of the extra `gpu` as well."""
    table = project(root)
    lines = table["dependencies"] + (table["optional-dependencies"]["gpu"] if shutil.which("nvidia-smi") else [])
    return [want for want in map(Requirement, lines) if want.name not in SERVERS]


def suits(want: Requirement) -> bool:
    """Return whether a package is installed in a version that is asked for."""
    version = installed(want.name)
    return version is not None and (want.name in FRONT_END or want.specifier.contains(version, prereleases=True))


def install(lacking: list[Requirement], root: Path) -> None:
    """Install packages into this Python and return nothing; a NotReady says why that failed.

    First in the lock's versions, with which the course was tested, so that it works next year as well: what is asked
    for, and what it pulls in that is not there. When these do not go with what is there, in any version of the range.
    """
    lock = {canonicalize_name(want.name): want for want in read_lock(root / "requirements.lock")}
    requirements = {canonicalize_name(want.name): want for want in lacking}
    tested = [lock.get(name, want) for name, want in requirements.items()]
    pulled_in = [
        f"{name}{want.specifier}" for name, want in lock.items() if not (name in requirements or installed(name))
    ]
    pins = [f"{name}=={installed(name)}" for name in KEPT if installed(name) and name not in requirements]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder, "constraints.txt")
        for wants, bounds in ((tested, pins + pulled_in), (lacking, pins)):
            constraints.write_text("\n".join(bounds))
            process = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "pip",
                    "install",
                    "--quiet",
                    "--no-input",
                    "--disable-pip-version-check",
                    "--retries=2",
                    f"--constraint={constraints}",
                    *map(str, wants),
                ],
                capture_output=True,
                text=True,
            )
            if process.returncode == 0 or NO_NETWORK.search(process.stderr):
                break
    importlib.invalidate_caches()
    names = ", ".join(want.name for want in lacking if not suits(want))
    if names and NO_NETWORK.search(process.stderr):
        raise NotReady(
            f"No package index answers, so these are still missing: {names}. Switch the network on (Kaggle: "
            "Settings, Internet), then run this cell again."
        )
    if process.returncode or names:
        raise NotReady(
            f"pip could not install {names or 'everything'}: {complaint(process.stderr + process.stdout)} See "
            "README.md for a set-up without this cell."
        )


def complaint(text: str) -> str:
    """Return the line that says what went wrong: pip's last error, else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["it does not say why"]
    last = next((line for line in reversed(lines) if line.upper().startswith("ERROR")), lines[-1])
    return last if last.endswith(".") else last + "."


def loaded() -> dict[str, str]:
    """Return {distribution: version} of those of which this process has loaded a file."""
    modules = [module for name, module in list(sys.modules.items()) if name not in STARTED]
    files = {getattr(module, "__dict__", {}).get("__file__") for module in modules}
    found = {}
    for dist in metadata.distributions():
        record, base = dist.read_text("RECORD"), str(dist.locate_file(""))
        if record is None:  # Debian's packages list no files
            tops = (dist.read_text("top_level.txt") or dist.name.replace("-", "_")).split()
            ours = any(top in sys.modules for top in tops)
        else:
            ours = any(os.path.join(base, line.split(",")[0]) in files for line in record.splitlines())
        if ours:
            found.setdefault(dist.name, dist.version)
    return found

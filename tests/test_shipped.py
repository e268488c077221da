"""The files that come with the project and that a run reads: one flipped byte in any of them is named, not used."""

import shutil
import subprocess
import sys
from fnmatch import fnmatch

import pytest

from ivt_utils.runtime.files import DATA, ROOT

# What a run takes from data/, by pattern; the rest is for readers, or made to be changed by them.
READ = (
    "benchmark/*",
    "qwen3vl/*.json",
    "reference/adapters/*",
    "reference/rollouts/*",
    "reference/run.json",
    "reference/seeds/*",
    "reference/stages.json",
    "reference/tables/*",
    "student/*.json",
    "student/*.jinja",
    "student/*.safetensors",
    "manifest.json",
    "paper_results.json",
    "timings.json",
)
LEFT = (
    "student/README.md",
    "student/learning_curve.json",
    "reference/results.json",
    "reference/figures/*",
    "hub_revisions.json",
)
MADE_HERE = ("hub/*", "*.training/*")
READER = """
import sys
from pathlib import Path
from ivt_utils.runtime import pace
from ivt_utils.course import lessons
from ivt_utils.paper_scale import plan
from ivt_utils.runtime.store import Run
from ivt_utils.runtime.files import DATA, ArtefactError
from ivt_utils.records import SPLITS, load_split
from ivt_utils.profiles import get_profile
from ivt_utils.show.tables import paper_results
from ivt_utils.show.reading import seeds_from
from ivt_utils.student import load_student

micro, scratch = get_profile("micro"), Path(sys.argv[1])
run = Run(micro, 0, scratch / "run")

def read(relative):  # as a run does
    kind, *rest = relative.split("/")
    if kind == "student":
        load_student(micro)
    elif kind == "benchmark":
        for split in SPLITS:
            load_split(micro, split)
    elif kind == "qwen3vl":
        for name in ("colab", "paper"):
            plan.configuration(get_profile(name))
    elif rest and rest[0] == "seeds":
        seeds_from(DATA / "reference", {}, 0)
    elif rest and rest[0] in ("adapters", "rollouts", "tables"):
        run.find("/".join(rest[:2]))
    elif rest == ["run.json"]:
        lessons.seed_run(micro, 0, scratch / "seeded")
    elif rest == ["stages.json"]:
        for path in sorted((DATA / "reference").glob("[art]*/*")):
            run.find(path.relative_to(DATA / "reference").as_posix())
    else:
        paper_results(), pace.timings()

for relative in sys.stdin.read().split():
    path = DATA / relative
    whole = path.read_bytes()
    at = len(whole) // 2
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    try:
        read(relative)
        print(relative, "UNNOTICED", flush=True)
    except ArtefactError as error:
        print(relative, str(error).replace(f"{DATA}/", ""), flush=True)
    path.write_bytes(whole)
for relative in ("student/config.json", "benchmark/test.parquet", "paper_results.json", "reference/run.json"):
    read(relative)  # all is whole again
"""


def fits(name: str, patterns) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


@pytest.fixture(scope="module")
def told(slow, tmp_path_factory) -> dict[str, str]:
    """What a run says to each file with one flipped byte, in a copy of the project that is no clone."""
    copy = tmp_path_factory.mktemp("archive")
    for name in ("ivt_utils", "data"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "hub", "*.training"))
    files = [path for path in sorted((copy / "data").rglob("*")) if path.is_file()]
    names = [path.relative_to(copy / "data").as_posix() for path in files]
    names = [name for name in names if fits(name, READ) and not fits(name, LEFT)]
    done = subprocess.run(
        [sys.executable, "-c", READER, copy / "scratch"],
        cwd=copy,
        input="\n".join(names),
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.partition(" ") for line in done.stdout.splitlines() if not line.startswith("This run has no")]
    assert [name for name, *_ in lines] == names
    return {name: said for name, _, said in lines}


def test_a_flipped_byte_is_named_in_every_file_that_a_run_reads(told):
    assert len(told) > 60
    for name, said in told.items():
        if name.endswith(("manifest.json", "stages.json")):  # a wrong note shows in the file that it is about
            assert "damaged" in said or "not valid JSON" in said, (name, said)
        else:  # an adapter is one folder
            assert said.startswith(name.rpartition("/")[0] if "adapters" in name else name), (name, said)


def test_who_has_an_archive_is_not_told_to_use_git(told):
    assert not [said for said in told.values() if "git" in said]
    assert sum("archive (ZIP)" in said for said in told.values()) > 60


def test_no_file_of_the_data_is_forgotten():
    """A new file is either read by a run, and then checked, or named here as one that is not."""
    there = [path.relative_to(DATA).as_posix() for path in DATA.rglob("*") if path.is_file()]
    assert not [name for name in there if not fits(name, (*READ, *LEFT, *MADE_HERE))]

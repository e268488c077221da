"""The command `ivt`: run the course, print its report, examine this computer."""

import argparse
import errno
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0 done, 1 a notebook stopped or something is missing, 2 bad input, 130 stopped.

    What a user can put right is said in one sentence on stderr, without a traceback.
    """
    from .course import NotebookStopped

    arguments = parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? and goes on
    try:
        return arguments.command(arguments)
    except KeyboardInterrupt as stop:
        return fail(str(stop) or "Stopped.", 130)
    except NotebookStopped as stop:
        return fail(str(stop), 1)
    except Exception as error:
        from .artefacts import ArtefactError

        if isinstance(error, OSError):
            return fail(disk_sentence(error), 2)
        if isinstance(error, (ArtefactError, ValueError)):
            return fail(str(error), 2)
        raise


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; each sets `command`, from the arguments to an exit code."""
    top = argparse.ArgumentParser(prog="ivt", description="The IVT course on the command line.")
    commands = top.add_subparsers(required=True, metavar="run|report|closer|doctor|build")

    run = commands.add_parser("run", help="execute the notebooks in order and print the report")
    run.add_argument("--profile", default="micro", help="smoke, micro (default), colab or paper")
    run.add_argument("--seed", type=int, default=0, help="seed of everything random (default 0)")
    run.add_argument("--run-dir", type=Path, help="where results go (default runs/PROFILE, for another seed "
                                                  "than 0 runs/PROFILE-seedN)")  # fmt: skip
    run.add_argument("--only", nargs="+", metavar="NAME", help="only these notebooks, such as 03 or 04_grpo")
    run.add_argument("--notebooks", type=Path, metavar="DIR", help="another folder of notebooks")
    run.set_defaults(command=run_command)

    report = commands.add_parser("report", help="recompute the tables from saved predictions")
    report.add_argument(
        "--from", dest="run_dir", type=Path, required=True, metavar="DIR", help="as runs/micro"
    )
    report.set_defaults(command=report_command)

    closer = commands.add_parser("closer", help="train and score the closer look, our own recipe, on several seeds")
    closer.add_argument("--profile", default="micro", help="smoke, micro (default), colab or paper")
    closer.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="default 0 1 2")
    closer.add_argument("--split", choices=("val", "test"), default="test", help="choose values on val (default test)")
    closer.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="try another zoom, looks or "
                        "closer_steps, in a --run-dir of its own")  # fmt: skip
    closer.add_argument("--run-dir", type=Path, help="where results go (default runs/PROFILE)")
    closer.set_defaults(command=closer_command)

    build = commands.add_parser("build", help="make again what the project ships: student, benchmark, reference")
    build.add_argument("what", choices=("student", "benchmark", "reference"))
    build.add_argument("--seed", type=int, default=0, help="seed of the student or benchmark (default 0)")
    build.add_argument("--from", dest="run_dir", type=Path, default=Path("runs/micro"), metavar="DIR",
                       help="the finished run that becomes the reference (default runs/micro)")  # fmt: skip
    build.set_defaults(command=build_command)

    doctor = commands.add_parser("doctor", help="say what this computer has and lacks for the course")
    doctor.add_argument("--profile", default="micro", help="smoke, micro (default), colab or paper")
    doctor.set_defaults(command=doctor_command)
    return top


def run_command(arguments) -> int:
    """Return 0 after executing the notebooks and printing the report."""
    from .artefacts import ArtefactError
    from .course import PROJECT, run_course
    from .profiles import get_profile
    from .report import report_from

    profile = get_profile(arguments.profile)
    seed = arguments.seed
    name = profile.name if seed == 0 else f"{profile.name}-seed{seed}"
    run_dir = (arguments.run_dir or PROJECT / "runs" / name).resolve()
    folder = (arguments.notebooks or PROJECT / "notebooks").resolve()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill` ends a run as Ctrl-C does
    run_course(profile, seed, run_dir, folder, arguments.only)
    try:
        report_from(run_dir)
    except ArtefactError as missing:
        if not arguments.only:
            raise
        print(f"No report yet: {missing}")
    return 0


def report_command(arguments) -> int:
    """Return 0 after printing the report of a run."""
    if not arguments.run_dir.is_dir():
        raise ValueError(
            f"There is no run in {arguments.run_dir}: make one with `ivt run`, or name its folder."
        )
    from .report import report_from

    report_from(arguments.run_dir.resolve())
    return 0


def closer_command(arguments) -> int:
    """Return 0 after training and scoring the closer look on each seed, and printing its table."""
    from .artefacts import Run
    from .closer import run_closer
    from .datasets import load_split
    from .profiles import get_profile
    from .report import aligned, closer_table, report_from
    from .results import closer_from

    profile = get_profile(arguments.profile)
    for change in arguments.set:
        name, _, value = change.partition("=")
        if name not in ("zoom", "looks", "closer_steps") or arguments.run_dir is None:
            raise ValueError("--set takes zoom=, looks= or closer_steps= with a number, and a --run-dir of its own.")
        profile = replace(profile, **{name: float(value) if name == "zoom" else int(value)})
    split = arguments.split
    train, records = load_split(profile, "train"), load_split(profile, split)
    run = Run(profile, 0, arguments.run_dir and arguments.run_dir.resolve())
    minutes = profile.costs.get("closer")
    cost = f"about {minutes * len(arguments.seeds):g} min from scratch" if minutes else "its cost is not recorded"
    print(f"Profile {profile.name}: the closer look, seeds {arguments.seeds}: {cost}. Results go to {run.root}.")
    run_closer(run, arguments.seeds, train, records, split)
    if split == "test" and (run.root / "results.json").exists():
        report_from(run.root)  # ends with the same table
    else:
        rows = closer_from(run.root, split, seed=0, n_resamples=profile.resamples)
        print(f"{split} split\n{aligned(closer_table(rows))}")
    return 0


def build_command(arguments) -> int:
    """Return 0 after making one of the shipped parts again."""
    from .artefacts import DATA, ROOT, read_json, ship_reference
    from .report import paper_results, write_table

    if arguments.what == "student":
        from .pretrain import train_student

        made = train_student(DATA / "student", arguments.seed)
    elif arguments.what == "benchmark":
        from .datasets import build_benchmark

        made = build_benchmark(seed=arguments.seed)
    else:
        made = ship_reference(arguments.run_dir)
        write_table(ROOT / "README.md", read_json(made / "results.json"), paper_results())
    print(f"Made {made}.")
    return 0


def doctor_command(arguments) -> int:
    """Return 0 when nothing needed is missing, else 1, after printing what `examine` found and the cost."""
    from .course import PROJECT, cost, find_notebooks
    from .doctor import MISS, examine
    from .profiles import get_profile

    profile = get_profile(arguments.profile)
    lines = examine(PROJECT, profile)
    for tag, text in lines:
        print(f"[{tag}] {text}")
    missing = sum(tag == MISS for tag, _ in lines)
    if (PROJECT / "notebooks").is_dir() and any((PROJECT / "notebooks").glob("0*.ipynb")):
        minutes = dict(getattr(profile, "minutes", None) or {})
        print(cost(profile.name, find_notebooks(PROJECT / "notebooks"), minutes))
    print(f"Missing: {missing} of what is needed." if missing else "Nothing needed is missing.")
    return 1 if missing else 0


def disk_sentence(error: OSError) -> str:
    """Return one sentence about a file that could not be read or written; for a full disk, what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        name = error.filename or "what was to be written"
        return f"No space left on the disk for {name}: free some, then the same command goes on from there."
    return f"{error.filename}: {error.strerror}." if error.filename and error.strerror else str(error)


def fail(sentence: str, code: int) -> int:
    """Return the exit code after printing the sentence on stderr."""
    print(sentence, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

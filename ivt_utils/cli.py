"""The command `ivt`: run the course or its stages, prepare data, plan, report, examine this computer."""

import argparse
import io
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

from ivt_utils.methods import ADAPTERS, ASKED, METHODS, STAGES
from ivt_utils.runtime import distributed

STOPPED = (
    "Stopped, from outside or because another process of this run has died (most often for want of memory); "
    "the same command goes on from the last finished stage or checkpoint."
)
ALONE = "Stopped; the same command goes on from the last finished stage or checkpoint."
SERVED = ("eval", "mirage")  # stages that a served student can make, the second without confidence
LOST = ("connection closed", "connection reset", "remote process exited")  # how torch says that a process is gone


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0 done, 1 a notebook stopped or something is missing, 2 bad input, 130 stopped.

    What a user can put right is said in one sentence on stderr, without a traceback.
    """
    from ivt_utils.course.execute import NotebookStopped

    arguments = parser().parse_args(argv)
    if distributed.rank() > 0:
        sys.stdout = open(os.devnull, "w")  # process 0 speaks for all
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows ? and goes on
    if distributed.size() > 1 and arguments.command is not stage_command:
        return fail(f"Only {', '.join(STAGES)} run in several processes; run this command without accelerate.", 2)
    try:
        return arguments.command(arguments)
    except KeyboardInterrupt as stop:
        return fail(str(stop) or (ALONE if hasattr(arguments, "run_dir") else "Stopped."), 130)
    except NotebookStopped as stop:
        return fail(str(stop), 1)
    except Exception as error:
        from ivt_utils.runtime.files import ArtefactError, trouble

        if isinstance(error, OSError):
            return fail(trouble(error, error.filename or getattr(arguments, "run_dir", None)), 2)
        if isinstance(error, (ArtefactError, ValueError)):
            return fail(str(error), 2)
        if distributed.size() > 1 and any(sign in str(error).lower() for sign in LOST):
            return fail(f"{STOPPED} It said: {str(error).splitlines()[0]}", 1)
        raise


def seed_number(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**32:
        raise ValueError
    return number


def number_of_steps(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"there must be one step or more, not {number}")
    return number


def adapter_there(text: str) -> tuple[str, str]:
    adapter, _, name = text.partition("=")
    if adapter not in ADAPTERS or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not ADAPTER=NAME with one of {', '.join(ADAPTERS)}")
    return adapter, name


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; each sets `command`, from the arguments to an exit code."""
    top = argparse.ArgumentParser(prog="ivt", description="The IVT course on the command line.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name, command, help, runs=False):
        subparser = commands.add_parser(name, help=help)
        subparser.add_argument("--profile", default="micro", help="smoke, micro (default), colab or paper")
        subparser.set_defaults(command=command, stage=name)
        if runs:
            subparser.add_argument("--seed", type=seed_number, default=0, help="seed of everything random (default 0)")
            subparser.add_argument(
                "--run-dir",
                type=Path,
                help="where results go (default runs/PROFILE, for another seed than 0 runs/PROFILE-seedN)",
            )
        if runs and name != "teach":
            subparser.add_argument(
                "--dry-run",
                action="store_true",
                help="walk through colab or paper with the micro student and 8 made-up samples of each split",
            )
        return subparser

    run = add("run", run_command, "execute the notebooks in order and print the report", runs=True)
    run.add_argument("--only", nargs="+", metavar="NAME", help="only these notebooks, such as 03 or 04_grpo")
    run.add_argument(
        "--reference",
        action="store_true",
        help="begin a new folder with the reference results (micro): "
        "nothing is trained, all notebooks run in a minute or two",
    )
    run.add_argument("--notebooks", type=Path, metavar="DIR", help="another folder of notebooks")
    for name, description in STAGES.items():
        staged = add(name, stage_command, f"the stages of {description}; also under `accelerate launch`", runs=True)
        if name == "grpo":
            staged.add_argument(
                "--steps",
                type=number_of_steps,
                help="optimizer steps in place of the profile's grpo_steps, but for the student that keeps what fits",
            )
        if name in SERVED:
            staged.add_argument(
                "--base-url",
                metavar="URL",
                help="let a server answer (OpenAI-compatible), as in ivt teach; with --model",
            )
            staged.add_argument("--model", metavar="NAME", help="the base student's name there; the run notes it")
            staged.add_argument(
                "--adapters",
                type=adapter_there,
                nargs="+",
                default=[],
                metavar="ADAPTER=NAME",
                help=f"the names there of students with adapters ({', '.join(ADAPTERS)}), which are scored, too",
            )
    teach = add("teach", teach_command, "let a VLM write the traces of the harvest, before notebook 2", runs=True)
    teach.add_argument(
        "--base-url",
        required=True,
        metavar="URL",
        help="an OpenAI-compatible endpoint, such as "
        "http://localhost:8000/v1; its key, if it wants one, in OPENAI_API_KEY",
    )
    teach.add_argument("--model", required=True, metavar="NAME", help="the teacher's name there")
    add("data", data_command, "prepare the data sets of colab or paper: download, check, split")
    add("plan", plan_command, "say what a profile will cost: memory, tokens, time on named GPUs, disk, downloads")

    report = commands.add_parser("report", help="recompute the tables from saved predictions")
    report.add_argument("--from", dest="run_dir", type=Path, required=True, metavar="DIR", help="as runs/micro")
    report.set_defaults(command=report_command)

    several = add("seeds", seeds_command, "train SFT, GRPO and the closer look with several seeds, and score them")
    several.add_argument(
        "--seeds", type=seed_number, nargs="+", default=[*range(5)], metavar="N", help="default 0 to 4"
    )
    several.add_argument("--steps", type=number_of_steps, help="as in ivt grpo")
    several.add_argument("--run-dir", type=Path, help="where results go (default runs/PROFILE); that run is seed 0")
    several.set_defaults(seed=0)

    closer = add("closer", closer_command, "train and score the closer look, our own recipe")
    closer.add_argument("--seeds", type=seed_number, nargs="+", default=[0], metavar="N", help="default 0")
    closer.add_argument("--split", choices=("val", "test"), default="test", help="choose values on val (default test)")
    closer.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="try another zoom, looks, least_view or closer_steps, in a --run-dir of its own",
    )
    closer.add_argument("--run-dir", type=Path, help="where results go (default runs/PROFILE)")

    build = commands.add_parser(
        "build",
        help="make again what the project ships: student, benchmark, reference, notebooks, guide, docs; or live, "
        'what the book\'s page "Try it" loads',
    )
    build.add_argument("what", choices=("student", "benchmark", "reference", "notebooks", "guide", "docs", "live"))
    build.add_argument("--seed", type=int, default=0, help="seed of the student or benchmark (default 0)")
    build.add_argument(
        "--from",
        dest="run_dir",
        type=Path,
        metavar="DIR",
        help="the finished run that becomes the reference, or whose cells are timed for the guide (default runs/micro)",
    )
    build.add_argument(
        "--repository",
        metavar="URL",
        help="with notebooks: the address of your copy, such as https://github.com/you/ivt-course; "
        "pyproject.toml, the badges and the first cells take it",
    )
    build.set_defaults(command=build_command)

    add("doctor", doctor_command, "say what this computer has and lacks for the course")
    return top


def _begin(arguments):
    """Return the profile and the folder of a run; `kill` will end it as Ctrl-C does."""
    from ivt_utils.course.execute import PROJECT
    from ivt_utils.profiles import DRY_RUN, get_profile

    dry = getattr(arguments, "dry_run", False)
    profile = get_profile(f"{arguments.profile}{DRY_RUN}" if dry else arguments.profile)
    if dry and distributed.rank() == 0:
        from ivt_utils.paper_scale.fixture import prepare_fixture

        prepare_fixture(profile)
    name = profile.name if arguments.seed == 0 else f"{profile.name}-seed{arguments.seed}"
    if arguments.stage in SERVED and (arguments.base_url or arguments.model or arguments.adapters):
        from ivt_utils.paper_scale.served import served_profile

        if not (arguments.base_url and arguments.model):
            raise ValueError("A served student needs --base-url and --model.")
        named = [adapter for adapter, _ in arguments.adapters]
        if len(set(named)) < len(named):
            raise ValueError("--adapters names one adapter twice; give each one name.")
        asked = [METHODS[name].adapter for name in ASKED if METHODS[name].adapter]
        if arguments.stage == "mirage" and not {*asked} & {*named}:
            raise ValueError(
                f"Notebook 6 asks students with adapters: name one of {', '.join(map(str, asked))} by --adapters."
            )
        profile, name = served_profile(profile, arguments.model), f"{name}-served"
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    run_dir = (arguments.run_dir or PROJECT / "runs" / name).resolve()
    return profile, own_folder(run_dir)


def fit_to_card(profile, grpo: bool):
    """Return the profile with batches as large as this machine's card holds, and say how large they are.

    `grpo`: whether the command trains with GRPO. The profile stays as it is without a card, and for a student that the
    plan does not know or that is served.
    """
    from ivt_utils.paper_scale.plan import CONFIGURATIONS, fitted, rollouts_at_once, this_machine

    known = profile.engine == "local" and profile.student in CONFIGURATIONS
    card_bytes = known and distributed.agree(this_machine()["gpu_bytes"])
    if not card_bytes:
        return profile
    profile = fitted(profile, card_bytes, grpo)
    rollouts = f" and {rollouts_at_once(profile)} of GRPO's rollouts" if grpo else ""
    print(f"This card answers {profile.batch_size} samples{rollouts} at once.")
    return profile


def own_folder(run_dir: Path) -> Path:
    """Return the folder of a run; a ValueError where that is the reference, which comes with the project."""
    from ivt_utils.runtime.store import REFERENCE

    if run_dir.is_relative_to(REFERENCE):
        raise ValueError(f"{run_dir} holds the reference results, which no run may change; name another --run-dir.")
    return run_dir


def run_command(arguments) -> int:
    """Return 0 after executing the notebooks and printing the report."""
    from ivt_utils.course.execute import PROJECT, run_course
    from ivt_utils.runtime.files import ArtefactError
    from ivt_utils.show.report import report_from

    profile, run_dir = _begin(arguments)
    if arguments.reference:
        from ivt_utils.course.lessons import seed_run

        seed_run(profile, arguments.seed, run_dir)
    folder = (arguments.notebooks or PROJECT / "notebooks").resolve()
    over = "The notebooks run over the reference results: nothing is trained, they take a minute or two."
    run_course(profile, arguments.seed, run_dir, folder, arguments.only, cost_told=over if arguments.reference else "")
    try:
        report_from(run_dir)
    except ArtefactError as missing:
        if not arguments.only:
            raise
        print(f"No report yet: {missing}")
    return 0


def stage_command(arguments) -> int:
    """Return 0 after making the stages of a notebook, together with the other processes of a launch."""
    from ivt_utils import pipeline
    from ivt_utils.runtime.store import Run

    profile, run_dir = _begin(arguments)
    distributed.wait()
    profile = fit_to_card(profile, arguments.stage == "grpo")
    print(
        f"Profile {profile.name}, seed {arguments.seed}, {distributed.size()} process(es): "
        f"{STAGES[arguments.stage]}. `ivt plan` says what it costs. Results go to {run_dir}."
    )
    run = Run(profile, arguments.seed, run_dir)
    before, options = set(run.stages()), {}
    if arguments.stage == "grpo":
        options["steps"] = arguments.steps
    if profile.engine != "local":
        from ivt_utils.paper_scale.served import served_students

        names = {None: arguments.model, **dict(arguments.adapters)}
        options["served"] = served_students(run, arguments.base_url, names)
    try:
        pipeline.STAGES[arguments.stage](run, **options)
    except KeyboardInterrupt:  # Ctrl-C, or the launcher, which ends all processes when one has died
        raise KeyboardInterrupt(STOPPED if distributed.size() > 1 else ALONE) from None
    distributed.leave()
    seconds_of = {name: stage["seconds"] for name, stage in run.stages().items() if name not in before}
    for name, value in seconds_of.items():
        print(f"{name}: {value:g} s")
    found = "The notebooks find them finished (`ivt run` with the same profile and folder); "
    print(
        f"Made {len(seconds_of)} stages. {found if profile.engine == 'local' else ''}`ivt report --from {run_dir}` "
        "prints the tables."
    )
    return 0


def teach_command(arguments) -> int:
    """Return 0 after a VLM has written the traces of the harvest."""
    from ivt_utils.harvest import keep_errors
    from ivt_utils.paper_scale.vlm_teacher import budget, teach
    from ivt_utils.pipeline import own_answers
    from ivt_utils.records import load_split
    from ivt_utils.runtime.store import Run

    profile, run_dir = _begin(arguments)
    if not profile.hub_student:
        raise ValueError("The micro student knows the geometric teacher's words only; teach is for colab and paper.")
    run = Run(profile, arguments.seed, run_dir)
    if "rollouts/trajectories" in run.stages():
        raise ValueError(f"{run_dir} has its trajectories already; for another teacher name another --run-dir.")
    train, cache = load_split(profile, "train"), run.root / "teacher"
    if "rollouts/train_step0" not in run.stages():
        raise ValueError(f"{run_dir} has no answers of the student to correct yet: run ivt eval first.")
    wrong = keep_errors(own_answers(run, train), profile.harvest_max_iou)
    print(budget(wrong, train, profile, arguments.model, cache), flush=True)
    trajectories = run.rollouts(
        "trajectories",
        lambda: teach(
            wrong,
            train,
            profile,
            base_url=arguments.base_url,
            model=arguments.model,
            cache=cache,
            progress="teacher",
        ),
    )
    traces, geometric = sum(len(t["steps"]) - 1 for t in trajectories), sum(t["stood_in"] for t in trajectories)
    print(f"{traces} traces, {geometric} of them by the geometric teacher, for the VLM's were refused.")
    print(f"The trajectories are in {run_dir}; notebook 2 and ivt sft take them from there.")
    return 0


def data_command(arguments) -> int:
    """Return 0 after the data sets of a profile are prepared."""
    from ivt_utils.paper_scale.hub import prepare
    from ivt_utils.profiles import get_profile

    profile = get_profile(arguments.profile)
    if profile.data != "hub":
        raise ValueError(f"The data of {profile.name} comes with the project; ivt data is for colab and paper.")
    print(f"The data is in {prepare(profile)}.")
    return 0


def plan_command(arguments) -> int:
    """Return 0 after printing what a profile will cost."""
    from ivt_utils.paper_scale.plan import plan_text
    from ivt_utils.profiles import get_profile

    print(plan_text(get_profile(arguments.profile)))
    return 0


def report_command(arguments) -> int:
    """Return 0 after printing the report of a run."""
    if not arguments.run_dir.is_dir():
        raise ValueError(f"There is no run in {arguments.run_dir}: make one with `ivt run`, or name its folder.")
    from ivt_utils.show.report import report_from

    report_from(arguments.run_dir.resolve())
    return 0


def seeds_command(arguments) -> int:
    """Return 0 after training and scoring every method with each seed, and printing the report."""
    from ivt_utils.pipeline import seeds
    from ivt_utils.runtime.store import Run
    from ivt_utils.show.report import report_from

    profile, run_dir = _begin(arguments)
    profile, numbers = fit_to_card(profile, True), sorted(set(arguments.seeds))
    print(
        f"Profile {profile.name}, {len(numbers)} seed(s): each trains SFT twice, GRPO thrice, and the closer look "
        "with its three rivals, about the notebooks 3 and 4 of `ivt plan`; what is finished is reused. "
        f"Results go to {run_dir}."
    )
    seeds(Run(profile, 0, run_dir), numbers, arguments.steps)
    report_from(run_dir)
    return 0


def closer_command(arguments) -> int:
    """Return 0 after training and scoring the closer look on each seed, and printing its table."""
    from ivt_utils.closer import run_closer
    from ivt_utils.metrics import Resampling
    from ivt_utils.profiles import get_profile
    from ivt_utils.records import load_split
    from ivt_utils.runtime import pace
    from ivt_utils.runtime.store import Run
    from ivt_utils.runtime.text import aligned
    from ivt_utils.show.reading import closer_from
    from ivt_utils.show.report import report_from
    from ivt_utils.show.tables import closer_table

    profile = get_profile(arguments.profile)
    for change in arguments.set:
        name, _, value = change.partition("=")
        kinds = {"zoom": float, "looks": int, "least_view": int, "closer_steps": int}
        try:
            number = kinds[name](value)
        except (KeyError, ValueError):
            number = 0
        if not 1 <= number < 1e6 or arguments.run_dir is None:
            raise ValueError(
                "--set takes zoom=, looks=, least_view= or closer_steps= with a number from 1 on "
                "(zoom may have decimals), and a --run-dir of its own."
            )
        profile = replace(profile, **{name: number})
    profile = fit_to_card(profile, False)
    split = arguments.split
    train, records = load_split(profile, "train"), load_split(profile, split)
    run = Run(profile, 0, arguments.run_dir and own_folder(arguments.run_dir.resolve()))
    seconds = pace.timings().get("closer") if profile.name == "micro" else None
    cost = (
        f"about {seconds * len(arguments.seeds) / 60:.0f} min from scratch on {pace.machine()}"
        if seconds
        else "how long that takes was not measured"
    )
    print(f"Profile {profile.name}: the closer look, {len(arguments.seeds)} seed(s): {cost}. Results go to {run.root}.")
    run_closer(run, arguments.seeds, train, records, split)
    if split == "test" and (run.root / "results.json").exists():
        report_from(run.root)  # ends with the same table
    else:
        rows = closer_from(run.root, Resampling(0, profile.resamples), split)
        print(f"{split} split\n{aligned(closer_table(rows))}")
    return 0


def build_command(arguments) -> int:
    """Return 0 after making one of the shipped parts again."""
    from ivt_utils.course.book import write_pages
    from ivt_utils.runtime.files import DATA, ROOT, note_files
    from ivt_utils.runtime.store import ship_reference
    from ivt_utils.runtime.text import write_between

    if arguments.repository and arguments.what != "notebooks":
        raise ValueError(f"--repository goes with ivt build notebooks, and not with ivt build {arguments.what}.")
    run_dir = (arguments.run_dir or ROOT / "runs" / "micro").resolve()
    if arguments.what == "student":
        from ivt_utils.micro.pretrain import train_student

        product = train_student(DATA / "student", arguments.seed)
    elif arguments.what == "benchmark":
        from ivt_utils.micro.benchmark import build_benchmark

        product = build_benchmark(seed=arguments.seed)
    elif arguments.what == "notebooks":
        from ivt_utils.course.lessons import build_notebooks
        from ivt_utils.course.setting_up import name_repository

        if arguments.repository:
            name_repository(arguments.repository)
        product = build_notebooks()
    elif arguments.what == "guide":
        from ivt_utils.course.guide import keep_timings, write_guide

        keep_timings(run_dir)
        product = write_guide()
    elif arguments.what == "docs":
        from ivt_utils.paper_scale.plan import CONFIGURATIONS, plan_text
        from ivt_utils.profiles import get_profile

        note_files(DATA, ["paper_results.json"])  # these are written by hand
        note_files(DATA / "qwen3vl", CONFIGURATIONS.values())
        for name in ("paper", "colab"):
            text = f"```text\n{plan_text(get_profile(name), warn=False)}\n```\n"
            write_between(ROOT / "docs" / "researcher.md", f"plan {name}", text)
        product = write_pages()
    elif arguments.what == "live":
        from ivt_utils.course.live import build_live

        product = build_live()
    else:
        from ivt_utils.closer import SHIPPED

        product = ship_reference(run_dir, (*ADAPTERS, SHIPPED))
        write_pages()
    print(f"Made {product}.")
    return 0


def doctor_command(arguments) -> int:
    """Return 0 when nothing needed is missing, else 1, after printing what `examine` found and the cost."""
    from ivt_utils.course.doctor import MISS, examine
    from ivt_utils.course.execute import PROJECT, cost, find_notebooks
    from ivt_utils.profiles import get_profile

    profile = get_profile(arguments.profile)
    lines = examine(PROJECT, profile)
    for tag, text in lines:
        print(f"[{tag}] {text}")
    missing = sum(tag == MISS for tag, _ in lines)
    if not missing:
        print(cost(profile, find_notebooks(PROJECT / "notebooks")))
    print(f"Missing: {missing} of what is needed." if missing else "Nothing needed is missing.")
    return 1 if missing else 0


def fail(sentence: str, code: int) -> int:
    """Return the exit code after printing the sentence on stderr."""
    print(sentence if distributed.rank() == 0 else f"[process {distributed.rank()}] {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

"""Several processes, one result: batches shared out in turn, the same answers as one process gives, a kill survived."""

import math
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from ivt_utils import cli
from ivt_utils.methods import ADAPTERS
from ivt_utils.profiles import get_profile
from ivt_utils.runtime import distributed, store
from ivt_utils.runtime.files import ROOT, ArtefactError, read_jsonl
from ivt_utils.runtime.store import Run

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def place(monkeypatch, rank: int, size: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(size))


def doubled(start, stop):
    return [2 * i for i in range(start, stop)]


@pytest.mark.parametrize("count, batch", [(0, 3), (1, 3), (6, 3), (7, 3), (5, 1)])
def test_one_process_has_all_rows_in_order(count, batch):
    assert distributed.each_batch(doubled, count, batch) == doubled(0, count)


@pytest.mark.parametrize("size", [2, 3])
def test_processes_take_whole_batches_in_turn_and_each_gets_all_rows(size, monkeypatch):
    seen, given = [], []

    def work(start, stop):
        seen.append((start, stop))
        return doubled(start, stop)

    for rank in range(size):  # what each process would hand over
        place(monkeypatch, rank, size)
        monkeypatch.setattr(distributed, "gather", lambda own: given.extend(own) or [])
        distributed.each_batch(work, 7, 2)
    assert sorted(seen) == [(0, 2), (2, 4), (4, 6), (6, 7)] and len(seen) == 4
    monkeypatch.setattr(distributed, "gather", lambda own: given)
    assert distributed.each_batch(work, 7, 2) == doubled(0, 7)


@pytest.mark.parametrize(
    "size, device_batch, held, times",
    [
        (1, 0, 48, 1),
        (1, 4, 4, 12),
        (2, 0, 24, 1),
        (8, 4, 3, 2),
        (1, 100, 48, 1),
        (16, 2, 1, 3),
    ],
)
def test_processes_learn_from_one_batch_together(size, device_batch, held, times, monkeypatch):
    place(monkeypatch, 0, size)
    settings = distributed.batch_share(48, device_batch)
    assert settings == {"per_device_train_batch_size": held, "gradient_accumulation_steps": times}
    assert held * times * size == 48


@pytest.mark.parametrize(
    "size, prompts, device_batch, most, at_once",
    [
        (1, 4, 0, 6, 24),
        (1, 4, 6, 6, 6),
        (1, 4, 6, 18, 12),
        (1, 4, 6, 0, 24),
        (1, 4, 4, 6, 12),
        (1, 2, 2, 6, 6),
        (1, 4, 1, 6, 6),
        (2, 4, 4, 6, 12),
        (2, 2, 0, 0, 6),
        (8, 4, 0, 0, 3),
    ],
)
def test_grpo_generates_whole_groups_as_many_as_are_allowed(size, prompts, device_batch, most, at_once, monkeypatch):
    place(monkeypatch, 0, size)
    found = distributed.batch_share(prompts * 6, device_batch, 6, most)
    held, times, generated = found.values()
    assert held * generated == at_once and (held * generated * size) % 6 == 0 and times % generated == 0


def test_one_process_uses_one_card_of_several():
    """As TRL demands; what the trainer would make of two cards in one process is refused there."""
    config = distributed.one_card(SimpleNamespace(n_gpu=2, _n_gpu=2))
    assert config._n_gpu == 1
    assert distributed.one_card(SimpleNamespace(n_gpu=0, _n_gpu=0))._n_gpu == 0


def test_other_commands_refuse_several_processes(monkeypatch, capsys):
    place(monkeypatch, 0, 2)
    for words in (["run"], ["report", "--from", "."], ["data"], ["plan"], ["closer"]):
        assert cli.main(words) == 2
        assert "without accelerate" in capsys.readouterr().err


@pytest.mark.parametrize("batch, size", [(4, 3), (4, 8)])
def test_a_batch_that_cannot_be_shared_is_one_sentence(batch, size, monkeypatch):
    place(monkeypatch, 0, size)
    with pytest.raises(ValueError, match=f"{batch} cannot be shared equally by {size} processes; launch"):
        distributed.batch_share(batch)


def test_only_process_0_writes_and_all_take_the_stage_it_wrote(tmp_path, monkeypatch):
    """Two processes in turn; `agree` gives what process 0 said."""
    said, smoke = [], get_profile("smoke")
    for name in ("wait", "start"):
        monkeypatch.setattr(distributed, name, lambda: None)
    monkeypatch.setattr(distributed, "agree", lambda value: value if distributed.rank() == 0 else said.pop(0))
    place(monkeypatch, 1, 2)
    monkeypatch.setattr(store, "LATE", -1)
    said[:] = [False]
    with pytest.raises(ArtefactError, match="run.json, and process 1 does not see it: the machines of a run need one"):
        Run(smoke, 0, tmp_path / "run")  # process 0 has written it somewhere else
    assert not list(tmp_path.rglob("*.jsonl")) and not list(tmp_path.rglob("*.json"))
    place(monkeypatch, 0, 2)
    run = Run(smoke, 0, tmp_path / "run")
    rows = run.rollouts("a", lambda: [{"id": "from process 0"}])
    table = run.rows("t", lambda: 1)
    place(monkeypatch, 1, 2)
    said[:] = [True, False, False]
    run = Run(smoke, 0, tmp_path / "run")
    assert run.rollouts("a", lambda: [{"id": "from process 1"}]) == rows == [{"id": "from process 0"}]
    assert run.rows("t", lambda: 2) == table == 1


def test_what_process_0_writes_may_be_seen_late(tmp_path, monkeypatch):
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            (tmp_path / "run.json").touch()

    monkeypatch.setattr(store.time, "sleep", sleep)
    place(monkeypatch, 1, 2)
    store.await_file(tmp_path / "run.json")
    assert len(waited) == 3
    place(monkeypatch, 0, 2)
    store.await_file(tmp_path / "its own")


# ------------------------------------------------------------------------------------------------ two real processes
def launch(stage: str, root: Path, *more, **options):
    command = [
        Path(sys.executable).with_name("accelerate"),
        "launch",
        "--config_file",
        ROOT / "configs" / "cpus.yaml",
        *more,
        "-m",
        "ivt_utils.cli",
        stage,
        "--profile",
        "smoke",
        "--run-dir",
        root,
    ]
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen([str(word) for word in command], cwd=ROOT, env=clean, text=True, **options)


def finish(process) -> str:
    try:
        out, _ = process.communicate(timeout=240)
    finally:
        end(process)
    assert process.returncode == 0, out
    return out


def end(process) -> None:
    """Let nothing that was launched outlive its test."""
    if process.poll() is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()


@pytest.fixture(scope="session")
def pair(slow, tmp_path_factory):
    """A run by two processes: evaluation, SFT and GRPO of the smoke profile, and what they printed."""
    root = tmp_path_factory.mktemp("pair") / "run"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return root, {stage: finish(launch(stage, root, **pipes)) for stage in ("eval", "sft", "grpo")}


def test_two_processes_give_the_answers_of_one(pair, smoke_run):
    """The notebooks ran in one process; the base student's answers are the same bytes, so is the harvest."""
    for name in ("base_ivt", "base_ivt_bare", "train_step0", "trajectories"):
        two, one = ((root / "rollouts" / f"{name}.jsonl").read_bytes() for root in (pair[0], smoke_run[0]))
        assert two == one


def test_two_machines_give_the_answers_of_one(pair, tmp_path):
    """Each launches one process, as the launchers of two machines do that share the folder of the run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    to = ("--num_machines", 2, "--num_processes", 2, "--main_process_ip", "127.0.0.1", "--main_process_port", port)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    other, first = (launch("eval", tmp_path / "run", *to, "--machine_rank", k, **pipes) for k in (1, 0))
    try:
        assert "2 process(es)" in finish(first)
        assert "process(es)" not in finish(other)
    finally:
        end(other)
    for name in ("base_ivt", "base_ivt_bare", "train_step0"):
        two, one = ((root / "rollouts" / f"{name}.jsonl").read_bytes() for root in (tmp_path / "run", pair[0]))
        assert two == one


def test_two_processes_train_and_answer_and_process_0_speaks(pair):
    root, said = pair
    adapters = {path.name for path in (root / "adapters").iterdir()}
    assert adapters == {*ADAPTERS}
    for name in ("sft_ivt", "sft_grpo_ivt", "grpo_single"):
        rows = Run(get_profile("smoke"), 0, root).rollouts(name, lambda: pytest.fail("the stage is not there"))
        assert len(rows) == get_profile("smoke").test
    assert all(out.count("Results go to") == 1 and "2 process(es)" in out for out in said.values())
    learned = load_file(root / "adapters" / "sft" / "adapter_model.safetensors")
    assert any(value.abs().max() > 0 for name, value in learned.items() if "lora_B" in name)


def test_a_killed_process_ends_the_run_clearly_and_the_same_command_ends_on_the_same_adapter(pair, tmp_path):
    """Process 1 is killed in the middle of SFT, after a checkpoint."""
    root, whole = tmp_path / "run", pair[0]
    kept = ("rollouts/train_step0", "rollouts/trajectories")  # the harvest is done
    run, done = Run(get_profile("smoke"), 0, root), Run(get_profile("smoke"), 0, whole)
    for name in kept:
        run.rollouts(name.removeprefix("rollouts/"), lambda name=name: read_jsonl(whole / f"{name}.jsonl"))
    assert {run.stages()[name]["sha256"] for name in kept} == {done.stages()[name]["sha256"] for name in kept}

    with open(tmp_path / "said", "w+") as said:
        process = launch("sft", root, stdout=said, stderr=said)
        training = root / "adapters" / "sft.training"
        deadline = time.time() + 120
        try:
            while not list(training.glob("checkpoint-*/trainer_state.json")):
                assert time.time() < deadline and process.poll() is None, (tmp_path / "said").read_text()
                time.sleep(0.01)
            workers = [p for p in psutil.Process(process.pid).children() if "ivt_utils.cli" in p.cmdline()]
            next(p for p in workers if p.environ().get("RANK") == "1").kill()
            assert process.wait(timeout=120) != 0
        finally:
            end(process)
    told = (tmp_path / "said").read_text()
    assert "another process of this run has died" in told and "the same command goes on" in told
    assert not (root / "adapters" / "sft").exists()
    checkpoint = max(int(path.parent.name.split("-")[1]) for path in training.glob("checkpoint-*/trainer_state.json"))

    out = finish(launch("sft", root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    start = out.split("training:")[1]  # the first of two trainings
    assert not start.startswith("   0%") and f" {checkpoint}/" in start  # it did not begin anew
    again, unbroken = (load_file(r / "adapters" / "sft" / "adapter_model.safetensors") for r in (root, whole))
    assert again.keys() == unbroken.keys()
    assert all((again[name] - unbroken[name]).abs().max() < 1e-6 for name in again)
    assert (root / "rollouts" / "sft_ivt.jsonl").read_bytes() == (whole / "rollouts" / "sft_ivt.jsonl").read_bytes()


# ------------------------------------------------------------------------------------------------ configurations
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_each_configuration(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_machines == 1 and config.use_cpu == (path.stem == "cpus")
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"accelerate launch --config_file configs/{path.name}" in line for line in head)


def test_every_configuration_keeps_the_students_weights_whole():
    """Rollouts and evaluation need them at every token, and 4-bit weights are small."""
    for path in CONFIGS:
        config = yaml.safe_load(path.read_text())
        assert config["distributed_type"] not in ("FSDP", "DEEPSPEED")  # the latter casts the adapter to bfloat16, too


# ------------------------------------------------------------------------------------------------ several machines
PAGE = (ROOT / "docs" / "researcher.md").read_text()
SLURM, SKY = re.search(r"```bash\n(#!/bin/bash\n.+?)```.+?```yaml\n(.+?)```", PAGE, re.DOTALL).groups()


def launched(script: str, folder: Path, **environment) -> list[list[str]]:
    """What a script of the page gives to accelerate; `srun` is a loop over two machines here, and `cd` does nothing."""
    programs = {
        "accelerate": 'echo "$@" >> "$SAID"',
        "scontrol": "printf 'one\\ntwo\\n'",
        "srun": 'shift; SLURM_NODEID=0 "$@" && SLURM_NODEID=1 "$@"',
    }
    for name, does in programs.items():
        (folder / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / name).chmod(0o755)
    run = "cd() { :; }; source() { :; }\n" + script
    clean = {"PATH": f"{folder}:{os.environ['PATH']}", "SAID": str(folder / "said"), **environment}
    subprocess.run(["bash", "-c", run], check=True, env=clean)
    return [shlex.split(line) for line in (folder / "said").read_text().splitlines()]


def test_the_pages_scripts_launch_every_stage_on_each_machine(tmp_path):
    slurm = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "x", "SLURM_CPUS_PER_TASK": "8"}
    calls, task = launched(SLURM, tmp_path, **slurm), yaml.safe_load(SKY)
    assert task["num_nodes"] == 2
    for rank in ("0", "1"):
        (tmp_path / "said").unlink()
        sky = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "4", "SKYPILOT_NODE_IPS": "one\ntwo"}
        found = launched(task["run"], tmp_path, **sky, SKYPILOT_NODE_RANK=rank)
        ports = {call[call.index("--main_process_port") + 1] for call in found}
        assert len(ports) == len(found)  # no stage meets the launcher of the one before
        calls += found
    stages = []
    for call in calls:
        told = dict(zip(call[1::2], call[2::2], strict=False))
        config, machine = told["--config_file"], told["--machine_rank"]
        assert call[0] == "launch" and config == "configs/gpus.yaml" and machine in ("0", "1")
        assert (told["--num_machines"], told["--num_processes"], told["--main_process_ip"]) == ("2", "8", "one")
        words = call[call.index("ivt_utils.cli") + 1 :]
        assert cli.parser().parse_args(words).profile == "paper"
        stages.append((words[0], machine))
    assert sorted(stages) == sorted(2 * [(stage, machine) for stage in cli.STAGES for machine in ("0", "1")])


def test_the_page_names_the_numbers_of_processes_that_share_the_papers_batches():
    paper = get_profile("paper")
    both = math.gcd(paper.sft_batch, paper.grpo_prompts * paper.generations)
    named = re.search(r"In `paper` ([^`]+?)\sprocesses do;", PAGE)
    assert named and [*map(int, re.findall(r"\d+", named[1]))] == [n for n in range(1, both + 1) if both % n == 0]

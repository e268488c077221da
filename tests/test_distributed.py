"""Several processes, one result: batches shared out in turn, the same answers as one process gives, a kill survived."""

import os
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
from ivt_utils.runtime import distributed
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
    "size, prompts, device_batch, at_once",
    [
        (1, 4, 0, 24),
        (1, 4, 6, 6),
        (1, 4, 4, 12),
        (1, 2, 2, 6),
        (1, 4, 1, 6),
        (2, 4, 4, 12),
        (2, 2, 0, 6),
        (8, 4, 0, 3),
    ],
)
def test_grpo_generates_whole_groups_and_few_at_once(size, prompts, device_batch, at_once, monkeypatch):
    place(monkeypatch, 0, size)
    found = distributed.batch_share(prompts * 6, device_batch, 6)
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
    said[:] = [False, False]
    with pytest.raises(ArtefactError):  # process 0 has written nothing, so there is nothing to read
        Run(smoke, 0, tmp_path / "run").rollouts("a", lambda: [{"id": "from process 1"}])
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


# ------------------------------------------------------------------------------------------------ two real processes
def launch(stage: str, root: Path, **options):
    command = [
        Path(sys.executable).with_name("accelerate"),
        "launch",
        "--config_file",
        ROOT / "configs" / "cpus.yaml",
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

"""The whole course at smoke size, through the command that users run; each notebook alone: test_notebook_alone.py."""

import json
import time

import nbformat
import pytest

from ivt_utils import cli
from ivt_utils.controls import SECOND_TURNS, second_turn_stage
from ivt_utils.course.execute import find_notebooks
from ivt_utils.methods import ADAPTERS, ASKED, METHODS
from ivt_utils.pipeline import STAGES as NOTEBOOK_STAGES
from ivt_utils.profiles import get_profile
from ivt_utils.runtime.files import ROOT

NOTEBOOKS = find_notebooks(ROOT / "notebooks")


def test_the_course_runs_whole_and_in_time(smoke_run):
    root, seconds = smoke_run
    assert seconds < 300
    results = json.loads((root / "results.json").read_text())
    assert set(METHODS) <= set(results["methods"])
    assert all(m["n"] == get_profile("smoke").test for m in results["methods"].values())
    rules = results["methods"]["sft_ivt"]["rules"]
    assert len(rules) >= 8 and all(row["acc50"]["n"] == get_profile("smoke").test for row in rules)
    for name in ASKED:
        method = results["methods"][name]
        assert len(method["controls"]) == 8 and "ccr" in method["refinement"]
        assert [row["step"] for row in method["calibration"]] == [0, 1, 2]
    assert len(results["second_turn"]) == 6 and set(results["learning_curve"]) == {"grpo", "grpo_keep"}
    assert len({row["name"] for row in results["ablations"]}) >= 7 and len(results["ablations"]) >= 8
    assert all(row["low"] <= row["value"] <= row["high"] and row["n"] for row in results["ablations"])


def test_every_figure_is_there_with_alt_text(smoke_run):
    root, _ = smoke_run
    for notebook in NOTEBOOKS:
        executed = nbformat.read(root / "notebooks" / notebook.name, as_version=4)
        outputs = [o for cell in executed.cells if cell.cell_type == "code" for o in cell.outputs]
        assert not [o for o in outputs if o.output_type == "error"]
        pictures = [o for o in outputs if "image/png" in o.get("data", {})]
        assert pictures and all(o.metadata.get("image/png", {}).get("alt") for o in pictures)
    assert len(list((root / "figures").glob("*.png"))) >= 10


def test_a_second_run_reuses_everything(smoke_run, capsys):
    root, _ = smoke_run
    before = (root / "stages.json").read_text()
    started = time.time()
    assert cli.main(["run", "--profile", "smoke", "--run-dir", str(root)]) == 0
    assert time.time() - started < 60
    assert (root / "stages.json").read_text() == before


def test_the_stages_as_scripts_give_the_same_answers(smoke_run, tmp_path):
    """`ivt eval`, `sft` and `grpo`, from nothing: every prediction of notebooks 1 to 4, trained or not, is the same."""
    again, root = tmp_path / "again", smoke_run[0]
    for stage in ("eval", "sft", "grpo"):
        assert cli.main([stage, "--profile", "smoke", "--run-dir", str(again)]) == 0
    made = sorted(path.name for path in (again / "rollouts").glob("*.jsonl"))
    notebooks = (METHODS.keys() - {"base_single"}) | {"train_step0", "trajectories", "trajectories_keep"}
    notebooks |= {second_turn_stage(*turn) for turn in SECOND_TURNS}
    assert {f"{name}.jsonl" for name in notebooks} == set(made)
    for name in made:
        assert (again / "rollouts" / name).read_bytes() == (root / "rollouts" / name).read_bytes()


def test_the_notebooks_and_the_scripts_know_the_stages_by_the_same_names(smoke_run, capsys):
    for stage in NOTEBOOK_STAGES:
        assert cli.main([stage, "--profile", "smoke", "--run-dir", str(smoke_run[0])]) == 0
        assert "Made 0 stages" in capsys.readouterr().out


def test_the_report_needs_no_model(smoke_run, capsys):
    root, _ = smoke_run
    first = json.loads((root / "results.json").read_text())
    assert cli.main(["report", "--from", str(root)]) == 0
    again = json.loads((root / "results.json").read_text())
    assert again["methods"] == first["methods"] and again["differences"] == first["differences"]
    assert "oracle" in capsys.readouterr().out


@pytest.mark.slow
def test_the_dry_run_walks_through_the_papers_settings(tmp_path, capsys):
    """Every notebook, on data prepared from files with the Hub's schemas, with the micro student."""
    root, paper = tmp_path / "dry", get_profile("paper")
    assert cli.main(["run", "--profile", "paper", "--dry-run", "--run-dir", str(root)]) == 0
    assert "numbers mean nothing" in capsys.readouterr().out
    values = json.loads((root / "run.json").read_text())["values"]
    assert values["student"] == "data/student" and values["data"] == "hub" and values["train"] == values["test"] == 8
    same = (
        "turns",
        "style",
        "max_new_tokens",
        "harvest_max_iou",
        "lora_rank",
        "lora_alpha",
        "sft_lr",
        "sft_batch",
        "grpo_prompts",
        "generations",
        "grpo_lr",
        "beta",
        "format_bonus",
        "temperature",
        "scale_rewards",
        "load_in_4bit",
        "data_seed",
    )
    assert {name: values[name] for name in same} == {name: getattr(paper, name) for name in same}
    results = json.loads((root / "results.json").read_text())
    assert {name for name in METHODS if not name.endswith("_long")} == set(results["methods"])  # it has no longer loop
    assert all(method["n"] == 8 for method in results["methods"].values())
    subsets = {row["subset"] for row in map(json.loads, (root / "rollouts" / "base_ivt.jsonl").open())}
    assert subsets == {"refcocog", "ref_adv_s", "ref_l4"}
    for name in ADAPTERS:
        assert json.loads((root / "adapters" / name / "adapter_config.json").read_text())["r"] == paper.lora_rank
    assert len(list((root / "notebooks").glob("0*.ipynb"))) == len(NOTEBOOKS)
    assert "using the reference result" not in (root / "notebooks" / NOTEBOOKS[3].name).read_text()

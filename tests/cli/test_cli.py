"""The command: what it prints, what it calls, and how it fails."""

import io
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from helpers import ROOT, error_line
from tiny_plugs import YAML

from customized_grpo.cli import main as cli
from customized_grpo.cli.main import main
from customized_grpo.cli.shared import free_path
from customized_grpo.errors import RewardError
from customized_grpo.evaluation import study as compare
from customized_grpo.evaluation import tables as evaluation_tables
from customized_grpo.evaluation.evaluate import current_outcome
from customized_grpo.evaluation.report import page, tables


@pytest.fixture(autouse=True)
def config(tmp_path, monkeypatch) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(YAML)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return path


@pytest.fixture
def calls(monkeypatch, tmp_path) -> list:
    """Replaces training and evaluation by a record of what they were called with."""
    calls = []
    trainer, evaluate, hero = (ModuleType(name) for name in ("trainer", "evaluate", "hero"))

    def train(config, *, resume, allow_changed):
        calls.append(config)
        return tmp_path / config.name

    def evaluate_run(run, split="held_out", num_examples=None):
        calls.append((run, split, num_examples))
        return SimpleNamespace(to_json=lambda: "{}\n")

    trainer.train, evaluate.evaluate_run = train, evaluate_run  # pyright: ignore
    evaluate.current_outcome = current_outcome  # pyright: ignore
    evaluate.Place = lambda run, split: SimpleNamespace(grid=run / "grid.png")  # pyright: ignore
    for table in ("run_table", "share_table"):
        monkeypatch.setattr(evaluation_tables, table, lambda outcome: "base tuned")
    monkeypatch.setattr(evaluation_tables, "verdict", lambda outcome: "It is better.")
    monkeypatch.setattr(evaluation_tables, "makes_a_difference", lambda outcome: True)
    monkeypatch.setitem(sys.modules, "customized_grpo.training.train", trainer)
    monkeypatch.setitem(sys.modules, "customized_grpo.evaluation.evaluate", evaluate)
    hero.save_hero = lambda path, run, heading: calls.append(path)  # pyright: ignore
    monkeypatch.setitem(sys.modules, "customized_grpo.evaluation.hero", hero)
    return calls


def test_train_trains_and_ends_with_the_run(capsys, calls):
    assert main(["train", "run.yaml", "--seed", "3"]) == 0
    assert [c.seed for c in calls] == [3]
    out = capsys.readouterr().out
    assert "test" in out.splitlines()[-1]


def test_evaluate_opens_with_the_picture(capsys, calls):
    assert main(["evaluate", "runs/x"]) == 0
    assert main(["evaluate", "runs/x", "--split", "validation", "--num-examples", "9"]) == 0
    assert calls == [(Path("runs/x"), "held_out", None), (Path("runs/x"), "validation", 9)]
    out, err = capsys.readouterr()
    table = "base tuned; rows: docs/evaluation.md"
    assert out == f"picture: runs/x/grid.png\n{table}\nIt is better.\n" * 2
    assert err == "next: cgrpo export runs/x --to hub-folder --out x-lora\n" * 2
    assert main(["evaluate", "runs/x", "--json"]) == 0
    assert capsys.readouterr().out == "{}\n"


@pytest.mark.parametrize(
    ("command", "name"),
    [("evaluate runs/x", "evaluate RUN"), ("compare study.yaml", "compare"), ("demo", "demo"),
     ("generate runs/x --prompt p --reference r.png", "generate")],
)  # fmt: skip
def test_what_one_process_does_is_refused_to_several(
    capsys, calls, monkeypatch, command: str, name: str
) -> None:
    """They would take the same GPU and write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    assert main(command.split()) == 2
    err = capsys.readouterr().err
    assert f"WORLD_SIZE must be 1 for `cgrpo {name}`, which one process does, got 8;" in err
    assert calls == []


def test_a_name_that_the_terminal_cannot_write(monkeypatch, calls) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["evaluate", "runs/\u7167"]) == 0
    stdout.flush()
    assert stdout.buffer.getvalue().startswith(b"picture: runs/\\u7167/grid.png\n")


@pytest.mark.slow
def test_what_libraries_say_at_their_import_is_for_those_who_ask(monkeypatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.delenv("TORCH_LOGS", raising=False)
    code = (
        "from customized_grpo.cli.main import main; main(['version']); import torchao, bitsandbytes"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr == ""
    logging.getLogger("torchao").setLevel(logging.NOTSET)
    monkeypatch.setenv("TORCH_LOGS", "recompiles")
    assert main(["version"]) == 0
    assert logging.getLogger("torchao").level == logging.NOTSET


def test_commands_in_reports_can_be_pasted(capsys, monkeypatch) -> None:
    monkeypatch.setattr(page, "write_report", lambda results, folder, command, pictures: command)
    monkeypatch.setattr(page, "run_pictures", lambda results, runs: {})
    monkeypatch.setattr(page, "study_pictures", lambda results, folder: {})
    monkeypatch.setattr(tables, "markdown", lambda results: "")
    monkeypatch.setattr(compare, "results_of_runs", lambda runs: None)
    monkeypatch.setattr(compare, "compare", lambda *arguments: None)
    monkeypatch.setattr(compare.Study, "load", lambda *paths: SimpleNamespace(results=Path()))
    for words in (
        ["report", "my runs/a", "b", "--out", "my page"],
        ["compare", "my study.yaml", "--results", "my results"],
        ["compare", "my study.yaml", "--add", "a={advantage.gamma: 0.2}", "--add", "b=b.yaml"],
    ):
        assert main(words) == 0
        assert capsys.readouterr().out.strip() == f"report: {shlex.join(['cgrpo', *words])}"


def test_a_numbered_file_keeps_its_suffix_and_a_folder_has_none(tmp_path: Path) -> None:
    file, folder = tmp_path / "x.png", tmp_path / "v1.5"
    assert free_path(file) == file
    for name in ("x.png", "x-2.png"):
        (tmp_path / name).touch()
    folder.mkdir()
    assert free_path(file).name == "x-3.png"
    assert free_path(folder).name == "v1.5-2"


def test_evaluate_takes_a_benchmark(capsys) -> None:
    emoji = str(ROOT / "configs" / "benchmarks" / "emoji.yaml")
    small = ["--benchmark.num_examples", "4", "--sampling.num_steps", "2", "--name", "small"]
    assert main(["evaluate", emoji, *small]) == 0
    out = capsys.readouterr().out
    assert out.startswith("# small on emoji\n")
    assert out.endswith("gallery: evaluations/small/gallery.html\n")
    assert main(["evaluate", emoji, *small, "--json"]) == 0
    out = capsys.readouterr().out
    assert out == Path("evaluations/small/benchmark.json").read_text()
    assert json.loads(out)["complete"] is True


def test_evaluate_help_of_a_benchmark_shows_its_fields(capsys) -> None:
    assert main(["evaluate", str(ROOT / "configs" / "benchmarks" / "emoji.yaml"), "--help"]) == 0
    out = capsys.readouterr().out
    assert "--sampling.num_steps = 6" in out
    assert "Pictures per prompt" in out
    assert "--metrics.0.path" in out


def test_demo_trains_the_shipped_config_and_evaluates(capsys, calls, tmp_path):
    assert main(["demo", "--updates", "4", "--seed", "2"]) == 0
    config, (run, split, num_examples), picture = calls
    assert (config.train.num_updates, config.seed, config.name) == (4, 2, "demo-seed2")
    assert (run, split, num_examples) == (tmp_path / "demo-seed2", "held_out", None)
    assert picture == tmp_path / "demo-seed2" / "demo.png"
    assert capsys.readouterr().out.endswith("base tuned\nIt is better.\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train"], "required: CONFIG; see `cgrpo train --help`"),
        (["resume", "--seed", "3", "runs/x"], "RUN must come first, got --seed"),
        (["train", "--seed", "3", "run.yaml"], "CONFIG must come first, got --seed"),
        (["train", "nothing.yaml"], "nothing.yaml': No such file"),
        (["train", "."], "it is a folder"),
        (["train", "run.yaml", "--sed", "3"], "did you mean '--seed'?"),
        (["train", "run.yaml", "--rollout.group_size", "1"], "rollout.group_size"),
        (["train", "run.yaml", "--train.betas", "[0.9, 0.99]"], "write its items with spaces"),
        (["train", "nothing.yaml", "--help"], "nothing.yaml': No such file"),
        (["trane", "run.yaml"], "invalid choice: 'trane'"),
        (["evaluate"], "TARGET"),
        (["evaluate", "runs/x", "--seed", "3"], "--seed has no effect on a run"),
        (["evaluate", "bench.yaml", "--split", "validation"], "--split has no effect on a bench"),
        (["evaluate", "bench.yaml"], "TARGET must be a readable YAML file, got 'bench.yaml'"),
        (["doctor", "--train.num_updates", "100", "run.yaml"], "CONFIG must come first, got --tra"),
        (["estimate", "--train.num_updates", "9", "run.yaml"], "write `cgrpo estimate CONFIG [--"),
        (["evaluate", "--json", "--name", "x", "b.yaml"], "CONFIG must come first, got --name"),
        (["estimate", "--price", "2", "run.yaml", "--sed", "1"], "did you mean '--seed'?"),
        (["replay", "runs/x", "--hel"], "unrecognized arguments: --hel"),
        (["demo", "--updates", "many"], "--updates"),
        (["demo", "--updates", "0"], "train.num_updates must be greater than 0"),
    ],
)
def test_a_mistake_gets_one_line_and_nothing_runs(capsys, calls, arguments, expected):
    assert expected in error_line(capsys, *arguments)
    assert calls == []


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RewardError("rewards: none\ncould be scored"), 2, "error: rewards: none could be scored"),
        (FileNotFoundError(2, "No such file", "a.png"), 2, "error: a.png: No such file"),
        (OSError("many\nlines"), 2, "error: many lines"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_failing_run_gets_one_line(capsys, monkeypatch, calls, error, code, line):
    def fail(config, *, resume, allow_changed):
        raise error

    monkeypatch.setattr(sys.modules["customized_grpo.training.train"], "train", fail)
    assert main(["train", "run.yaml"]) == code
    assert capsys.readouterr().err == f"cgrpo: {line}\n"


def test_debug_adds_the_traceback(capsys):
    for arguments in (["--debug", "train", "x.yaml"], ["train", "x.yaml", "--debug"]):
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert "Traceback" in err
        assert err.splitlines()[-1].startswith("cgrpo: error: ")


def test_a_bug_is_not_dressed_up_as_a_user_s_mistake(monkeypatch, calls):
    def fail(config, *, resume, allow_changed):
        raise ZeroDivisionError

    monkeypatch.setattr(sys.modules["customized_grpo.training.train"], "train", fail)
    with pytest.raises(ZeroDivisionError):
        main(["train", "run.yaml"])


def test_train_help_lists_fields_and_plugs(capsys):
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--rollout.group_size = 12" in out
    assert "Samples G of one prompt" in out
    assert "Types: clip-" in out
    assert ", dinov2" in out
    assert 'or {"type": "nft", "old_decay": 0.5,' in out  # what the section could be instead
    assert "\n          beta: How far the policies" in out  # and what its fields are
    assert {"arXiv:2509.16117", "arXiv:2509.25050", "arXiv:2605.06507"} <= set(
        re.findall(r"arXiv:[\d.]+\d", out)
    )
    assert "--generator.path" not in out


def test_train_help_of_a_config_shows_its_values(capsys):
    assert main(["train", "run.yaml", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--rollout.num_steps = 12" in out
    assert '--generator.path = "here"' in out
    assert "Where the weights lie." in out


def test_plugs_may_lie_beside_the_config(tmp_path, calls):
    source = (ROOT / "tests" / "tiny_plugs.py").read_text()
    (tmp_path / "my_plugs_here.py").write_text(source)
    (tmp_path / "mine.yaml").write_text(YAML.replace("tiny_plugs:", "my_plugs_here:"))
    assert main(["train", "mine.yaml"]) == 0
    assert type(calls[0].data).__module__ == "my_plugs_here"


def test_help_and_version_import_nothing_heavy():
    names = ("evaluate", "init", "serve-reward", "generate", "export", "doctor", "watch")
    words = [["--help"], ["--version"], ["version"], *([name, "-h"] for name in names)]
    code = f"""
import sys
from customized_grpo.cli.main import main
assert [main(arguments) for arguments in {words}] == [0] * {len(words)}
assert not {{"torch", "pydantic", "yaml", "diffusers"}} & set(sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.count("usage: cgrpo") == 8


def test_train_help_does_not_import_torch():
    code = "import sys; from customized_grpo.cli.main import main; main(['train', '--help']);"
    subprocess.run([sys.executable, "-c", f"{code} assert 'torch' not in sys.modules"], check=True)


def test_cgrpo_alone_prints_its_help(capsys) -> None:
    assert main([]) == 0
    assert "commands:" in capsys.readouterr().out


@pytest.mark.slow
def test_estimate_prints_tables_or_json(capsys) -> None:
    emoji = str(ROOT / "configs" / "emoji.yaml")
    arguments = ["estimate", emoji, "--device", "h100", "--num-devices", "8", "--mfu", "0.5"]
    assert main([*arguments, "--price", "2", "--rollout.group_size", "4", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["counts"]["samples"] == 8 * 4
    assert result["cluster"]["rollout_mfu"] == 0.5
    assert result["cost"] == 2 * result["device_hours"] > 0
    assert set(result["memory"]) == {"ddp", "ddp+checkpointing", "fsdp", "fsdp+checkpointing"}
    assert main(arguments) == 0
    out = capsys.readouterr().out
    for text in ("96 images", "480 trained pairs", "rollout", "GB per device", "fsdp", "--price"):
        assert text in out
    for text in (
        "RAM for loading: up to 0.034 GB",
        "at $2.69 a device hour (RunPod, 2026-11; yours by",
    ):
        assert text in out
    only = ["estimate", emoji, "--device", "h100", "--tflops", "90", "--memory", "20"]
    assert main(only) == 0
    out = capsys.readouterr().out
    assert "1 x h100 with 90 TFLOP/s and 20 GB; --price gives the cost" in out


def test_estimate_names_what_it_cannot_take(capsys, caplog) -> None:
    emoji = str(ROOT / "configs" / "emoji.yaml")
    assert "did you mean" in error_line(capsys, "estimate", emoji, "--rollout.group_sise", "4")
    assert "--device must be" in error_line(capsys, "estimate", emoji, "--device", "h1000")
    both = ("--mfu", "0.3", "--benchmark", "mfu.json")
    assert "--mfu must be left out" in error_line(capsys, "estimate", emoji, *both)
    assert caplog.messages == []  # nothing is counted before all flags are right
    assert "generator.type must be" in error_line(capsys, "estimate", "run.yaml")
    assert caplog.messages == ["counting the operations and bytes of the run"]


@pytest.mark.parametrize("words", [["train", "--help"], ["--help"], ["version"]])
def test_a_reader_that_has_read_enough_is_no_error(words, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # argparse ignores it then, by itself
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "customized_grpo", *words]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT)
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode == 128 + signal.SIGPIPE


def test_a_closed_output_is_no_error():
    command = f"{shlex.quote(sys.executable)} -m customized_grpo version >&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_folder_in_the_place_of_its_config_is_named(capsys, tmp_path):
    (tmp_path / "mine").mkdir()
    assert "got 'mine': it is a folder, a pipe or a device; check the path" in error_line(
        capsys, "train", "mine"
    )
    (tmp_path / "mine" / "config.yaml").write_text(YAML)
    assert "; write mine/config.yaml" in error_line(capsys, "train", "mine")


def test_every_command_has_an_example(capsys):
    (commands,) = (a.choices for a in cli._parser()._actions if isinstance(a.choices, dict))
    for name in commands:
        assert main([name, "--help"]) == 0
        shown = capsys.readouterr().out
        assert re.search(rf"^examples?:\n.*\bcgrpo {name}\b", shown, re.M), name

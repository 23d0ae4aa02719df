"""A whole study on the embedded models, cut down to seconds."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from helpers import ROOT, error_line
from made_up import made_up

from customized_grpo import devices
from customized_grpo.cli.main import main
from customized_grpo.config import ConstantSchedule, dump_config, load_config, read_config
from customized_grpo.config.decoding import to_raw
from customized_grpo.config.names import TAKEN
from customized_grpo.config.shipped import shipped_config
from customized_grpo.errors import CheckpointError, ConfigError
from customized_grpo.evaluation import study as studies
from customized_grpo.evaluation.evaluate import evaluate_run
from customized_grpo.evaluation.outcome import Outcome
from customized_grpo.evaluation.results import Results
from customized_grpo.evaluation.study import RESULTS, Study, compare, results_of_runs, run_task
from customized_grpo.ops import SHAPINGS
from customized_grpo.runs.resume import changes

TINY = {
    "mixed_precision": "no",
    "lora.rank": 4,
    "rollout.num_steps": 3,
    "rollout.num_trained_steps": 1,
    "rollout.group_size": 2,
    "rollout.prompts_per_rollout": 2,
    "train.num_updates": 2,
    "train.inner_updates": 1,
    "train.sample_every": 0,
    "evaluation.num_examples": 6,
    "evaluation.validate_every": 1,
    "evaluation.num_validation": 2,
}
NAIVE = {
    "advantage.shaping": "linear",
    "advantage.center": False,
    "advantage.schedule": {"type": "constant", "prompt": 0.5},
}
STUDIES = ROOT / "configs" / "studies"
BOTH = {"name": "both", "label": "Customized-GRPO"}
LONGER = {"name": "n", "label": "n", "overrides": {"rollout.num_steps": 12}}


def write_study(folder: Path, **changes: object) -> Path:
    study = {
        "name": "tiny",
        "config": str(ROOT / "configs" / "emoji.yaml"),
        "output_dir": str(folder / "runs"),
        "overrides": TINY,
        "num_seeds": 2,
        "main": "both",
        "methods": [
            {"name": "naive", "label": "naive GRPO 1:1", "overrides": NAIVE},
            BOTH,
        ],
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(study | changes))
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    file = write_study(tmp_path_factory.mktemp("study"))
    return file, compare(Study.load(file), jobs=1)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_every_cell_is_run_judged_and_kept(finished: tuple[Path, Results]) -> None:
    results = finished[1]
    cells = [(cell.method, cell.seed) for cell in results.cells]
    assert cells == [("naive", 0), ("naive", 1), ("both", 0), ("both", 1)]
    assert {"copy", "ground truth", "unrelated", "base"} == set(results.yardstick.models)
    for cell in results.cells:
        assert cell.curve["update"] == [0, 1, 2]
        assert cell.curve["seconds"] == sorted({*cell.curve["seconds"], cell.seconds})
        assert cell.shares["update"] == [1, 2]
        assert len(cell.advantages["identity"]) == 4
        assert len(cell.schedule["weights"]) == 3
        assert cell.seconds > 0
        assert cell.environment["torch"]
    # Methods share base, data, noise and first rollout.
    naive, both = results.of("naive"), results.of("both")
    assert naive[0].advantages == both[0].advantages
    assert naive[0].advantages != naive[1].advantages
    first = [{k: v[0] for k, v in c.curve.items()} for c in results.cells]
    assert all(values == first[0] for values in first)


@pytest.mark.slow
def test_finished_cells_are_not_run_again_and_results_are_the_same_bytes(
    finished: tuple[Path, Results], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("customized_grpo.evaluation.study._run_process", None)
    study = Study.load(finished[0])
    before = tree(study.config.folder)
    compare(study, jobs=1)
    assert tree(study.config.folder) == before
    # Without the run folders, from results that were kept elsewhere: those that come with the docs.
    kept = tmp_path / "kept"
    shutil.copytree(study.config.folder, kept, ignore=shutil.ignore_patterns("naive", "both"))
    elsewhere = write_study(tmp_path, output_dir=str(tmp_path / "runs"))
    again = compare(Study.load(elsewhere, kept), jobs=1)
    assert [c.judgement for c in again.cells] == [c.judgement for c in finished[1].cells]


def test_a_part_of_a_study_can_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study.load(write_study(tmp_path))
    assert [task.name for task in study.chosen(["both"], 1)] == ["both/seed0"]
    assert study.chosen((), None) == list(study.tasks)
    with pytest.raises(ConfigError, match="--methods must be of naive, both, got 'SARS'"):
        study.chosen(["SARS"], None)
    monkeypatch.setattr("customized_grpo.evaluation.study._judge_base", None)  # nothing is begun
    with pytest.raises(ConfigError, match="--methods must be of naive, both, got 'SARS'"):
        compare(study, jobs=1, methods=["SARS"])


@pytest.mark.slow
def test_the_command_prints_the_tables_and_writes_the_same_report_again(
    finished: tuple[Path, Results], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Study.load(finished[0]).config.folder
    assert main(["compare", str(finished[0])]) == 0
    out = capsys.readouterr().out
    assert (folder / "tables.md").read_text() in out
    assert f"report: {folder / 'report.html'}" in out
    before = tree(folder)
    assert main(["report", str(folder)]) == 0
    changed = {name for name, content in tree(folder).items() if content != before[name]}
    assert changed == {"report.html"}  # which names the command
    assert main(["compare", str(finished[0])]) == 0
    assert tree(folder) == before


@pytest.mark.slow
def test_report_compares_with_the_method_that_is_named(
    finished: tuple[Path, Results], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Study.load(finished[0]).config.folder
    before = tree(folder)
    words = ("report", folder, "--out", tmp_path / "page", "--against", "naive")
    assert main([str(word) for word in words]) == 0
    assert "### naive GRPO 1:1 minus the others" in (tmp_path / "page" / "tables.md").read_text()
    assert "--against naive" in (tmp_path / "page" / "report.html").read_text()
    capsys.readouterr()
    line = error_line(capsys, *words[:-1], "none")
    assert line.endswith("--against must be of naive, both, got 'none'\n")
    cells = [str(folder / name / "seed0") for name in ("naive", "both")]
    assert main(["report", *cells, "--out", str(tmp_path / "two"), "--against", cells[1]]) == 0
    assert f"### {cells[1]} minus the others" in (tmp_path / "two" / "tables.md").read_text()
    assert tree(folder) == before


@pytest.mark.slow
def test_report_of_single_runs_takes_seeds_together(
    finished: tuple[Path, Results], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Study.load(finished[0]).config.folder
    cells = ("naive/seed0", "naive/seed1", "both/seed0")
    runs = [folder / name for name in cells]
    assert main(["report", *map(str, runs), "--out", str(tmp_path / "page")]) == 0
    results = results_of_runs(runs)
    seeds = {label: len(results.of(method)) for method, label in results.labels.items()}
    assert seeds == {str(runs[0]): 2, str(runs[2]): 1}
    assert (tmp_path / "page" / "report.html").read_text().count('src="data:') == 6 * 6
    with pytest.raises(CheckpointError, match="must be the folder of a run"):
        results_of_runs([tmp_path])


@pytest.mark.long
@pytest.mark.slow
def test_an_interrupted_cell_is_run_again_and_comes_out_the_same(
    finished: tuple[Path, Results],
) -> None:
    study = Study.load(finished[0])
    folder = study.config.folder / "naive" / "seed1"
    (folder / "finished.json").unlink()  # an evaluated checkpoint is not a finished run
    (study.results / RESULTS).unlink()
    results = compare(study, jobs=1)
    assert results.of("naive")[1].judgement == finished[1].of("naive")[1].judgement


@pytest.mark.long
@pytest.mark.slow
def test_a_failing_cell_is_named_and_the_others_are_kept(tmp_path: Path) -> None:
    file = write_study(tmp_path, num_seeds=2)
    study = Study.load(file)
    blocked = study.config.folder / "naive" / "seed0"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("not a folder")
    with pytest.raises(CheckpointError, match=r"1 of 4 cells failed: naive/seed0 \(see .*log\)"):
        compare(study, jobs=2)
    kept = Results.read(study.results / RESULTS)
    assert len(kept.cells) == 3
    log = (study.config.folder / "naive" / "seed0.log").read_text()
    assert "already holds something else" in log


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"main": "bth"}, r"main must be the name of a method, got 'bth'; did you mean 'both'\?"),
        ({"methods": []}, "methods must have at least 1 item"),
        ({"seed": 3}, "seed must be a known field"),
        ({"config": "nowhere.yaml"}, "CONFIG must be a readable YAML file"),
        (
            {"methods": [BOTH | {"overrides": {"train.lr": 1}}]},
            "method 'both': override must be a field of the config, got --train.lr",
        ),
        ({"methods": [BOTH, BOTH]}, r"methods\.1\.name must be unique, got 'both' twice"),
        *(
            ({"methods": [BOTH | {"name": name}]}, rf"methods\.0\.name must not be '{name}', which")
            for name in ("base", "pictures", "figures")
        ),
        *(
            (
                {"methods": [BOTH | {"label": label}]},
                rf"methods\.0\.label must not be '{label}', as",
            )
            for label in TAKEN
            if "(" not in label
        ),
        ({"overrides": {"output-dir": "x"}}, "overrides must not have output-dir, which the study"),
        ({"methods": [BOTH, LONGER]}, "method 'n': rollout.num_steps must be the same in all m"),
        ({"methods": [BOTH | {"overides": {}}]}, r"methods\.0\.overides must be a known field"),
    ],
)
def test_mistakes_in_a_study_are_named(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Study.load(write_study(tmp_path, **changes))


def test_a_method_can_empty_a_list(tmp_path: Path) -> None:
    overrides = TINY | {"rollout.aspect_ratios": ["1:1"]}
    methods = [BOTH | {"overrides": {"rollout.aspect_ratios": [], "sinks": []}}]
    study = Study.load(write_study(tmp_path, overrides=overrides, methods=methods))
    assert study.task("both/seed0").config.rollout.aspect_ratios == ()


def test_a_cell_of_another_config_is_refused(tmp_path: Path) -> None:
    file = write_study(tmp_path)
    study = Study.load(file)
    folder = study.config.folder / "naive" / "seed0"
    folder.mkdir(parents=True)
    config = dataclasses.replace(study.task("naive/seed0").config, seed=7)
    (folder / "config.yaml").write_text(dump_config(config))
    with pytest.raises(ConfigError, match=r"run with another config \('seed: 7', now 'seed: 0'"):
        compare(study, jobs=1)


def test_what_a_cell_may_differ_in(tmp_path: Path) -> None:
    """Fields that are newer than it, and how fast it was run."""
    study = Study.load(write_study(tmp_path))
    names = [task.name for task in study.tasks]
    assert names == ["naive/seed0", "both/seed0", "naive/seed1", "both/seed1"]
    with pytest.raises(ConfigError, match="--cell must be one of naive/seed0, both/seed0"):
        study.task("both/seed2")
    task = study.task("naive/seed0")
    whole = dump_config(task.config)
    text = "".join(x for x in whole.splitlines(True) if "window:" not in x)
    assert text != whole
    task.check(text, "here")
    moved = dataclasses.replace(task.config, compile=True, output_dir="elsewhere")
    task.check(dump_config(moved), "here")
    settings = dataclasses.replace(task.config.train, ema_decay=0.5)
    with pytest.raises(ConfigError, match=r"ema_decay: 0\.5"):
        task.check(dump_config(dataclasses.replace(task.config, train=settings)), "here")


@cache
def shipped(path: Path) -> Study:
    return Study.load(path)


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=str)
def test_every_shipped_study_loads(path: Path) -> None:
    tasks = [task for task in shipped(path).tasks if task.seed == 0]
    # The methods of the proof differ in nothing but the advantages; this project's in the steps'
    # weights too.
    methods = [task.config for task in tasks if (path.stem, task.method) != ("proof", "ours")]
    shared = {"seed", "data", "generator", "rewards", "evaluators", "evaluation"}
    if path.stem == "proof":
        shared |= {"lora", "rollout", "loss", "train", "mixed_precision", "compile", "device"}
    for name in shared:
        assert len({repr(getattr(config, name)) for config in methods}) == 1, name


def test_the_leaderboard_has_every_shaping_and_takes_the_cells_of_the_proof() -> None:
    board, proof = (
        {task.name: task for task in shipped(STUDIES / f"{name}.yaml").tasks}
        for name in ("leaderboard", "proof")
    )
    assert {task.config.advantage.shaping for task in board.values()} == set(SHAPINGS)
    both = board.keys() & proof.keys()
    naive = {"naive-1to1", "naive-1to1.5"}
    methods = naive | {"customized", "ours", "published", "sars-only", "tdw-only", "min", "gdpo"}
    assert {board[name].method for name in both} == methods
    for name in both:
        board[name].check(dump_config(proof[name].config), "the proof's")


def test_the_best_of_the_leaderboard_is_a_shipped_config() -> None:
    cell = shipped(STUDIES / "leaderboard.yaml").task("awm/seed0").config
    best = load_config(shipped_config("emoji-best.yaml"))
    changed = {field for field, _, _ in changes(to_raw(cell), to_raw(best))}
    assert changed <= {
        *("name", "output_dir", "evaluation.num_validation"),
        *("train.sample_every", "train.save_every"),
        *("rollout.batch_size", "train.micro_batch_size"),  # which change no number
        "rollout.noise_level",  # ode has none
    }


ADDED = {"advantage.gamma": 0.2, "advantage.schedule": {"type": "constant", "prompt": 0.25}}


def test_a_method_is_added_inline_or_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(ADDED))
    file, inline = write_study(tmp_path), f"mine={yaml.safe_dump(ADDED, default_flow_style=True)}"
    study = Study.load(file, None, [inline, f"theirs={tmp_path / 'mine.yaml'}"])
    advantage = study.task("mine/seed1").config.advantage
    assert (advantage.gamma, advantage.schedule) == (0.2, ConstantSchedule(prompt=0.25))
    assert study.task("theirs/seed1").config.advantage == advantage
    told = [f"{m.name}={json.dumps(m.overrides)}" for m in study.added]  # as a cell's process is
    assert Study.load(file, None, told).tasks == study.tasks
    assert [m.label for m in study.config.methods] == [
        "naive GRPO 1:1", "Customized-GRPO", "mine", "theirs"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mine", r"--add must be NAME=OVERRIDES or NAME=FILE, got 'mine'; write for example --add"),
        ("mine=nowhere.yaml", "--add mine must be a readable YAML file, got 'nowhere.yaml'"),
        ("mine={advantage.gamma: 0.2", "--add mine: line 1 must be valid YAML"),
        ("a b={}", "--add a b: name must"),
        ("both={}", r"study\.yaml with --add: methods\.2\.name must be unique, got 'both' twice"),
        (
            "mine={seed: 1}",
            r"with --add: methods\.2\.overrides must not have seed, which the study",
        ),
        ("mine={advantage.gama: 1}", "method 'mine': override must be a field of the config"),
    ],
)
def test_mistakes_in_an_added_method_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Study.load(write_study(tmp_path), None, [text])


@pytest.mark.long
@pytest.mark.slow
def test_an_added_method_runs_and_stays_without_the_flag(
    finished: tuple[Path, Results], tmp_path: Path
) -> None:
    kept, page = tmp_path / "kept", tmp_path / "leaderboard.md"
    kept.mkdir()
    shutil.copy(Study.load(finished[0]).results / RESULTS, kept)
    command = ["compare", str(finished[0]), "--results", str(kept), "--leaderboard", str(page)]
    added = [*command, "--add", f"mine={json.dumps(ADDED)}"]
    assert main([*added, "--methods", "mine", "--seeds", "1"]) == 0
    results = Results.read(kept / RESULTS)
    assert results.yardstick == finished[1].yardstick  # taken from them, not judged again
    report = Outcome.read(Study.load(finished[0]).config.folder / "mine/seed0/evaluation.json")
    assert report.yardstick == finished[1].yardstick
    config = read_config(results.of("mine")[0].config, "mine")
    assert (config.advantage.gamma, config.advantage.schedule.type) == (0.2, "constant")
    assert list(results.labels) == ["naive", "both", "mine"]
    assert ". mine | 1 |" in page.read_text()
    assert "](kept/figures/right-ranking.png)\n" in page.read_text()  # of three methods
    before, page_before = tree(kept), page.read_text()
    assert main([*added, "--methods", "both"]) == 0  # nothing is missing of it
    assert (tree(kept), page.read_text()) == (before, page_before)
    assert main(command) == 0
    changed = {name for name, content in tree(kept).items() if content != before[name]}
    assert changed == {"report.html"}  # which names the command


@pytest.mark.slow
def test_methods_that_the_study_no_longer_names_stay(
    finished: tuple[Path, Results], tmp_path: Path
) -> None:
    study = Study.load(finished[0])
    kept = tmp_path / "kept"
    kept.mkdir()
    shutil.copy(study.results / RESULTS, kept)
    methods = [{"name": "both", "label": "renamed"}]
    fewer = write_study(tmp_path, methods=methods, output_dir=study.config.output_dir)
    results = compare(Study.load(fewer, kept), jobs=1)
    other = write_study(tmp_path, split="validation", output_dir=study.config.output_dir)
    with pytest.raises(ConfigError, match=r"split is 'validation', but 'held_out' in"):
        compare(Study.load(other), jobs=1)
    assert results.labels == {"both": "renamed", "naive": "naive GRPO 1:1"}
    assert len(results.cells) == 4
    assert main(["report", str(kept)]) == 0


@pytest.mark.slow
def test_a_cell_that_another_process_runs_is_left_alone(finished: tuple[Path, Results]) -> None:
    study = Study.load(finished[0])
    folder = study.config.folder / "naive" / "seed0"
    with FileLock(f"{folder}.lock"), pytest.raises(CheckpointError, match="another process"):
        run_task(study, study.task("naive/seed0"))
    assert (folder / "evaluation.json").exists()


@pytest.mark.slow
def test_a_cell_judged_on_other_examples_is_refused(finished: tuple[Path, Results]) -> None:
    study = Study.load(finished[0])
    run = study.config.folder / "naive" / "seed0"
    before = (run / "evaluation.json").read_bytes()
    evaluate_run(run, num_examples=4)
    text = (study.results / RESULTS).read_bytes()
    (study.results / RESULTS).unlink()
    with pytest.raises(CheckpointError, match="seed0 was judged on other examples"):
        compare(study, jobs=1)
    (run / "evaluation.json").write_bytes(before)
    (study.results / RESULTS).write_bytes(text)


@pytest.mark.slow
def test_a_cell_judged_before_its_weights_changed_is_refused(
    finished: tuple[Path, Results],
) -> None:
    study = Study.load(finished[0])
    file = study.config.folder / "naive" / "seed0" / "evaluation.json"
    before, text = file.read_text(), (study.results / RESULTS).read_bytes()
    digest = json.loads(before)["weights"]
    file.write_text(before.replace(digest, "0" * 64))
    (study.results / RESULTS).unlink()
    with pytest.raises(CheckpointError, match=r"of the weights that the run has now.*remove it"):
        compare(study, jobs=1)
    file.write_text(before)
    (study.results / RESULTS).write_bytes(text)


def test_flags_without_effect_on_a_cell_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("compare", write_study(tmp_path), "--cell", "naive/seed0")
    for flag in (("--jobs", 2), ("--seeds", 1), ("--methods", "both"), ("--leaderboard", "x")):
        assert f"{flag[0]} has no effect on a single" in error_line(capsys, *words, *flag)


def test_the_command_runs_the_part_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def stop(study: Study, *arguments: object) -> None:
        asked.extend(arguments)
        raise ConfigError("seen")

    monkeypatch.setattr("customized_grpo.evaluation.study.compare", stop)
    part = ("--methods", "both", "naive", "--seeds", "1")
    assert main(["compare", str(write_study(tmp_path)), "--jobs", "3", *part]) == 2
    assert asked == [3, ["both", "naive"], 1]


def test_jobs_and_their_threads_are_as_many_as_cores_that_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container or a batch job has fewer than the machine."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(devices, "_GROUP", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    asked: list[object] = []

    def stop(study: Study, *arguments: object) -> None:
        asked.extend(arguments)
        raise ConfigError("seen")

    def start(command: object, env: dict[str, str], **rest: object) -> None:
        asked.append(env["OMP_NUM_THREADS"])
        raise ConfigError("seen")

    monkeypatch.setattr(studies, "compare", stop)
    file = write_study(tmp_path)
    assert main(["compare", str(file)]) == 2
    monkeypatch.setattr(subprocess, "run", start)
    study = Study.load(file)
    with pytest.raises(ConfigError, match="seen"):
        studies._run_process(study, study.tasks[0], jobs=2)
    assert asked == [4, (), None, "2"]


def test_no_run_is_called_like_what_a_report_shows_beside_it() -> None:
    labels = studies._labels(["runs/base", "runs/mine", "runs/copy"])
    assert list(labels.values()) == ["base (runs/base)", "mine", "copy (runs/copy)"]
    assert studies._labels(["base", "x/base"]) == {"base": "base (base)", "x/base": "x/base"}


def test_a_method_that_was_renamed_and_keeps_its_label_leaves_it_to_the_new_one(
    tmp_path: Path,
) -> None:
    method = {"name": "ours", "label": "Customized-GRPO"}
    study = Study.load(write_study(tmp_path, methods=[method], main="ours"))
    kept = made_up()
    cells = {f"{c.method}/seed{c.seed}": c for c in kept.cells}
    expected = {
        "ours": "Customized-GRPO", "naive": "naive GRPO 1:1", "both": "Customized-GRPO (both)",
    }  # fmt: skip
    for _ in range(2):
        kept = studies._write(study, kept, cells)
        assert kept.labels == expected


def test_results_that_are_none_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"name": "x"}))
    with pytest.raises(CheckpointError, match=r"results\.json: must be results of a study"):
        Results.read(file)

"""A run that was stopped, by whatever, goes on as if it had not been."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from chaos import content, small_run
from filelock import FileLock
from helpers import ROOT, changed, metrics
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from customized_grpo.cli.main import main
from customized_grpo.config import RunConfig, dump_config
from customized_grpo.data.jsonl import JsonlConfig
from customized_grpo.errors import (
    CheckpointError,
    ConfigError,
    Interrupted,
    ResourceError,
    RewardError,
)
from customized_grpo.evaluation.evaluate import evaluate_run
from customized_grpo.generators.flux1 import Flux1Generator
from customized_grpo.rewards.base import RewardSet
from customized_grpo.runs import checkpoint
from customized_grpo.runs.checkpoint import (
    CheckpointStore,
    best_checkpoint,
    checkpoint_folders,
    newest_checkpoint,
)
from customized_grpo.runs.log import RunLog, run_folder
from customized_grpo.runs.ranks import Ranks
from customized_grpo.runs.resume import check_changes, remove_leftovers
from customized_grpo.runs.run import Run
from customized_grpo.tools.watch.facts import Watcher
from customized_grpo.training import loop, samples
from customized_grpo.training.loop import Loop
from customized_grpo.training.loss import policy_batch
from customized_grpo.training.session import Session
from customized_grpo.training.train import _check_length, train
from customized_grpo.types import RewardScores


@pytest.fixture(autouse=True)
def _say_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="customized_grpo")  # whatever ran before


class Killed(BaseException):
    """Stands for kill -9: nothing in the package catches it."""


def small(folder: Path, *flags: str) -> RunConfig:
    return small_run(folder, "run", 8, *flags)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    return train(small(tmp_path_factory.mktemp("straight")))


@pytest.mark.parametrize(
    "when",
    [*(pytest.param(w, marks=pytest.mark.slow) for w in ("inner update", "checkpoint")), "rename"],
)
def test_a_killed_run_goes_on_bit_by_bit(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    config = small(tmp_path)
    with monkeypatch.context() as patch:
        kill_at(patch, when)
        with pytest.raises(Killed):
            train(config)
    run = train(config, resume=True)
    assert content(run) == content(straight)
    assert not list(run.rglob("*.tmp"))
    assert not list(run.rglob("*.old"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        # Which parts of the groups have been used.
        pytest.param(("--train.split", "samples", "--train.num_updates", "6"), id="parts"),
        # The average of their factors, from a measurement before the kill to one after it.
        pytest.param(("--advantage.balance", "{every: 2}"), id="balance"),
        # The policy that samples, which is between the first one and the trained one.
        pytest.param(
            (
                *("--algorithm", "{type: nft, old_decay: 0.9, old_decay_rate: 0.4}"),
                *("--loss.step_weight", "none"),
                *("--rollout.dynamics", "ode", "--rollout.shared_noise", "false"),
                *("--train.num_updates", "6"),
            ),
            id="nft",
        ),
    ],
)
def test_what_a_run_carries_from_rollout_to_rollout_is_kept_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    straight = train(small(tmp_path / "straight", *flags))
    config = small(tmp_path, *flags)
    with monkeypatch.context() as patch:
        kill_at(patch, "inner update")
        with pytest.raises(Killed):
            train(config)
    assert content(train(config, resume=True)) == content(straight)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        (
            *("--advantage.shaping", "gate", "--advantage.center", "false"),
            *("--advantage.schedule.high", "0.7"),
        ),
        ("--advantage.schedule", "{type: measured, num_prompts: 2, num_samples: 2}"),
    ],
    ids=["gate", "measured"],
)
def test_what_a_run_has_measured_of_its_base_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    """Measured again, on what has been trained, it would be something else."""
    flags += ("--train.num_updates", "6")
    straight = train(small(tmp_path / "straight", *flags))
    config = small(tmp_path, *flags)
    with monkeypatch.context() as patch:
        kill_at(patch, "rollout")
        with pytest.raises(Killed):
            train(config)
    assert content(train(config, resume=True)) == content(straight)


@pytest.mark.slow
def test_a_run_keeps_the_lora_that_it_began_with(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on with another file at that place, and without any."""
    lora = tmp_path / "lora.safetensors"
    shutil.copy(straight / "weights" / "pytorch_lora_weights.safetensors", lora)
    flags = (
        *("--lora", f"{{path: {lora}}}", "--train.num_updates", "4"),
        *("--loss.kl_weight", "10", "--loss.kl_to", "start"),
    )
    through = train(small(tmp_path / "through", *flags))
    config = small(tmp_path, *flags)
    with monkeypatch.context() as patch:
        kill_at(patch, "inner update")
        with pytest.raises(Killed):
            train(config)
    weights = load_file(lora)
    save_file({name: 2 * tensor for name, tensor in weights.items()}, lora)
    shutil.copytree(tmp_path / "run", tmp_path / "moved" / "run")
    assert content(train(config, resume=True)) == content(through)
    lora.unlink()
    elsewhere = dataclasses.replace(config, output_dir=str(tmp_path / "moved"))
    assert content(train(elsewhere, resume=True)) == content(through)


@pytest.mark.slow
def test_a_finite_data_source_goes_on_bit_by_bit(tmp_path: Path, monkeypatch) -> None:
    """Features and encodings that were kept in memory are made again, each by itself."""
    rows = []
    for number in range(5):
        pixels = torch.randint(256, (64, 64, 3), generator=torch.Generator().manual_seed(number))
        Image.fromarray(pixels.byte().numpy()).save(tmp_path / f"{number}.png")
        prompt = " ".join(["a dog in the snow"] + ["and a fir tree"] * number)
        rows.append(
            json.dumps({"prompt": prompt, "subject": "dog", "references": [f"{number}.png"]})
        )
    for name, lines in (("train", rows), ("held", rows[:2]), ("validation", rows[2:4])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    data = JsonlConfig(
        path=str(tmp_path / "train.jsonl"),
        held_out=str(tmp_path / "held.jsonl"),
        validation=str(tmp_path / "validation.jsonl"),
    )
    runs = []
    for name in ("straight", "broken"):
        config = dataclasses.replace(small(tmp_path), name=name, data=data)
        if name == "broken":
            with monkeypatch.context() as patch:
                kill_at(patch, "rollout")
                with pytest.raises(Killed):
                    train(config)
        runs.append(content(train(config, resume=True)))
    assert runs[0] == runs[1]


def kill_at(patch: pytest.MonkeyPatch, when: str) -> None:
    """Raises the third time that something is done, or the first time that a run would finish."""
    owner, name = {
        "rollout": (Loop, "collect"),
        "inner update": (Session, "_after_update"),
        "checkpoint": (checkpoint, "save_file"),
        "rename": (Path, "rename"),
        "finish": (RunLog, "finish"),
    }[when]
    before, calls = getattr(owner, name), iter(range(1, 1000))

    def dying(*args, **kwargs):
        if next(calls) == (1 if when == "finish" else 3):
            raise Killed
        return before(*args, **kwargs)

    patch.setattr(owner, name, dying)


@pytest.mark.slow
def test_a_signal_saves_and_says_how_to_go_on(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config = small(tmp_path, "--train.save_every", "0")
    sampled = Loop.collect
    calls = iter(range(10))

    def interrupted(self: Loop, *args):
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return sampled(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "collect", interrupted)
        with pytest.raises(Interrupted, match=r"SIGTERM.*cgrpo resume .*run.*after update 2$"):
            train(config)
    run = tmp_path / "run"
    assert [folder.name for folder in checkpoint_folders(run)] == ["000002"]
    facts = Watcher(run).look()
    assert facts.state == "stopped"
    assert re.fullmatch(r"stopped by SIGTERM; `cgrpo resume .*` goes on after update 2", facts.why)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    evaluated = evaluate_run(run)  # as far as it has come
    assert evaluated.models["base"] != evaluated.own
    assert main(["resume", str(run), "--train.save_every", "2"]) == 0
    assert capsys.readouterr().out == f"run: {run}\n"
    assert Watcher(run).look().state == "finished"
    done = {n: c for n, c in content(run).items() if "evaluation" not in n and "pictures" not in n}
    assert done == content(straight)


def test_a_signal_while_the_end_is_written_is_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = RunLog.finish

    def signalled(self: RunLog, updates: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        finish(self, updates)

    monkeypatch.setattr(RunLog, "finish", signalled)
    config = small(tmp_path, "--train.num_updates", "2", "--evaluation.validate_every", "0")
    assert (train(config) / "finished.json").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_exit_code_is_the_signals(
    number: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise Interrupted(signal.Signals(number))

    monkeypatch.setattr("customized_grpo.training.train.train", stopped)
    assert main(["train", str(ROOT / "configs" / "emoji.yaml")]) == code
    assert f"stopped by {signal.Signals(number).name}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "echo_seconds", "code"),
    # SIGTERM comes twice where a cluster signals torchrun and what it has started.
    [("SIGINT", 5.0, 130), ("SIGTERM", 0.0, 143), ("SIGTERM", 60.0, 0)],
)
def test_a_second_signal_exits_at_once(name: str, echo_seconds: float, code: int) -> None:
    script = (
        "import os, signal\n"
        "from customized_grpo.runs import interrupts\n"
        f"interrupts._ECHO_SECONDS = {echo_seconds}\n"
        "with interrupts.Interrupts():\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        "    print('goes on', flush=True)\n"
        f"    os.kill(os.getpid(), signal.{name})\n"
        "    print('an echo', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    printed = "goes on\n" if code else "goes on\nan echo\n"
    assert (done.returncode, done.stdout) == (code, printed)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    config = small(tmp_path)
    with monkeypatch.context() as patch:
        kill_at(patch, "finish")
        with pytest.raises(Killed):
            train(config)
    newest = checkpoint_folders(tmp_path / "run")[-1] / "state.safetensors"
    damaged = bytearray(newest.read_bytes())
    damaged[-1] ^= 1
    newest.write_bytes(damaged)
    run = train(config, resume=True)
    assert re.search(r"000008: state.safetensors has another checksum", caplog.text)
    assert re.search(r"resumed from .*000006", caplog.text)
    assert content(run) == content(straight)
    for folder in checkpoint_folders(run):
        (folder / "weights" / "pytorch_lora_weights.safetensors").unlink()
    (run / "finished.json").unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint is damaged.*missing.*delete"):
        train(config, resume=True)


def test_a_run_that_kept_nothing_of_its_end_is_not_begun_again(tmp_path: Path) -> None:
    flags = ("--train.save_every", "0", "--train.num_updates", "2")
    run = train(small(tmp_path, *flags, "--evaluation.validate_every", "0"))
    before = content(run), (run / "config.yaml").read_bytes()
    with pytest.raises(CheckpointError, match="ended after update 2 and kept no checkpoint"):
        train(Run.open(run, ["--train.num_updates", "4"]).config, resume=True)
    assert (content(run), (run / "config.yaml").read_bytes()) == before


def test_a_run_is_found_by_any_name(straight: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "latest").symlink_to(straight)
    monkeypatch.chdir(straight)
    for name in (Path("."), tmp_path / "latest", straight):
        config = Run.open(name).config
        assert Path(config.output_dir, config.name).resolve() == straight.resolve()


@pytest.mark.parametrize("field", ["name", "output_dir"])
def test_a_run_is_not_moved_by_a_flag(straight: Path, field: str) -> None:
    stays = rf"{field} must stay as it is, got 'other': .*{straight}"
    with pytest.raises(ConfigError, match=stays):
        Run.open(straight, [f"--{field}", "other"])
    own = {"name": straight.name, "output_dir": str(straight.parent)}
    assert Run.open(straight, [f"--{field}", own[field]]) == Run.open(straight)


def test_what_is_refused_now_stays_allowed_in_a_run_that_has_begun(
    straight: Path, tmp_path: Path
) -> None:
    old = "clip_range: 0.0001", "clip_range: 0.001"
    flags = ["--train.inner_updates", "1", "--loss.clip_range", "0.001"]
    with pytest.raises(ConfigError, match=r"loss\.clip_range must be left out when"):
        small(tmp_path, *flags)
    run = shutil.copytree(straight, tmp_path / "old")
    text = (run / "config.yaml").read_text().replace(*old)
    (run / "config.yaml").write_text(text.replace("inner_updates: 2", "inner_updates: 1"))
    assert Run.open(run).config.loss.clip_range == 0.001
    assert Run.open(run, ["--device", "cpu"]).config.train.inner_updates == 1
    with pytest.raises(ConfigError, match=r"train\.split must be groups"):
        Run.open(run, ["--train.split", "samples"])


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for update, score in enumerate([math.nan, 0.3, None, 0.2, 0.1], 1):
        tensors = {"x": torch.full((2,), float(update))}
        store.save(update, tensors, {"score": score}, lambda f: (f / "w").touch())
    store.wait()
    assert [f.name for f in checkpoint_folders(tmp_path)] == ["000002", "000004", "000005"]
    best = best_checkpoint(tmp_path)
    assert best is not None
    assert best.update == 2


def test_an_error_that_may_pass_removes_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A network's file system has moments in which nothing can be read."""
    read_text, digest = Path.read_text, checkpoint._digest

    def stale(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    def forbidden(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    store = CheckpointStore(tmp_path, keep=1)
    for update, score in enumerate((0.3, 0.2, 0.1), 1):
        if update == 3:
            monkeypatch.setattr(Path, "read_text", stale)
        store.save(update, {"x": torch.zeros(1)}, {"score": score}, lambda f: (f / "w").touch())
        store.wait()
    assert "no checkpoint is removed this time: [Errno 116] Stale file handle" in caplog.text
    monkeypatch.setattr(Path, "read_text", read_text)
    names = ["000001", "000002", "000003"]
    assert [f.name for f in checkpoint_folders(tmp_path)] == names
    monkeypatch.setattr(checkpoint, "_digest", stale)
    with pytest.raises(CheckpointError, match=r"000003 cannot be read: .*Stale.*; try again"):
        newest_checkpoint(tmp_path)
    monkeypatch.setattr(checkpoint, "_digest", digest)
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", forbidden)  # which Path.rglob takes for an empty folder
        with pytest.raises(CheckpointError, match=r"000003 cannot be read"):
            newest_checkpoint(tmp_path)
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert newest.update == 3


def test_a_checkpoint_holds_weights_that_load_anywhere(straight: Path) -> None:
    folders = checkpoint_folders(straight)
    assert [folder.name for folder in folders][-2:] == ["000006", "000008"]
    files = [folder / "weights" / "pytorch_lora_weights.safetensors" for folder in folders]
    last = straight / "weights" / "pytorch_lora_weights.safetensors"
    loaded = [load_file(file) for file in (*files[-2:], last)]
    same = [all(torch.equal(t, other[name]) for name, t in loaded[-1].items()) for other in loaded]
    assert same == [False, True, True]


@pytest.mark.slow
def test_a_finished_run_can_be_made_longer(straight: Path, tmp_path: Path, caplog) -> None:
    run = train(small(tmp_path, "--train.num_updates", "4"))
    before = content(run)
    assert train(small(tmp_path, "--train.num_updates", "4"), resume=True) == run
    assert "is finished, there is nothing to resume" in caplog.text
    assert content(run) == before
    train(Run.open(run, ["--train.num_updates", "8"]).config, resume=True)
    assert content(run) == content(straight)


@pytest.mark.parametrize(
    ("flags", "allow", "message"),
    [
        (["--train.learning_rate", "1e-3"], False, r"learning_rate must stay .*--allow-changed"),
        (["--train.learning_rate", "1e-3"], True, None),
        (["--train.num_updates", "10", "--faults.max_lost_rewards", "0.2"], False, None),
        (["--lora.rank", "8"], True, r"lora.rank must stay 4 .*got 8"),
        (["--lora", "null"], True, r"lora must stay"),
        (
            ["--rollout.prompts_per_rollout", "4"],
            True,
            r"order counts rollouts.*Free to change are",
        ),
        (["--train.ema_decay", "null"], True, r"train.ema_decay must stay 0.95"),
        (["--train.ema_decay", "0.5"], True, None),
        (["--train.num_updates", "6"], False, r"num_updates must be at least 8, .*got 6"),
    ],
)
def test_a_changed_config_is_refused_where_it_is_wrong(
    straight: Path, flags: list[str], allow: bool, message: str | None
) -> None:
    old, new = Run.open(straight).config, Run.open(straight, flags).config
    if message is None:
        check_changes(old, new, allow_changed=allow)
    else:
        with pytest.raises(ConfigError, match=message):
            train(new, resume=True, allow_changed=allow)
        assert Run.open(straight).config == old  # nothing was written


def test_an_older_policy_has_to_begin_with_the_run(tmp_path: Path) -> None:
    """Whichever of the two fields brings it, or ends it."""
    without = small(
        tmp_path, "--algorithm", "{type: nft, old_decay: 0}", "--rollout.dynamics", "ode",
        "--rollout.shared_noise", "false", "--train.inner_updates", "1",
        "--loss.step_weight", "none",
    )  # fmt: skip
    more = changed(without, train={"inner_updates": 2})
    for old, new, need in (
        (without, more, "needs .* has none"),
        (more, without, "has no use .* one"),
    ):
        with pytest.raises(ConfigError, match=f"old_decay 0.0 with train.inner_updates . {need}"):
            check_changes(old, new, allow_changed=True)


def test_what_a_run_lacks_is_said_before_its_folder_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path, "--train.optimizer", "adamw-8bit")
    for name in [n for n in sys.modules if n.split(".")[0] == "bitsandbytes"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"bitsandbytes"):
        train(config)
    config = changed(config, train={"optimizer": "adamw"})
    many = nullcontext(Ranks(world_size=99))
    monkeypatch.setattr("customized_grpo.training.train.connected", lambda device: many)
    with pytest.raises(ConfigError, match=r"samples per update must be at least one for each of"):
        train(config)
    assert not Path(config.output_dir, "run").exists()
    config = changed(config, train={"inner_updates": 2, "num_updates": 12})
    _check_length(config, 12)
    with pytest.raises(ConfigError, match=r"inner_updates must divide the 9 updates .*, got 2"):
        _check_length(config, 9)


def test_train_begins_or_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(small(tmp_path, "--train.num_updates", "2")))
    config = str(tmp_path / "config.yaml")
    for _ in range(2):
        assert main(["train", config, "--resume", "auto"]) == 0
    assert main(["train", config, "--resume=yes"]) == 2
    assert "argument --resume: invalid choice: 'yes'" in capsys.readouterr().err
    assert main(["train", config]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["resume", str(tmp_path / "nothing")]) == 2
    assert "config.yaml is not in it" in capsys.readouterr().err


def test_the_folder_of_a_project_is_no_run(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("# mine\n" + dump_config(small(tmp_path / "runs")))
    before = sorted(tmp_path.rglob("*"))
    for command in ("resume", "doctor", "watch"):
        assert main([command, str(tmp_path)]) == 2
        assert f"begin: `cgrpo train {config}`" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    shutil.copytree(straight, tmp_path / "runs" / "first")
    for command in ("resume", "doctor", "watch"):
        assert main([command, str(tmp_path)]) == 2
        assert f"it is a project, write {tmp_path / 'runs' / 'first'}" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path)]) == 2
    assert f"write {tmp_path / 'runs' / 'first'}" in capsys.readouterr().err
    assert config.read_text().startswith("# mine")
    here = dataclasses.replace(small(tmp_path.parent), name=tmp_path.name)
    with pytest.raises(ConfigError, match="already holds something else"):
        train(here, resume=True)


def test_leftovers_are_removed_where_a_run_leaves_them(tmp_path: Path) -> None:
    gone = [
        "config.yaml.7.tmp", "weights.tmp/a", "weights.old/a", "checkpoints/000002.tmp/a",
        "checkpoints/000002.weights/a", "samples/000002.png.7.tmp", "failures/000002.tmp/a",
        "failures/000002-rank1.old/a", "sinks/wandb.json.7.tmp", "samples/000002.png",
        "pictures/test/base.png.7.tmp", "weights/a", "checkpoints/000002/a", "start.tmp/a",
    ]  # fmt: skip
    kept = [
        "samples/000000.png", "samples/mine.png", "mine/notes.tmp", "notes.tmp", "config.yaml.old",
        "runs/other/checkpoints/000002.tmp/a", "checkpoints/000000/a", "checkpoints/liked best/a",
        "checkpoints/README", "elsewhere/a",
    ]  # fmt: skip
    for name in (*gone, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "checkpoints" / "best").symlink_to("000000")
    (tmp_path / "checkpoints" / "000003").symlink_to(tmp_path / "elsewhere")
    remove_leftovers(tmp_path, 0)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == set(kept)
    links = {path.name for path in tmp_path.rglob("*") if path.is_symlink()}
    assert links == {"best"}


def test_a_run_that_was_killed_before_it_began_can_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = small(tmp_path), tmp_path / "run"

    def killed(*_: object) -> str:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("customized_grpo.runs.log.dump_config", killed)
        with pytest.raises(Killed):
            RunLog(run, config, torch.device("cpu"))
    (run / "config.yaml.7.tmp").touch()
    (run / ".lock").touch()
    assert run_folder(config) == run_folder(config, resume=True) == run
    RunLog(run, config, torch.device("cpu"))
    assert run_folder(config, resume=True) == run
    with pytest.raises(CheckpointError, match=r"there are none yet$"):
        checkpoint.trained_weights(run)
    with pytest.raises(ConfigError, match="already holds a run"):
        run_folder(config)


def test_one_process_at_a_time(straight: Path) -> None:
    config = dataclasses.replace(Run.open(straight).config, output_dir=str(straight.parent))
    config = changed(config, train={"num_updates": 10})
    with (
        FileLock(straight / ".lock"),
        pytest.raises(CheckpointError, match="is in use by another process"),
    ):
        train(config, resume=True)


@pytest.mark.parametrize(
    ("owner", "name", "error", "message"),
    [
        (checkpoint, "save_file", SafetensorError("I/O error: No space left"), "I/O error"),
        (samples, "collect_rollout", torch.OutOfMemoryError("CUDA"), "out of memory; lower train"),
    ],
)
def test_what_runs_out_stops_the_run_resumably(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner, name, error, message
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    config = Run.open(run, ["--train.num_updates", "10"]).config

    def failing(*args: object, **kwargs: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        with pytest.raises(ResourceError, match=f"{message}.*cgrpo resume .*after update 8$"):
            train(config, resume=True)
    assert [folder.name for folder in checkpoint_folders(run)][-1] == "000008"


@pytest.mark.long
@pytest.mark.slow
def test_three_real_kills_change_nothing() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), "--kills", "3", "--json"]
    done = subprocess.run([*command, "--updates", "8"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["kills"], result["identical"]) == (3, True)


def test_a_bug_is_shown_as_one_and_loses_nothing(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    monkeypatch.setattr(loop, "assign_credit", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(Run.open(run, ["--train.num_updates", "10"]).config, resume=True)
    assert f"`cgrpo resume {run}` goes on after update 8" in caplog.text


class TestLostRewards:
    @pytest.fixture
    def lossy(self, tmp_path: Path) -> RunConfig:
        config = small(tmp_path, "--train.num_updates", "2", "--evaluation.validate_every", "0")
        return changed(config, faults={"reward_pauses": (0.01, 0.01)})

    def break_rewards(self, monkeypatch: pytest.MonkeyPatch, times: int) -> list[int]:
        score, calls = RewardSet.score, []

        def broken(self: RewardSet, images: Tensor, *others: Any) -> RewardScores:
            calls.append(len(images))
            found = score(self, images, *others)
            if len(calls) > times:
                return found
            lost = torch.full_like(found.scores, torch.nan)
            return dataclasses.replace(found, scores=lost, errors=("judge: timed out",))

        monkeypatch.setattr(RewardSet, "score", broken)
        return calls

    def test_are_scored_again_after_a_pause(self, lossy, monkeypatch, caplog) -> None:
        calls = self.break_rewards(monkeypatch, times=3)
        train(lossy)
        assert calls == [2, 2, 4, 4]
        assert "100% of the rollout could not be scored: judge: timed out" in caplog.text

    def test_without_a_reason_stop_it_at_once(self, lossy, monkeypatch) -> None:
        score, calls = RewardSet.score, []

        def silent(self: RewardSet, images: Tensor, *others: Any) -> RewardScores:
            calls.append(len(images))
            found = score(self, images, *others)
            kept = torch.arange(len(images))[:, None] == (0 if len(calls) == 1 else -1)
            return dataclasses.replace(found, scores=found.scores.where(kept, torch.nan))

        monkeypatch.setattr(RewardSet, "score", silent)
        with pytest.raises(RewardError, match="75% of the rollout could not be scored: all scores"):
            train(lossy)
        assert calls == [2, 2]

    def test_stop_the_run_resumably_in_the_end(self, lossy, monkeypatch) -> None:
        with monkeypatch.context() as patch:
            self.break_rewards(patch, times=100)
            with pytest.raises(RewardError, match=r"could not be scored.*timed out.*cgrpo resume"):
                train(lossy)
        assert (train(lossy, resume=True) / "finished.json").exists()


def test_an_update_without_finite_gradient_is_skipped_and_diagnosed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    config = small(tmp_path, "--train.num_updates", "6", "--evaluation.validate_every", "0")
    poison_gradients(monkeypatch, updates={2, 3})
    run = train(config)
    rows = metrics(run)
    assert [row["skipped_updates"] for row in rows] == [0, 1, 1, 0, 0, 0]
    assert re.search(r"update 2 is skipped: not finite: gradients of [\w.]+[^\w.,]", caplog.text)
    assert rows[3]["grad_norm"] > 0


@pytest.mark.slow
def test_too_many_skipped_updates_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config = small(tmp_path, "--evaluation.validate_every", "0")
    poison_gradients(monkeypatch, updates={2, 3, 4})
    with pytest.raises(CheckpointError, match=r"3 updates in a row.*cgrpo replay (\S+)") as caught:
        train(config)
    dump = re.search(r"cgrpo replay (\S+000004)`", str(caught.value))
    assert dump is not None
    assert main(["replay", dump[1]]) == 0
    assert capsys.readouterr().out == "everything is finite\n"  # the poison is not in the dump


def poison_gradients(monkeypatch: pytest.MonkeyPatch, updates: set[int]) -> None:
    optimize, calls = Loop.update, iter(range(1, 1000))

    def poisoned(self: Loop, *args, **kwargs):
        handle = self.parameters[0].register_hook(
            (lambda g: g * torch.nan) if next(calls) in updates else (lambda g: g)
        )
        try:
            return optimize(self, *args, **kwargs)
        finally:
            handle.remove()

    monkeypatch.setattr(Loop, "update", poisoned)


def test_a_dump_shows_the_failure_again(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Also when the LoRA that the run began with is gone."""
    lora = tmp_path / "lora.safetensors"
    shutil.copy(straight / "weights" / "pytorch_lora_weights.safetensors", lora)
    velocity = Flux1Generator.velocity

    def overflowing(self, latents, sigma, conditioning):
        scale = torch.where(latents.abs().amax((1, 2), keepdim=True) > 1e4, torch.inf, 1.0)
        return velocity(self, latents, sigma, conditioning) * scale

    def spoiled(*args, **kwargs):
        batch = policy_batch(*args, **kwargs)
        batch.latents[0] = 1e5
        return batch

    monkeypatch.setattr(Flux1Generator, "velocity", overflowing)
    monkeypatch.setattr("customized_grpo.training.algorithms.policy_batch", spoiled)
    flags = ("--evaluation.validate_every", "0", "--train.inner_updates", "1")
    config = small(tmp_path, *flags, "--lora", f"{{path: {lora}}}")
    config = changed(config, faults={"max_skipped_updates": 1})
    with pytest.raises(CheckpointError, match="outputs for sample 0 at step"):
        train(config)
    lora.unlink()
    assert main(["replay", str(tmp_path / "run" / "failures" / "000001")]) == 0
    assert "outputs for sample 0 at step" in capsys.readouterr().out


def test_samples_that_are_not_finite_are_left_out_and_an_update_of_them_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path, "--train.num_updates", "2", "--evaluation.validate_every", "0")
    collect = samples.collect_rollout

    def spoiled(*args, **kwargs):
        rollout = collect(*args, **kwargs)
        rollout.log_probs[2:, 0] = torch.nan  # all of the second update
        return rollout

    monkeypatch.setattr(samples, "collect_rollout", spoiled)
    run = train(config)
    rows = metrics(run)
    assert rows[0]["invalid_samples"] == 2
    assert rows[0]["grad_norm"] > 0
    assert rows[1]["grad_norm"] == 0
    assert all(row["skipped_updates"] == 0 for row in rows)


@pytest.mark.parametrize(("folder", "said"), [("runs", False), ("./runs", False), ("other", True)])
def test_the_same_folder_by_another_name_is_no_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    folder: str, said: bool,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "customized_grpo")
    before = small(tmp_path, "--output_dir", str(tmp_path / "runs"))
    after = dataclasses.replace(before, output_dir=folder)
    check_changes(before, after, allow_changed=False)
    assert any("output_dir" in message for message in caplog.messages) == said

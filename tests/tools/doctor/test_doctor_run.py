"""What a planned run needs: folders, earlier runs, devices, packages, data."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from helpers import ROOT, changed
from PIL import Image
from safetensors.torch import save_file

from customized_grpo.config import RunConfig, load_config
from customized_grpo.data.folder import FolderConfig
from customized_grpo.data.subjects200k import Subjects200KConfig
from customized_grpo.rewards.hpsv3 import Hpsv3Config
from customized_grpo.runs.checkpoint import CheckpointStore
from customized_grpo.runs.log import RunLog
from customized_grpo.runs.sinks.wandb import WandbConfig
from customized_grpo.tools.doctor import run
from customized_grpo.tools.doctor.findings import Finding
from customized_grpo.tools.estimate.workload import Workload


def settings(config: RunConfig) -> dict[str, Finding]:
    findings = (*run.settings(config), *run.plugs(config))
    return {finding.check: finding for finding in findings}


def test_a_config_that_this_machine_can_do(tiny_config: RunConfig) -> None:
    assert settings(tiny_config) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there(tiny_config: RunConfig) -> None:
    finding = settings(dataclasses.replace(tiny_config, device="cuda"))["device"]
    assert (finding.status, finding.fix) == ("problem", "use 'auto'")
    pytest.importorskip("bitsandbytes")
    finding = settings(changed(tiny_config, generator={"quantization": "nf4"}))["generator"]
    assert finding.status == "problem"
    assert "needs a GPU" in finding.found


@pytest.mark.parametrize(
    ("module", "section", "fields", "extra"),
    [
        ("torchao", "generator", {"quantization": "int8"}, "torchao"),
        ("bitsandbytes", "generator", {"quantization": "nf4"}, "bitsandbytes"),
        ("bitsandbytes", "train", {"optimizer": "adamw-8bit"}, "bitsandbytes"),
    ],
)
def test_an_extra_that_the_config_needs(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, module, section, fields, extra
) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # importing it fails, as if it were not there
    finding = settings(changed(tiny_config, **{section: fields}))[section]
    assert finding.status == "problem"
    assert finding.fix == f"pip install 'customized-grpo[{extra}]'"


def test_rl_on_a_distilled_model_and_a_kernel_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    base, distilled = (
        load_config(ROOT / "configs" / f"{name}.yaml")
        for name in ("flux2-klein-base", "flux2-klein")
    )
    assert settings(base) == {}
    finding = settings(distilled)["generator"]
    assert finding.status == "warning"
    assert "distilled" in finding.found
    assert "FLUX.2-klein-base-4B with guidance_scale 4" in finding.fix
    finding = settings(changed(base, generator={"attention": "cudnn"}))["generator"]
    assert (finding.status, finding.fix) == ("problem", "use 'sdpa'")


def test_a_sink_without_its_key(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config = dataclasses.replace(tiny_config, sinks=(WandbConfig(),))
    finding = settings(config)["sinks.0"]
    assert "WANDB_API_KEY, got nothing" in finding.found
    assert finding.fix == "export it, run `wandb login`, or set WANDB_MODE=offline"
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert settings(config) == {}


def test_a_reward_s_text_that_is_missing(tiny_config: RunConfig) -> None:
    reward = Hpsv3Config(objective="prompt", instruction="nowhere.txt")
    finding = settings(dataclasses.replace(tiny_config, evaluators=(reward,)))["evaluators.0"]
    assert finding.status == "problem"
    assert "instruction: 'nowhere.txt' cannot be read" in finding.found
    assert finding.fix.startswith("name a checkout (git clone https://github.com/MizzenAI/HPSv3)")


def folders(config: RunConfig, work=None) -> dict[str, Finding]:
    return {finding.check: finding for finding in run.folders(config, work)}


def test_folders_that_can_be_written(tiny_config: RunConfig, tmp_path: Path) -> None:
    config = changed(tiny_config, cache={"folder": str(tmp_path / "cache")})
    findings = folders(config)
    assert [finding.status for finding in findings.values()] == ["ok"] * 3
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be_written(tiny_config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = changed(tiny_config, cache={"folder": str(tmp_path / "file")})
    findings = folders(dataclasses.replace(config, output_dir=str(tmp_path / "file")))
    for field in ("output_dir", "cache.folder"):
        assert findings[field].status == "problem"
        assert "cannot be written: Not a directory" in findings[field].found
        assert f"set {field}" in findings[field].fix


def test_a_disk_that_is_full(tiny_config: RunConfig) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # the kernel refuses longer files
    try:
        finding = folders(tiny_config)["output_dir"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert finding.status == "problem"
    assert "File too large" in finding.found


def test_room_for_the_checkpoints(tiny_config: RunConfig, emoji: Workload) -> None:
    trained = emoji.transformer.trained
    finding = folders(tiny_config, emoji)["disk of output_dir"]
    assert finding.status == "ok"
    assert f"checkpoints need {(2 + 2) * 5 * 4 * trained / 1e9:.1f} GB" in finding.found
    huge = dataclasses.replace(emoji.transformer, trained=10**17)
    work = dataclasses.replace(emoji, transformer=huge)
    finding = folders(tiny_config, work)["disk of output_dir"]
    assert finding.status == "problem"


def state(config: RunConfig, *, resumes: bool = False) -> dict[str, Finding]:
    return {finding.check: finding for finding in run.state(config, resumes=resumes)}


def begin(config: RunConfig) -> Path:
    folder = Path(config.output_dir) / config.name
    RunLog(folder, config, torch.device("cpu"))
    return folder


def test_a_name_that_is_taken(tiny_config: RunConfig, tmp_path: Path) -> None:
    tiny_config = dataclasses.replace(tiny_config, output_dir=str(tmp_path / "my runs"))
    assert state(tiny_config)["name"].status == "ok"
    folder = begin(tiny_config)
    finding = state(tiny_config)["name"]
    assert finding.status == "problem"
    assert finding.found == f"{folder} already holds a run"
    assert f"`cgrpo resume '{folder}'`" in finding.fix
    (folder / "config.yaml").rename(folder / "mine.yaml")
    finding = state(tiny_config)["name"]
    assert "something else" in finding.found
    assert "resume" not in finding.fix


def save(folder: Path, update: int) -> None:
    store = CheckpointStore(folder, keep=9)
    tensors = {"policy/a": torch.zeros(1)}
    record = {"score": None}
    store.save(update, tensors, record, lambda f: save_file(tensors, f / "a.safetensors"))
    store.wait()


def test_a_run_to_go_on_with(tiny_config: RunConfig) -> None:
    folder = begin(tiny_config)
    finding = state(tiny_config, resumes=True)["run"]
    assert finding.status == "warning"
    assert "it would begin at update 0" in finding.found
    with FileLock(folder / ".lock"):
        finding = state(tiny_config, resumes=True)["run"]
    assert finding.status == "problem"
    assert "in use by another process" in finding.found
    save(folder, 2)
    save(folder, 4)
    found = state(tiny_config, resumes=True)
    assert set(found) == {"run"}
    assert (found["run"].status, found["run"].found) == ("ok", f"{folder} goes on after update 4")
    newest = folder / "checkpoints" / "000004"
    (newest / "state.safetensors").write_bytes(b"damaged")
    found = state(tiny_config, resumes=True)
    assert found["checkpoint"].status == "warning"
    assert found["checkpoint"].found == "000004 is damaged, 000002 is taken"
    assert "after update 2" in found["run"].found
    shutil.rmtree(folder / "checkpoints" / "000002")
    finding = state(tiny_config, resumes=True)["run"]
    assert finding.status == "problem"
    assert "every checkpoint is damaged" in finding.found
    (folder / "checkpoints" / "000004").rename(folder / "old")
    (folder / "finished.json").write_text('{"updates": 6}')
    assert "is finished, after 6 updates" in state(tiny_config, resumes=True)["run"].found


def data(config: RunConfig, section=None) -> Finding:
    (finding,) = run.data(dataclasses.replace(config, data=section) if section else config)
    return finding


def test_data_that_are_there(tiny_config: RunConfig, tmp_path: Path) -> None:
    assert data(tiny_config).found == "examples: without end"
    for subject in ("mug", "bear", "hat", "ball"):
        (tmp_path / "photos" / subject).mkdir(parents=True)
        Image.new("RGB", (64, 48), "red").save(tmp_path / "photos" / subject / "0.png")
        if subject == "bear":  # of two subjects none is held out
            few = FolderConfig(path=str(tmp_path / "photos"), templates=("a {subject}",))
            quiet = changed(tiny_config, evaluation={"validate_every": 0})
            assert data(quiet, few).status == "ok"
            finding = data(changed(quiet, evaluation={"validate_every": 1}), few)
            assert (finding.status, "validation" in finding.found) == ("problem", True)
    section = FolderConfig(path=str(tmp_path / "photos"))
    finding = data(tiny_config, section)
    assert finding.status == "ok"
    assert finding.found.startswith("training: ")
    (tmp_path / "photos" / "mug" / "0.png").write_bytes(b"no picture")
    finding = data(tiny_config, section)
    assert finding.status == "problem"
    assert "0.png" in finding.found


def test_data_that_are_missing_or_of_others(tiny_config: RunConfig, tmp_path: Path) -> None:
    from tiny_plugs import TinyData

    finding = data(tiny_config, FolderConfig(path=str(tmp_path / "nowhere")))
    assert finding.status == "problem"
    assert "nowhere" in finding.found
    finding = data(tiny_config, Subjects200KConfig())  # on the hub: it is not fetched
    assert finding.status == "warning"
    assert "would be fetched from huggingface.co" in finding.found
    finding = data(tiny_config, TinyData())  # a plug of others may raise anything
    assert finding.status == "problem"
    assert finding.fix

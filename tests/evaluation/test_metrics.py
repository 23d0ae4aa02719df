"""What the numbers of a model depend on is named by its content."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from customized_grpo.assets import path_revision
from customized_grpo.evaluation.metrics import identity_of
from customized_grpo.rewards.dinov2 import Dinov2Config

CPU = torch.device("cpu")


def test_a_folder_is_its_content(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
    assert path_revision(str(one)) == path_revision(str(two))
    (two / "model.safetensors").write_bytes(b"others")
    assert path_revision(str(one)) != path_revision(str(two))
    (one / "instruction.txt").write_text("x")
    assert path_revision(str(one / "instruction.txt")) is not None


def test_a_hub_id_is_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert path_revision("owner/model") is None
    refs = tmp_path / "models--owner--model" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("abc123\n")
    assert path_revision("owner/model") == "commit abc123"


def test_names_and_weights_of_the_config_change_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image").mkdir()  # the value of a field, not a checkpoint
    path = "embedded:evaluator-dino"
    one = Dinov2Config(objective="identity", path=path)
    two = Dinov2Config(objective="identity", path=path, name="other", weight=2.0)
    three = Dinov2Config(objective="identity", path=path, region="subject")
    first = identity_of(one, CPU)
    assert first == identity_of(two, CPU)
    assert first != identity_of(three, CPU)
    assert set(first["checkpoints"]) == {"path"}

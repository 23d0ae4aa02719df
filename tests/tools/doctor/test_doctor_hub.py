"""Checkpoints on the hub: a real cache folder, and a server that speaks like the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from servers import Reply, Request, scripted_server

from customized_grpo.assets import resolve_checkpoint
from customized_grpo.config import Checkpoint
from customized_grpo.config.plugs import CheckpointKind
from customized_grpo.tools.doctor.findings import Finding
from customized_grpo.tools.doctor.hub import on_hub

REPO, TOKEN = "owner/model", "hf_s3cret"
WEIGHTS = "model.safetensors"


@dataclass
class Hub:
    """What it knows of REPO, and how it answers."""

    files: dict[str, int] = field(default_factory=lambda: {"config.json": 9, WEIGHTS: 3 * 10**9})
    gated: str | bool = False
    access: bool = True
    status: int = 200
    error: str = ""

    def answer(self, request: Request) -> Reply:
        said = request.headers.get("authorization", "")
        if self.status != 200:
            return refusal(self.status, self.error, said)
        if request.path.endswith("/auth-check"):
            return Reply() if self.access else refusal(403, "GatedRepo", said)
        files = [{"rfilename": name, "size": size} for name, size in self.files.items()]
        return Reply.json({"id": REPO, "gated": self.gated, "siblings": files})


def refusal(status: int, error: str, said: str) -> Reply:
    return Reply(status=status, headers={"X-Error-Code": error}, body=said.encode())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing in it, nobody logged in."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    return tmp_path / "hub"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    known = Hub()
    with scripted_server(known.answer) as (url, _):
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield known


def snapshot(cache: Path) -> Path:
    """Where the hub's client keeps REPO."""
    folder = cache / "models--owner--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    return folder / "snapshots" / "abc"


def look(kind: CheckpointKind = "model", file: str | None = None) -> Finding:
    return on_hub(Checkpoint(field="generator.path", path=REPO, kind=kind, file=file), REPO)


def test_in_the_cache(cache: Path) -> None:
    assert look().status == "problem"
    assert look().found == "owner/model is not in the cache, and HF_HUB_OFFLINE is set"
    assert "unset HF_HUB_OFFLINE" in look().fix
    folder = snapshot(cache)
    shutil.copytree(resolve_checkpoint("embedded:generator"), folder)
    assert look("pipeline").found == "owner/model is in the cache"
    assert look("pipeline").status == "ok"
    shutil.rmtree(folder)
    shutil.copytree(resolve_checkpoint("embedded:reward-clip"), folder)
    (folder / WEIGHTS).unlink()
    assert look().status == "problem"
    assert "owner/model in the cache: model.safetensors is missing" in look().found


def test_a_lora_in_the_cache(cache: Path) -> None:
    folder = snapshot(cache)
    folder.mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, folder / "dit_lora.safetensors")
    assert look("lora").found == "owner/model is in the cache"
    (folder / "dit_lora.safetensors").unlink()
    assert "owner/model in the cache: *.safetensors is missing" in look("lora").found


def test_what_will_be_downloaded(server: Hub, cache: Path) -> None:
    assert look().status == "ok"
    assert "up to 3.0 GB will be downloaded" in look().found
    server.files |= {"single-file.safetensors": 9 * 10**9, "vae/model.safetensors": 10**9}
    assert "3.0 GB" in look().found
    assert "1.0 GB" in look("pipeline").found
    assert "9.0 GB" in look(file="single-file.safetensors").found
    assert "12.0 GB" in look("lora").found
    assert not cache.exists()  # nothing was


@pytest.mark.parametrize(
    ("known", "found", "fix"),
    [
        ({"files": {WEIGHTS: 10**18}}, "are free at", "HF_HOME"),
        ({"files": {"model.bin": 1}}, "on the hub it has no model.safetensors", "that format"),
        (
            {"gated": "auto", "access": False},
            "it is gated, HF_TOKEN is not set and nobody logged in",
            "/owner/model, then `hf auth login`",
        ),
        ({"status": 404, "error": "RepoNotFound"}, "has none, or it is private", "HF_TOKEN"),
        ({"status": 403}, "answers HTTP 403", "renew the token"),
        ({"status": 500}, "answers HTTP 500", "try again"),
    ],
)
def test_what_keeps_it_from_being_downloaded(
    server: Hub, known: dict[str, Any], found: str, fix: str
) -> None:
    for name, value in known.items():
        setattr(server, name, value)
    finding = look()
    assert finding.status == "problem"
    assert found in finding.found
    assert fix in finding.fix


def test_a_password_or_token_is_never_shown(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert huggingface_hub.get_token() == TOKEN
    monkeypatch.setattr(constants, "ENDPOINT", constants.ENDPOINT.replace("//", "//me:s3cret@"))
    server.gated = "manual"
    assert look().status == "ok"
    server.access = False
    shown = [look()]
    assert "it is gated, the token has no access" in shown[0].found
    for server.status in (401, 403, 404, 500):
        shown.append(look())
    for password in ("s3cret", "s3/cr@t"):
        monkeypatch.setattr(constants, "ENDPOINT", f"http://me:{password}@127.0.0.1:9")
        shown.append(look())
        assert "http://127.0.0.1:9 cannot be reached" in shown[-1].found
        assert "hf download owner/model" in shown[-1].fix
    assert {finding.status for finding in shown} == {"problem"}
    text = json.dumps([str(finding) for finding in shown])
    assert TOKEN not in text
    assert "me:s3" not in text

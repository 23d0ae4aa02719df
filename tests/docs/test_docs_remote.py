"""What docs/remote_rewards.md shows works as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi", reason="needs the extra [serve]")

import httpx2
from helpers import ROOT, assert_near, wait_until
from snippets import blocks, commands

from customized_grpo.config.decoding import decode
from customized_grpo.config.sections import RewardPlug
from customized_grpo.config.yaml_text import parse_yaml
from customized_grpo.data.emoji.source import EmojiSource
from customized_grpo.rewards.base import RewardSet
from customized_grpo.rewards.endpoints.remote import RemoteRewardConfig
from customized_grpo.rewards.endpoints.vlm_judge import VlmJudgeConfig
from customized_grpo.types import Example

PAGE = "docs/remote_rewards.md"
DOC = (ROOT / PAGE).read_text(encoding="utf-8")
CPU = torch.device("cpu")
TYPES = {"remote": RemoteRewardConfig, "vlm-judge": VlmJudgeConfig}


def rewards_of(block: str) -> list:
    """Decoded as a run's config decodes them, also before the new types are installed."""
    found = []
    for raw in parse_yaml(block, "doc")["rewards"]:
        cls = TYPES[raw["type"]]
        path = f"{cls.__module__}:{cls.__qualname__}"
        found.append(decode(raw | {"type": path}, "doc", RewardPlug))  # pyright: ignore
    return found


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, list[Example]]:
    examples = EmojiSource(seed=0).held_out(3)
    return torch.stack([e.target for e in examples if e.target is not None]), examples


@contextmanager
def running(*command: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([*command], cwd=cwd, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)


def serve_commands() -> list[list[str]]:
    lines = re.findall(r"`(cgrpo serve-reward [^`]+embedded[^`]+)`", DOC)
    found = [*commands(PAGE), *map(shlex.split, lines)]
    return [words for program, *words in found if program == "cgrpo"]


def test_the_server_serves_what_the_run_asks_for(
    tmp_path: Path, batch: tuple[torch.Tensor, list[Example]]
) -> None:
    served, asked, _ = blocks(PAGE, "yaml")
    (tmp_path / "rewards.yaml").write_text(served)
    with_file, with_flag = serve_commands()
    for command, configs in (
        (with_file, rewards_of(asked)),
        (with_flag, [replace(rewards_of(asked)[1], reward="clip-text")]),
    ):
        python = (sys.executable, "-m", "customized_grpo")
        with running(*python, *command, "--port", "0", cwd=tmp_path) as server:
            assert server.stdout is not None
            url = server.stdout.readline().split()[-1]
            remotes = [replace(config, urls=(url,)) for config in configs]
            scores = RewardSet(remotes, CPU).score(*batch).scores
        assert scores.isfinite().all()
        assert scores.shape == (3, len(configs))
        assert scores[:, -1].mean() > 0.5  # the pictures show what the prompts say


def test_the_server_without_us_speaks_the_protocol(
    tmp_path: Path, batch: tuple[torch.Tensor, list[Example]]
) -> None:
    (source,) = blocks(PAGE, "python")
    (tmp_path / "server.py").write_text(source.replace("8101", "0").replace(
        ".serve_forever()", "\nprint(server.server_port, flush=True)\nserver.serve_forever()"
    ).replace("ThreadingHTTPServer((", "server = ThreadingHTTPServer(("))  # fmt: skip
    with running(sys.executable, "server.py", cwd=tmp_path) as server:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        wait_until(lambda: httpx2.get(f"{url}/health").json()["status"] == "ok")
        config = RemoteRewardConfig(urls=(url,), reward="redness", objective="red")
        scores = config.build(CPU).score(*batch)
    images = batch[0]
    expected = images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))
    assert_near(scores, expected, scale=1)


def test_the_judges_are_valid_configs() -> None:
    identity, prompt = rewards_of(blocks(PAGE, "yaml")[2])
    assert (identity.criterion, prompt.criterion) == ("identity", "prompt")
    assert prompt.max_cost == 25

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
from snippets import blocks, commands, snippets

from customized_grpo.config.decoding import decode
from customized_grpo.config.sections import RewardPlug
from customized_grpo.config.yaml_text import parse_yaml
from customized_grpo.data.emoji.source import EmojiSource
from customized_grpo.rewards.base import RewardSet
from customized_grpo.rewards.endpoints.remote import RemoteRewardConfig
from customized_grpo.rewards.endpoints.rubrics import SHIPPED, load_rubric
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


@pytest.mark.slow
def test_the_server_serves_what_the_run_asks_for(
    tmp_path: Path, batch: tuple[torch.Tensor, list[Example]]
) -> None:
    served, asked, *_ = blocks(PAGE, "yaml")
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


@contextmanager
def without_us(folder: Path, recipe: str = "") -> Iterator[RemoteRewardConfig]:
    """The server on the page, with the ``score`` of a recipe, if any."""
    (source,) = blocks(PAGE, "python")
    before, after = source.split("class Handler", 1)
    handler = "class Handler" + after.replace("8101", "0").replace(
        "ThreadingHTTPServer((", "server = ThreadingHTTPServer(("
    ).replace(".serve_forever()", "\nprint(server.server_port, flush=True)\nserver.serve_forever()")
    (folder / "server.py").write_text(f"{before}{recipe}\n\n{handler}")
    with running(sys.executable, "server.py", cwd=folder) as server:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        wait_until(lambda: httpx2.get(f"{url}/health").json()["status"] == "ok")
        yield RemoteRewardConfig(urls=(url,), reward="redness", objective="red")


def test_the_server_without_us_speaks_the_protocol(
    tmp_path: Path, batch: tuple[torch.Tensor, list[Example]]
) -> None:
    with without_us(tmp_path) as config:
        scores = config.build(CPU).score(*batch)
    images = batch[0]
    expected = images[:, 0].mean(dim=(1, 2)) - images[:, 1:].mean(dim=(1, 2, 3))
    assert_near(scores, expected, scale=1)


EDIT_REWARD = """
import torch, numpy as np

def red(picture):
    return np.array(picture, float)[..., 0].mean()

class EditRewardInferencer:
    def __init__(self, config_path, checkpoint_path, device, reward_dim, rm_head_type):
        assert (device, rm_head_type) == ("cuda", "ranknet_multi_head")
        self.weight = torch.ones(1, requires_grad=True)

    def reward(self, prompts, image_src, image_paths):
        rows = [
            [red(made) - red(source), len(text)]
            for text, source, made in zip(prompts, image_src, image_paths, strict=True)
        ]
        return torch.tensor(rows) * self.weight
"""
"""Stands for the package: mean reward and uncertainty of each pair of PIL pictures."""


def test_edit_reward_is_served_as_the_page_says(
    tmp_path: Path, batch: tuple[torch.Tensor, list[Example]]
) -> None:
    (tmp_path / "EditReward.py").write_text(EDIT_REWARD)
    images, examples = batch
    with without_us(tmp_path, snippets(PAGE, "python")["edit-reward"]) as config:
        scores = config.build(CPU).score(images, examples)
    levels = [round_to_bytes(image[0]).mean() for image in images]
    sources = [round_to_bytes(example.references[0][0]).mean() for example in examples]
    assert_near(scores, torch.stack(levels) - torch.stack(sources), scale=255)


def round_to_bytes(channel: torch.Tensor) -> torch.Tensor:
    return (channel * 255).round()


INSIGHTFACE = """
import numpy as np

class Face:
    def __init__(self, bbox, colour):
        self.bbox, self.embedding = np.array(bbox, np.float32), np.asarray(colour, np.float32)

    @property
    def normed_embedding(self):
        return self.embedding / np.linalg.norm(self.embedding)

class FaceAnalysis:
    def __init__(self, name, allowed_modules=None):
        assert set(allowed_modules) == {"detection", "recognition"}

    def prepare(self, ctx_id=0, det_thresh=0.5, det_size=None):
        self.size = det_size

    def get(self, img):
        assert img.dtype == np.uint8 and img.shape[2] == 3 and img.flags.c_contiguous
        blue, green, red = img.mean((0, 1))
        if red + green + blue == 0:
            return []
        return [Face([0, 0, 4, 4], [1, 1, 1]), Face([2, 2, 9, 9], [red, green, blue])]
"""
"""Stands for the package: two faces in each picture that is not black, the larger one in its mean
colour; pictures are BGR, as OpenCV reads them."""


def test_faces_are_served_as_the_page_says(tmp_path: Path) -> None:
    (tmp_path / "insightface").mkdir()
    (tmp_path / "insightface/__init__.py").touch()
    (tmp_path / "insightface/app.py").write_text(INSIGHTFACE)
    red, blue, black = (torch.tensor(c).view(3, 1, 1).expand(3, 16, 16).float() for c in COLOURS)
    examples = [
        Example(id=str(i), prompt="p", subject="person", references=references)
        for i, references in enumerate([(blue, red), (blue,), (black, red), (black,)])
    ]
    images = torch.stack([red, red, black, red])
    with without_us(tmp_path, snippets(PAGE, "python")["arcface"]) as config:
        scores = config.build(CPU).score(images, examples)
    # Like the second reference; like none; no face in the output; none in the references.
    assert scores[:3].tolist() == pytest.approx([1, 0, 0])
    assert scores[3].isnan()


COLOURS = ([1, 0, 0], [0, 0, 1], [0, 0, 0])


def test_the_named_judges_are_those_that_the_page_serves() -> None:
    judges = rewards_of(blocks(PAGE, "yaml")[3])
    served = {}
    for words in commands(PAGE):
        if words[:2] == ["vllm", "serve"]:
            flags = dict(zip(words[3::2], words[4::2], strict=True))
            served[flags["--served-model-name"]] = flags["--port"]
    assert {j.model: j.base_url for j in judges} == {
        model: f"http://127.0.0.1:{port}/v1" for model, port in served.items()
    }
    assert [judge.is_groupwise for judge in judges] == [False, False, True]
    table = DOC.split("| criterion |")[1].split("\n\n")[0]
    for criterion in SHIPPED:
        assert criterion in ("identity", "prompt") or f"`{criterion}`" in table
        for aspect in load_rubric(criterion).aspects:
            assert aspect in table


def test_the_judges_are_valid_configs() -> None:
    identity, prompt = rewards_of(blocks(PAGE, "yaml")[2])
    assert (identity.criterion, prompt.criterion) == ("identity", "prompt")
    assert prompt.max_cost == 25

"""A run waits for people: it says so, can be stopped meanwhile, and learns what they like."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import changed, metrics, wait_until
from PIL import Image

from customized_grpo.config import ConstantSchedule, LoraSettings, RunConfig, check_config
from customized_grpo.errors import Interrupted
from customized_grpo.rewards.ballots import VOTES, Ballots, Group
from customized_grpo.rewards.base import RewardSet
from customized_grpo.rewards.votes import VotesConfig
from customized_grpo.runs.interrupts import Interrupts
from customized_grpo.runs.log import RunLog
from customized_grpo.runs.ranks import ALONE
from customized_grpo.tools.vote.booth import Booth, Choice
from customized_grpo.tools.watch.facts import Watcher
from customized_grpo.training import people
from customized_grpo.training.train import train
from customized_grpo.types import Example, RewardScores

CPU = torch.device("cpu")


def redness(ballots: Ballots, digest: str) -> float:
    """How much redder than green and blue a picture is."""
    pixels = np.asarray(Image.open(ballots.picture(digest)), dtype=float) / 255
    return float(pixels[..., 0].mean() - pixels[..., 1:].mean())


class Voter:
    """Looks every moment and prefers red, as long as ``wants`` says; remembers what it was asked.

    It votes as the page does, and knows nothing of the run but its folder of votes.
    """

    def __init__(self, folder: Path, wants: Callable[[int], bool] = lambda count: True) -> None:
        self.ballots, self.booth, self.wants = Ballots(folder), Booth([folder]), wants
        self.groups: list[Group] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._vote)

    def __enter__(self) -> Voter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _vote(self) -> None:
        while not self._is_over.wait(0.05):
            for group in self.booth.groups("red")["groups"]:
                if self.wants(len(self.groups)):
                    self._choose(group)

    def _choose(self, group: dict[str, Any]) -> None:
        best = max(group["pictures"], key=lambda digest: redness(self.ballots, digest))
        self.booth.cast(Choice(group=group["id"], best=best, worst=None, voter="red"))
        self.groups += [g for g in self.ballots.asked() if g.id == group["id"]]


@pytest.fixture
def run(tiny_config: RunConfig, tmp_path: Path) -> SimpleNamespace:
    """Two groups of two pictures that were asked about, and a log."""
    rewards = RewardSet([VotesConfig(objective="prompt")], CPU)
    rewards.people[0].begin(tmp_path, 0)
    examples = [Example(id=p, prompt=p, references=(), subject="") for p in ("a fox", "a cup")]
    groups = torch.arange(2).repeat_interleave(2)
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    scores = rewards.score(images, [examples[group] for group in groups.tolist()], groups)
    log = RunLog(tmp_path, tiny_config, CPU)
    rollout = SimpleNamespace(images=images, group_ids=groups)

    def wait(interrupts: Interrupts) -> RewardScores:
        return people.with_answers(scores, rollout, examples, rewards, log, interrupts, ALONE)  # pyright: ignore

    return SimpleNamespace(folder=tmp_path, images=images, wait=wait)


def test_it_says_what_it_waits_for_and_goes_on_when_it_has_it(
    run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(people, "_POLL_SECONDS", 0.05)
    seen: list[str] = []
    watcher = Watcher(run.folder)

    def watched(count: int) -> bool:
        facts = watcher.look()
        seen.append(f"{facts.state} {facts.waits_for}")
        return f"{count} of 2" in seen[-1]  # not before the run has said so

    with Voter(run.folder / "votes", watched) as voter:
        scores = run.wait(Interrupts())
    command = f"`cgrpo vote {run.folder}`"
    for count in range(2):
        assert f"starting waiting for votes: {count} of 2 groups have theirs; {command}" in seen
    assert watcher.look().waits_for is None
    reds = [redness(voter.ballots, digest) for g in voter.groups for digest in g.pictures]
    expected = [float(red == max(reds[i // 2 * 2 :][:2])) for i, red in enumerate(reds)]
    assert scores.scores[:, 0].tolist() == expected
    assert scores.errors == ()


def test_a_run_that_says_nothing_any_more_does_not_count_as_waiting(run: SimpleNamespace) -> None:
    interrupts = Interrupts()
    interrupts.received = signal.SIGTERM
    with pytest.raises(Interrupted):
        run.wait(interrupts)
    file = run.folder / "waiting.json"
    assert file.exists()
    assert Watcher(run.folder).look().waits_for
    long_ago = time.time() - 100
    os.utime(file, (long_ago, long_ago))
    assert Watcher(run.folder).look().waits_for is None


def votes_config(config: RunConfig) -> RunConfig:
    """Trained on votes alone."""
    config = changed(
        config,
        advantage={
            "shaping": "linear", "gamma": None, "center": False,
            "schedule": ConstantSchedule(prompt=1.0),
        },
        rollout={"group_size": 8, "num_trained_steps": 3},
        train={"num_updates": 5, "learning_rate": 5e-3, "sample_every": 0, "ema_decay": None},
    )  # fmt: skip
    rewards = (VotesConfig(objective="prompt"),)
    return check_config(replace(config, rewards=rewards, lora=LoraSettings(rank=16)))


@pytest.mark.slow
def test_a_voter_who_prefers_red_gets_red_pictures(tiny_config: RunConfig) -> None:
    """Stopped while it waits, in the first rollout, and resumed: no group is asked about twice."""
    config = votes_config(tiny_config)
    folder = Path(config.output_dir, config.name)

    stop = threading.Event()

    def stop_after_one(count: int) -> bool:
        if count == 1 and not stop.is_set():
            stop.set()  # a second signal would end the process at once
            os.kill(os.getpid(), signal.SIGTERM)
        return count == 0

    with Voter(folder / "votes", stop_after_one) as first, pytest.raises(Interrupted):
        train(config)
    assert len(first.groups) == 1
    with Voter(folder / "votes") as voter:
        train(config, resume=True)
    wait_until(lambda: not voter.ballots.asked())
    asked = [*first.groups, *voter.groups]
    lines = (folder / "votes" / VOTES).read_text().splitlines()
    assert len({json.loads(line)["group"] for line in lines}) == len(lines) == len(asked) == 10
    reds = [np.mean([redness(voter.ballots, d) for d in group.pictures]) for group in asked]
    spread = np.mean([np.std([redness(voter.ballots, d) for d in g.pictures]) for g in asked])
    assert np.mean(reds[-4:]) > np.mean(reds[:4]) + spread
    assert all(row["invalid_samples"] == 0 for row in metrics(folder))

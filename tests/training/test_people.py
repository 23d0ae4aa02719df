"""A run waits for people: it says so, and can be stopped meanwhile."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("uvicorn", reason="cgrpo vote needs the extra [playground]")

from voter import Voter, redness

from customized_grpo.config import RunConfig
from customized_grpo.errors import Interrupted
from customized_grpo.rewards.base import RewardSet
from customized_grpo.rewards.votes import VotesConfig
from customized_grpo.runs.interrupts import Interrupts
from customized_grpo.runs.log import RunLog
from customized_grpo.runs.ranks import ALONE
from customized_grpo.tools.watch.facts import Watcher
from customized_grpo.training import people
from customized_grpo.types import Example, RewardScores

CPU = torch.device("cpu")


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

"""Votes: what is asked, what counts, and what a run gets of it."""

from __future__ import annotations

import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import assert_near, changed
from torch import Tensor

from customized_grpo.config import MeasuredSchedule, RunConfig, check_config
from customized_grpo.errors import ConfigError, DataError
from customized_grpo.rewards.ballots import VOTES, Ballots, Group, Vote
from customized_grpo.rewards.base import RewardSet
from customized_grpo.rewards.votes import VotesConfig, VotesReward
from customized_grpo.types import Example

CPU = torch.device("cpu")


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def example(prompt: str = "a fox") -> Example:
    return Example(id=prompt, prompt=prompt, references=(pictures(1, 99)[0],), subject="fox")


def begun(run: Path, rank: int = 0, **fields: object) -> VotesReward:
    reward = VotesReward(VotesConfig(objective="prompt", **fields))  # pyright: ignore
    reward.begin(run, rank)
    return reward


def vote(group: Group, best: int | None, worst: int | None = None, voter: str = "ann") -> Vote:
    named = [None if place is None else group.pictures[place] for place in (best, worst)]
    return Vote(
        group=group.id, prompt=group.prompt, pictures=group.pictures, best=named[0],
        worst=named[1], voter=voter, time="2026-11-27T20:00:00+00:00",
    )  # fmt: skip


def test_groups_are_asked_about_and_scored_when_they_have_their_votes(tmp_path: Path) -> None:
    reward = begun(tmp_path, choice="best-and-worst", min_votes=2)
    groups, examples = [pictures(4), pictures(3, 1)], [example("a fox"), example("a cup")]
    assert all(column.isnan().all() for column in reward.score_groups(groups, examples))
    assert reward.progress() == (0, 2)
    ballots = Ballots(tmp_path / "votes")
    fox, cup = ballots.asked()
    assert (fox.prompt, len(fox.pictures), fox.needs_worst) == ("a fox", 4, True)
    assert "text says" in fox.question
    for digest in (*fox.pictures, *fox.references):
        assert ballots.picture(digest).read_bytes().startswith(b"\x89PNG")
    ballots.cast(vote(fox, 0, 1))
    ballots.cast(vote(fox, 2, 0))  # the same person has thought again
    assert reward.progress() == (0, 2)
    ballots.cast(vote(fox, 0, 3, voter="bob"))
    ballots.cast(vote(cup, None))
    ballots.cast(vote(cup, None, voter="bob"))
    assert reward.progress() == (2, 2)
    scores = reward.score_groups(groups, examples)
    assert_near(scores[0], [0.0, 0.0, 0.5, -0.5])
    assert_near(scores[1], [0.0, 0.0, 0.0])
    reward.dismiss()
    assert ballots.asked() == []


def test_votes_on_the_same_pictures_count_after_a_break(tmp_path: Path) -> None:
    asked = [pictures(3)], [example()]
    begun(tmp_path).score_groups(*asked)
    ballots = Ballots(tmp_path / "votes")
    (group,) = ballots.asked()
    ballots.cast(vote(group, 1))
    again = begun(tmp_path)
    assert ballots.asked() == []  # what a run asked that was killed, nobody waits for
    assert_near(again.score_groups([pictures(3)], [example()])[0], [0.0, 1.0, 0.0])
    for images, of in (
        (pictures(3) + 0.01, example()),
        (pictures(3), example("a cup")),
        (pictures(3).flip(0), example()),
    ):
        assert again.score_groups([images], [of])[0].isnan().all()
    assert begun(tmp_path, question="?").score_groups(*asked)[0].isnan().all()


def test_what_processes_asked_that_are_no_more_is_forgotten(tmp_path: Path) -> None:
    """A run of four that goes on with one, its votes outside its folder."""
    folder = str(tmp_path / "elsewhere")
    begun(tmp_path, rank=3, folder=folder).score_groups([pictures(2)], [example()])
    assert len(Ballots(Path(folder)).asked()) == 1
    begun(tmp_path, folder=folder)
    assert Ballots(Path(folder)).asked() == []


def test_processes_share_a_folder(tmp_path: Path) -> None:
    first, second = begun(tmp_path), begun(tmp_path, rank=1)
    first.score_groups([pictures(2)], [example("a fox")])
    second.score_groups([pictures(2)], [example("a cup")])
    asked = Ballots(tmp_path / "votes").asked()
    assert [group.prompt for group in asked] == ["a fox", "a cup"]
    Ballots(tmp_path / "votes").cast(vote(asked[1], 0))
    assert (first.progress(), second.progress()) == ((0, 1), (1, 1))
    first.dismiss()
    assert [group.prompt for group in Ballots(tmp_path / "votes").asked()] == ["a cup"]


def test_what_has_too_few_votes_in_the_end_is_not_scored_and_said(tmp_path: Path) -> None:
    now = [0.0]
    reward = VotesReward(VotesConfig(objective="prompt", patience=60), lambda: now[0])
    reward.begin(tmp_path, 0)
    asked = [pictures(2), pictures(2, 1)], [example(), example("a cup")]
    reward.score_groups(*asked)
    ballots = Ballots(tmp_path / "votes")
    ballots.cast(vote(ballots.asked()[0], 0))
    assert (reward.take_errors(), reward.is_patient()) == ((), True)
    now[0] = 61
    assert not reward.is_patient()
    scores = reward.score_groups(*asked)
    assert_near(scores[0], [1.0, 0.0])
    assert scores[1].isnan().all()
    assert reward.take_errors() == ("1 of 2 groups have fewer votes than min_votes = 1",)
    reward.dismiss()
    reward.score_groups(*asked)
    assert reward.is_patient()  # of the next rollout


def test_many_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    group = Ballots(tmp_path).group("?", "süß" * 200, [], list(pictures(2)), False, 1)

    def cast(voter: int) -> None:
        for _ in range(20):
            Ballots(tmp_path).cast(vote(group, 0, voter=str(voter)))

    threads = [threading.Thread(target=cast, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len((tmp_path / VOTES).read_text("utf-8").splitlines()) == 160
    assert len(Ballots(tmp_path).votes()[group.id]) == 8


def test_many_readers_count_a_vote_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`/groups` is answered on threads, which may all find that there are new votes."""
    ballots = Ballots(tmp_path)
    group = ballots.group("?", "a fox", [], list(pictures(2)), False, 1)
    cast = [vote(group, 0, voter=str(voter)) for voter in range(2000)]
    ballots.cast(cast[0])
    together = threading.Barrier(6)
    monkeypatch.setattr("customized_grpo.rewards.ballots.read_votes", lambda file: cast)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def read(_: int) -> int:
        together.wait()
        return len(ballots.votes()[group.id])

    try:
        with ThreadPoolExecutor(6) as pool:
            for _ in range(20):
                ballots._read = None
                assert list(pool.map(read, range(6))) == [2000] * 6
    finally:
        sys.setswitchinterval(interval)


def test_a_vote_that_finds_a_full_disk_leaves_the_others_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ballots, write = Ballots(tmp_path), os.write
    group = ballots.group("?", "a fox", [], list(pictures(2)), False, 1)
    ballots.cast(vote(group, 0))
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda file, content: write(file, content[:40]))
        with pytest.raises(OSError, match="in part"):
            ballots.cast(vote(group, 0, voter="bob"))
    ballots.cast(vote(group, 0, voter="cy"))
    assert [v.voter for v in ballots.votes()[group.id]] == ["ann", "cy"]


def test_a_line_that_is_being_written_waits_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    ballots = Ballots(tmp_path)
    group = ballots.group("?", "a fox", [], list(pictures(2)), False, 1)
    ballots.cast(vote(group, 0))
    file = tmp_path / VOTES
    whole = file.read_text()
    file.write_text(whole + whole[:40].replace("ann", "bob"))
    assert len(ballots.votes()[group.id]) == 1
    for line, expected in (
        ("nonsense", "is not JSON"),
        (json.dumps({**json.loads(whole), "best": "../../x"}), "best must match"),
        (json.dumps({**json.loads(whole), "rank": 1}), "rank must be a known field"),
    ):
        file.write_text(f"{whole}{line}\n")
        with pytest.raises(DataError, match=rf"votes\.jsonl:2: .*{expected}"):
            ballots.votes()


def test_people_are_asked_by_runs_alone(tiny_config: RunConfig) -> None:
    votes = VotesConfig(objective="prompt")
    models = [reward for reward in tiny_config.rewards if reward.objective == "identity"]
    config = check_config(replace(tiny_config, rewards=(votes, *models)))
    assert votes not in config.pointwise_rewards
    gate = {"shaping": "gate", "gamma": None, "center": False}
    measured = {"schedule": MeasuredSchedule()}
    for wrong, expected in (
        (replace(config, evaluators=(votes,)), "evaluators.0 must score single pictures, got 'vot"),
        (changed(config, advantage=measured), "schedule must not be measured"),
        (changed(config, advantage=gate), "shaping must not be gate"),
    ):
        with pytest.raises(ConfigError, match=expected):
            check_config(wrong)
    scores = RewardSet([votes], CPU).score(pictures(2), [example()] * 2, torch.zeros(2).long())
    assert scores.scores.isnan().all()
    assert scores.errors == ("votes: only a run asks people, and none has begun",)

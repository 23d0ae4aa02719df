"""Rewards that score whole groups: the contract, and the judge that ranks one in a request."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

pytest.importorskip("uvicorn", reason="tests/servers.py needs the extra [serve]")

from helpers import changed
from servers import Reply, Request, pictures_of, ranked_by_redness, scripted_server

from customized_grpo.config import (
    FaultConfig,
    RewardConfig,
    RunConfig,
    load_benchmark,
    read_config,
    to_raw,
)
from customized_grpo.errors import ConfigError, RewardError
from customized_grpo.rewards.base import RewardSet
from customized_grpo.rewards.endpoints.vlm_judge import VlmJudgeConfig
from customized_grpo.runs.interrupts import Interrupts
from customized_grpo.runs.ranks import Ranks
from customized_grpo.tools.serve.config import read_serve_config
from customized_grpo.training.loop import inner_rows
from customized_grpo.training.scoring import WholeGroups, settle_scores
from customized_grpo.training.train import _check_even
from customized_grpo.types import Example

CPU = torch.device("cpu")


def ranker(url: str, **fields: Any) -> VlmJudgeConfig:
    fields = {"criterion": "prompt-ranking", "objective": "prompt", "concurrency": 4} | fields
    return VlmJudgeConfig(name="rank", base_url=f"{url}/v1", model="m", **fields)


def example(prompt: str = "p") -> Example:
    return Example(id=prompt, prompt=prompt, references=(torch.zeros(3, 8, 8),), subject="cup")


def reddish(*levels: float) -> Tensor:
    """Pictures ``[B, 3, 16, 16]`` of these levels of red."""
    images = torch.zeros(len(levels), 3, 16, 16)
    images[:, 0] = torch.tensor(levels).view(-1, 1, 1)
    return images


@dataclass(frozen=True, kw_only=True)
class Spy(RewardConfig):
    """A group-wise reward that is itself: a picture's red less that of its group."""

    type: Literal["spy"] = "spy"  # pyright: ignore[reportIncompatibleVariableOverride]
    seen: list[list[float]] = dataclasses.field(default_factory=list)
    broken: list[int] = dataclasses.field(default_factory=list)
    """Numbers of the calls that fail."""

    @property
    def is_groupwise(self) -> bool:
        return True

    def build(self, device: torch.device) -> Spy:
        return self

    def score_groups(self, groups: Sequence[Tensor], examples: Sequence[Example]) -> list[Tensor]:
        self.seen.extend(group[:, 0, 0, 0].tolist() for group in groups)
        if len(self.seen) in self.broken:
            raise RewardError("the ranker is away")
        return [g[:, 0, 0, 0] - g[:, 0, 0, 0].mean() for g in groups]


@dataclass(frozen=True, kw_only=True)
class Level(RewardConfig):
    """A reward of single pictures that is itself: their red, and NaN the first time above .85."""

    type: Literal["level"] = "level"  # pyright: ignore[reportIncompatibleVariableOverride]
    calls: list[int] = dataclasses.field(default_factory=list)

    def build(self, device: torch.device) -> Level:
        return self

    def score(self, images: Tensor, examples: Sequence[Example]) -> Tensor:
        self.calls.append(len(images))
        red = images[:, 0, 0, 0]
        return torch.where((red > 0.85) & (len(self.calls) == 1), torch.nan, red)

    def take_errors(self) -> tuple[str, ...]:
        return ("away",) if len(self.calls) == 1 else ()


def both(spy: Spy | None = None, level: Level | None = None) -> RewardSet:
    spy = spy or Spy(objective="prompt", name="spy")
    return RewardSet((level or Level(objective="identity", name="level"), spy), CPU)


def test_a_group_is_ranked_in_one_request_and_in_its_own_order() -> None:
    with scripted_server(ranked_by_redness) as (url, requests):
        rewards = RewardSet((ranker(url),), CPU)
        images = reddish(0.2, 0.9, 0.5, 0.4, 0.8, 0.6)
        groups = torch.tensor([4, 4, 4, 7, 7, 7])
        examples = [example("a")] * 3 + [example("b")] * 3
        scored = rewards.score(images, examples, groups)
    assert scored.scores[:, 0].tolist() == [0.0, 1.0, 0.5, 0.0, 1.0, 0.5]
    assert scored.errors == ()
    assert [len(pictures_of(request)) for request in requests] == [3, 3]
    prompts = sorted(json.loads(r.body)["messages"][1]["content"][0]["text"] for r in requests)
    assert [text[:13] for text in prompts] == ['The text: "a"', 'The text: "b"']
    schema = json.loads(requests[0].body)["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["ranking"]["items"]["enum"] == [1, 2, 3]
    assert rewards.metrics()["rank/requests"] == 2


def test_groups_are_ranked_beside_each_other() -> None:
    barrier = threading.Barrier(3, timeout=20)

    def answer(request: Request) -> Reply:
        barrier.wait()  # passes only when three are there at once
        return ranked_by_redness(request)

    with scripted_server(answer) as (url, _):
        images, groups = reddish(*[0.1, 0.2] * 3), torch.tensor([0, 0, 1, 1, 2, 2])
        scored = RewardSet((ranker(url),), CPU).score(images, [example()] * 6, groups)
    assert scored.scores[:, 0].tolist() == [0.0, 1.0] * 3


def test_a_group_that_could_not_be_ranked_is_nan_and_no_other() -> None:
    def answer(request: Request) -> Reply:
        if len(pictures_of(request)) == 2:
            text = '{"ranking": [1, 1]}'
            return Reply.json({"choices": [{"message": {"content": text}}]})
        return ranked_by_redness(request)

    with scripted_server(answer) as (url, _):
        rewards = RewardSet((ranker(url),), CPU)
        groups = torch.tensor([0, 0, 1, 1, 1])
        scored = rewards.score(reddish(0.1, 0.2, 0.5, 0.4, 0.3), [example()] * 5, groups)
    assert scored.scores[:2, 0].isnan().all()
    assert scored.scores[2:, 0].tolist() == [1.0, 0.5, 0.0]
    (error,) = scored.errors
    assert error.startswith("rank: 1 of 2 groups: m at http://127.0.0.1")
    assert "the ranking must name each picture from 1 to 2 once" in error
    assert rewards.metrics()["rank/failures"] == 1


def test_a_picture_that_is_none_is_left_out_of_its_group() -> None:
    """It is NaN; the others are compared among themselves, and one alone with nothing."""
    images = reddish(0.2, math.nan, 0.6, math.nan, 0.5)
    spy = Spy(objective="prompt", name="spy")
    scored = both(spy).score(images, [example()] * 5, torch.tensor([0, 0, 0, 1, 1]))
    assert spy.seen == [pytest.approx([0.2, 0.6])]
    column = scored.scores[:, 1]
    assert column[[0, 2]].tolist() == pytest.approx([-0.2, 0.2])
    assert column[[1, 3, 4]].isnan().all()
    assert scored.names == ("level", "spy")


def test_without_groups_it_is_left_out() -> None:
    """As in a validation, where each picture is of an example of its own."""
    scored = both().score(reddish(0.1, 0.2), [example()] * 2)
    assert scored.names == ("level",)
    assert scored.scores.shape == (2, 1)
    alone = RewardSet((Spy(objective="prompt"),), CPU).score(reddish(0.1), [example()])
    assert (alone.names, alone.scores.shape) == ((), (1, 0))


def test_a_group_wise_reward_that_fails_or_misbehaves_is_nan_with_a_reason() -> None:
    spy = Spy(objective="prompt", name="spy", broken=[1])
    scored = both(spy).score(reddish(0.1, 0.2), [example()] * 2, torch.zeros(2).long())
    assert scored.scores[:, 1].isnan().all()
    assert "spy: the ranker is away" in scored.errors

    class Short(Spy):
        def score_groups(self, groups: Sequence[Tensor], examples: Any) -> list[Tensor]:
            return [torch.zeros(1) for _ in groups]

    scored = both(Short(objective="prompt", name="spy")).score(
        reddish(0.1, 0.2), [example()] * 2, torch.zeros(2).long()
    )
    assert "spy: must return one score per image, shape (2,), got (1,)" in scored.errors


@pytest.mark.parametrize("size", [1, 2, 4, 5, 12])
def test_no_group_is_split_however_they_were_sampled(size: int) -> None:
    handed: list[tuple[list[float], list[int]]] = []
    put = WholeGroups(
        lambda images, groups: handed.append((images[:, 0, 0, 0].tolist(), groups.tolist())), 4
    )
    images, groups = reddish(*torch.arange(12).tolist()), torch.arange(3).repeat_interleave(4)
    for part in torch.arange(12).split(size):
        put(images[part], groups[part])
    assert [x for levels, _ in handed for x in levels] == list(range(12))
    for _, ids in handed:
        assert len(ids) % 4 == 0
        assert all(ids.count(group) == 4 for group in ids)


def test_what_is_lost_is_asked_for_again_by_the_whole_group() -> None:
    """A single picture has no rank; the group without a loss is left alone."""
    images = reddish(0.1, 0.9, 0.5, 0.4, 0.3, 0.2)
    groups, prompts = torch.tensor([0, 0, 0, 1, 1, 1]), [example("a"), example("b")]
    spy, level = Spy(objective="prompt", name="spy"), Level(objective="identity", name="level")
    rewards = both(spy, level)
    first = rewards.score(images, [prompts[g] for g in groups.tolist()], groups)
    assert first.scores.isnan().nonzero().tolist() == [[1, 0]]
    rollout = SimpleNamespace(
        images=images, group_ids=groups, log_probs=torch.zeros(6, 1), final_latents=images
    )
    settled = settle_scores(
        first, rollout, prompts, rewards,  # pyright: ignore[reportArgumentType]
        FaultConfig(max_lost_rewards=0.0, reward_pauses=(0.01,)), Interrupts(), Ranks(),
    )  # fmt: skip
    assert level.calls == [6, 3]
    assert [len(seen) for seen in spy.seen] == [3, 3, 3]
    assert settled.scores[:, 0].tolist() == pytest.approx([0.1, 0.9, 0.5, 0.4, 0.3, 0.2])
    expected = [-0.4, 0.4, 0.0, 0.1, 0.0, -0.1]
    assert settled.scores[:, 1].tolist() == pytest.approx(expected, abs=1e-6)


def groupwise(config: RunConfig, **rollout: object) -> RunConfig:
    """With rankings instead of the prompt's reward."""
    identity = next(r for r in config.rewards if r.objective == "identity")
    rewards = (identity, ranker("http://127.0.0.1:9"))
    return changed(dataclasses.replace(config, rewards=rewards), rollout=rollout)


@pytest.mark.parametrize(
    ("split", "inner", "prompts", "size"),
    [("groups", 2, 8, 2), ("groups", 1, 3, 3), ("samples", 2, 4, 2), ("samples", 3, 3, 3)],
)
def test_no_group_is_split_between_processes(
    tiny_config: RunConfig, split: str, inner: int, prompts: int, size: int
) -> None:
    """Whatever is accepted; and one prompt more is refused, where without a ranking it is not."""
    config = groupwise(tiny_config, group_size=6, prompts_per_rollout=prompts)
    config = changed(config, train={"inner_updates": inner, "split": split})
    _check_even(config, Ranks(world_size=size))
    shares = Ranks(world_size=size).split(inner_rows(config))
    for share in shares:
        groups = (share // 6).tolist()
        assert all(groups.count(group) == 6 for group in groups)
        assert groups == sorted(groups)
    more = changed(config, rollout={"prompts_per_rollout": prompts + 1})
    what = r"must be a multiple of .* with reward rank, which scores groups, got \d+; "
    with pytest.raises(ConfigError, match=rf"rollout.prompts_per_rollout: {what}"):
        _check_even(more, Ranks(world_size=size))
    _check_even(dataclasses.replace(more, rewards=more.rewards[:1]), Ranks(world_size=size))
    _check_even(more, Ranks())


def test_it_cannot_evaluate_nor_be_served(tiny_config: RunConfig, tmp_path: Path) -> None:
    judge = to_raw(ranker("http://127.0.0.1:9"))
    raw = to_raw(tiny_config) | {"evaluators": [judge]}
    what = (
        r"must score single pictures, got 'rank', which ranks those of a group: .*; make it one "
        "of a run's rewards, or take another criterion"
    )
    with pytest.raises(ConfigError, match=rf"evaluators\.0 {what}"):
        read_config(json.dumps(raw), "run")
    with pytest.raises(ConfigError, match=rf"rewards\.0 {what}"):
        read_serve_config({"rewards": [judge]}, "file")
    file = tmp_path / "bench.yaml"
    bench = {"name": "b", "benchmark": {"type": "emoji"}, "images": "pictures", "metrics": [judge]}
    file.write_text(json.dumps(bench))
    with pytest.raises(ConfigError, match=rf"metrics\.0 {what}"):
        load_benchmark(file)


@pytest.mark.parametrize(
    ("advantage", "what"),
    [
        ({"schedule": {"type": "measured"}}, "advantage.schedule must not be measured"),
        (
            {"shaping": "gate", "center": False, "schedule": {"type": "tdw"}},
            "advantage.shaping must not be gate",
        ),
    ],
)
def test_what_goes_by_the_size_of_scores_takes_no_ranks(
    tiny_config: RunConfig, advantage: dict[str, Any], what: str
) -> None:
    raw = to_raw(groupwise(tiny_config))
    raw["advantage"] |= advantage
    with pytest.raises(ConfigError, match=f"{what} with reward 'rank', which scores"):
        read_config(json.dumps(raw), "run")
    read_config(json.dumps(raw | {"rewards": to_raw(tiny_config.rewards)}), "run")

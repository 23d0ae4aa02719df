"""Validation in several processes: each its share, together the numbers of one."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest
import torch
from helpers import changed

from customized_grpo.config import RunConfig
from customized_grpo.data.emoji.source import EmojiSource
from customized_grpo.errors import ConfigError
from customized_grpo.generators.flux1 import Flux1Generator
from customized_grpo.ops import group_normalize
from customized_grpo.rewards.base import RewardSet
from customized_grpo.rewards.truth import SHARES
from customized_grpo.runs.ranks import Ranks
from customized_grpo.training.validation import Validation, _shares, what_copying_pays
from customized_grpo.types import Advantages, Example

CPU = torch.device("cpu")


class Parts(Ranks):
    """Two processes one after the other: the second one finds what the first one has sent."""

    sent: ClassVar[dict[int, list[torch.Tensor]]] = {}

    def all_gather(self, local: torch.Tensor, shares: list[torch.Tensor]) -> torch.Tensor:
        """See Ranks."""
        mine = self.sent.setdefault(self.rank, [])
        mine.append(local)
        whole = local.new_zeros(sum(map(len, shares)), *local.shape[1:])
        for rank, parts in self.sent.items():
            whole[shares[rank]] = parts[len(mine) - 1]
        return whole

    def all_gather_object(self, value: object) -> list[object]:
        """See Ranks; what the other one has is added by the test."""
        return [value, *self.others]

    others: ClassVar[list[object]] = []


def test_each_process_samples_and_scores_its_share(
    tiny_config: RunConfig, generator: Flux1Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One at a time: what is sampled does not depend on how many are.
    config = changed(tiny_config, evaluation={"num_validation": 5, "batch_size": 1})
    sets = RewardSet(config.rewards, CPU), RewardSet(config.evaluators, CPU, "evaluators")
    data = EmojiSource(seed=0)
    alone = Validation(generator, config, data, *sets, None)
    images = alone.sample()
    expected = alone.metrics(images, is_base=True)
    assert "copy_gap/validation" in expected
    Parts.sent.clear()
    for rank, rows in ((0, [0, 2, 4]), (1, [1, 3])):
        Parts.others[:] = [alone._truth.copy_limit]
        part = Validation(generator, config, data, *sets, None, Parts(rank=rank, world_size=2))
        own = part.sample()
        assert torch.equal(own, images[rows])
        Parts.others[:] = [list(SHARES)]
        together = part.metrics(own, is_base=True)
    assert together == pytest.approx(expected, abs=1e-5)
    Parts.others[:] = [["copies"]]  # what the examples of one process do not know, none says
    Parts.sent.clear()
    shares = [n for n in part.metrics(own, is_base=True) if n.startswith("validation/share/")]
    assert shares == ["validation/share/copies"]
    assert "validation/share/subject_right" in expected
    Parts.others[:] = [None]  # one has examples without a truth: what is a copy, none says
    part = Validation(generator, config, data, *sets, None, Parts(rank=0, world_size=2))
    assert part._truth.copy_limit is None
    many = Ranks(world_size=8)
    with pytest.raises(ConfigError, match=r"^evaluation\.num_validation: .* 8 .*, got 5; raise it"):
        Validation(generator, config, data, *sets, None, many)
    wider = changed(config, evaluation={"num_validation": 128})
    monkeypatch.setattr(EmojiSource, "validation", lambda self, count: data.held_out(5))
    with pytest.raises(ConfigError, match=r"got 5; the data have no more for validation$"):
        Validation(generator, wider, data, *sets, None, many)


def test_sharded_processes_pass_equally_often(examples: list[Example]) -> None:
    """Five examples of one layout and one of another, which cannot be in one batch."""
    wide = dataclasses.replace(examples[0], references=(torch.zeros(3, 64, 128),))
    mixed = [examples[0], wide, *examples[:3], examples[3]]
    for count in (2, 3):
        even = _shares(mixed, count, evenly=True)
        assert {row for share in even for row in share.tolist()} == set(range(6))
        assert len({len(share) for share in even}) == 1
        assert [sum(row == 1 for row in share.tolist()) for share in even] == [1] * count
    assert sorted(torch.cat(_shares(mixed, 4, evenly=False)).tolist()) == list(range(6))


def test_what_copying_pays_is_the_mean_correlation_within_groups() -> None:
    rng = torch.Generator().manual_seed(3)
    gap, scores = torch.randn(12, generator=rng), torch.randn(12, 2, generator=rng)
    gap[6:] += 100.0  # another group's level says nothing
    gap[11] = torch.nan  # could not be scored
    groups = torch.arange(12) // 6
    own = group_normalize(scores, groups)
    advantages = Advantages(per_objective=own, per_step=own, valid=torch.ones(12, dtype=torch.bool))
    found = what_copying_pays(gap, advantages, groups, ["identity", "prompt"])
    for column, name in enumerate(("identity", "prompt")):
        parts = [gap[:6], gap[6:11]]
        z = torch.cat([(part - part.mean()) / part.std() for part in parts])
        expected = (z * own[:11, column]).mean().item()
        assert found[f"copying_pays/{name}"] == pytest.approx(expected, abs=1e-6)
    assert what_copying_pays(gap * torch.nan, advantages, groups, ["identity", "prompt"]) == {}

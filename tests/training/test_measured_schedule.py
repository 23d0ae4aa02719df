"""What a run measures of the model that it begins with: what each step's noise moves, and what the
base scores."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path

import pytest
import torch
from chaos import content
from helpers import changed, metrics
from loops import make_loop

from customized_grpo.config import AdvantageConfig, CustomSchedule, MeasuredSchedule, RunConfig
from customized_grpo.errors import ConfigError, RewardError
from customized_grpo.generators.flux1 import Flux1Generator
from customized_grpo.ops import noise_variance
from customized_grpo.rewards.base import RewardSet
from customized_grpo.runs.checkpoint import Checkpoint
from customized_grpo.training import measure
from customized_grpo.training.build import build_world
from customized_grpo.training.origins import origins, recalled
from customized_grpo.training.policy import make_policy
from customized_grpo.training.rollout import collect_rollout, one_step_rollouts
from customized_grpo.training.train import train
from customized_grpo.types import Example

MEASURED = AdvantageConfig(schedule=MeasuredSchedule(num_prompts=3, num_samples=3))


def schedule_of(run: Path) -> dict[str, list]:
    return json.loads((run / "schedule.json").read_text())


def test_groups_share_everything_but_the_noise_of_their_step(
    generator: Flux1Generator, tiny_config: RunConfig, examples: list[Example]
) -> None:
    policy, conditioning = make_policy(generator, tiny_config), generator.encode(examples[:1])
    configs = one_step_rollouts(changed(tiny_config, rollout={"shared_noise": False}).rollout, 3)
    assert list(configs) == [0, 1, 2]
    befores, noises = [], []
    for step, config in configs.items():
        rng = torch.Generator().manual_seed(0)
        rollout = collect_rollout(policy, conditioning, config, rng, keep_means=True)
        assert rollout.step_index.tolist() == [[step]] * 3
        assert torch.equal(rollout.latents[0], rollout.latents[1])
        assert not torch.equal(rollout.images[0], rollout.images[1])
        assert rollout.means is not None
        noises.append((rollout.next_latents - rollout.means)[:, 0])
        befores.append(rollout.latents[0, 0])
    scale = noises[1].std() / noises[0].std()
    torch.testing.assert_close(noises[1], noises[0] * scale, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        euler = policy.euler(befores[0][None], 0, conditioning)[0]
    torch.testing.assert_close(befores[1], euler)


@pytest.mark.slow
def test_the_weights_of_a_run_are_what_its_steps_move(tiny_config: RunConfig) -> None:
    """Against the same pictures, scored and counted here one by one."""
    config = dataclasses.replace(tiny_config, advantage=MEASURED, seed=3)
    run = train(config)
    data, generator = build_world(config, torch.device("cpu"))
    policy, prompts = make_policy(generator, config), data.training(0, 3)
    rewards, conditioning = (
        RewardSet(config.rewards, torch.device("cpu")),
        generator.encode(prompts),
    )
    names = [reward.objective for reward in config.rewards]
    moved = []
    for step in range(3):
        rollout = dataclasses.replace(
            config.rollout, group_size=3, window=(step, step + 1), num_trained_steps=1
        )
        rng = torch.Generator().manual_seed(4 * 1_000_003 - 1)
        images = collect_rollout(policy, conditioning, rollout, rng).images
        row = []
        for name in ("identity", "prompt"):
            scores = [
                [rewards.score(images[i : i + 1], [prompt]).scores[0, names.index(name)].item()
                 for i in range(3 * group, 3 * group + 3)]
                for group, prompt in enumerate(prompts)
            ]  # fmt: skip
            row.append(statistics.mean(map(statistics.variance, scores)))
        moved.append(row)
    totals = [sum(column) for column in zip(*moved, strict=True)]
    shares = [[value / total for value, total in zip(r, totals, strict=True)] for r in moved]
    found = schedule_of(run)["weights"]
    for row, weights in zip(shares, found, strict=False):
        assert weights == pytest.approx([value / sum(row) for value in row], rel=1e-3)
    assert found[3] == [0.5, 0.5]  # the last step has no noise
    assert max(prompt for _, prompt in found) - min(prompt for _, prompt in found) > 0.01


_KEPT: list[list[float]] = []


def kept(sigmas: torch.Tensor) -> torch.Tensor:
    return torch.tensor(_KEPT)[: len(sigmas)]


@pytest.mark.slow
def test_measuring_changes_nothing_but_the_weights(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is given the weights that another has measured is that run, bit by bit."""
    measured = train(dataclasses.replace(tiny_config, advantage=MEASURED))
    monkeypatch.setattr(f"{__name__}._KEPT", schedule_of(measured)["weights"])
    own = AdvantageConfig(schedule=CustomSchedule(target=f"{__name__}:kept"))
    given = train(dataclasses.replace(tiny_config, name="given", advantage=own))
    assert content(given) == content(measured)
    assert len(metrics(given)) == 2


def test_steps_are_measured_once_and_those_of_the_window_alone(
    tiny_config: RunConfig, tmp_path: Path
) -> None:
    config = dataclasses.replace(tiny_config, advantage=MEASURED)
    loop = make_loop(changed(config, rollout={"window": (0, 2)}), tmp_path)
    loop.measure()
    known = loop.measured
    assert [any(row) for row in known.noise_shares] == [True, True, False, False]
    loop.measure()
    assert loop.measured is known
    # Integer scores may tie at a step: it moves nothing, and that is known.
    loop.measured = dataclasses.replace(known, noise_shares=((0.0, 0.0), *known.noise_shares[1:]))
    tied = loop.measured
    loop.measure()
    assert loop.measured is tied


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"rollout": {"window": (1, 3)}}, {"noise"}),
        ({"rollout": {"noise_level": 0.5}}, {"noise"}),
        ({"rollout": {"group_size": 4, "batch_size": 3}, "train": {"num_updates": 9}}, set()),
        ({"evaluation": {"seed": 1}}, {"validation"}),
        ({"rollout": {"shift": 2.0}}, {"noise", "validation"}),
        ({"rollout": {"num_steps": 5}}, {"noise", "validation"}),
        ({"rollout": {"num_steps": 5}, "evaluation": {"num_steps": 4}}, {"noise"}),
        ({"evaluation": {"num_examples": 1, "validate_every": 7, "batch_size": 1}}, set()),
    ],
)
def test_what_a_run_keeps_from_its_start_is_of_these_fields(
    tiny_config: RunConfig, change: dict[str, dict], names: set[str]
) -> None:
    config = dataclasses.replace(tiny_config, advantage=MEASURED)
    before, now = origins(config), origins(changed(config, **change))
    assert {name for name in before if before[name] != now[name]} == names


def test_by_other_rewards_everything_is_another(tiny_config: RunConfig) -> None:
    config = dataclasses.replace(tiny_config, advantage=MEASURED)
    other = dataclasses.replace(config, rewards=tuple(reversed(config.rewards)))
    before, now = origins(config), origins(other)
    assert all(before[name] != now[name] for name in before)


def test_what_is_no_longer_so_is_forgotten(
    tiny_config: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = dataclasses.replace(tiny_config, advantage=MEASURED)
    kept = {
        "measured": {"levels": [0.5, 2.0], "noise_shares": [[0.5, 0.5]]},
        "progress": {"update": 4, "rollouts": 2, "base": {"validation/clip": 0.3}, "best": 0.1},
        "hacking": {"clip": [1]},
        "base_scores": {"prompt": [0.0, 1.0]},
        "origins": origins(config),
    }
    checkpoint = Checkpoint(folder=tmp_path / "000004", record=kept)
    assert recalled(checkpoint, config).record == kept
    assert not caplog.text
    noisier = recalled(checkpoint, changed(config, rollout={"noise_level": 0.5})).record
    assert noisier == kept | {"measured": {"levels": [0.5, 2.0], "noise_shares": ()}}
    judged = recalled(checkpoint, changed(config, evaluation={"seed": 9})).record
    progress = {"update": 4, "rollouts": 2, "base": {}, "best": None}
    assert judged == kept | {"progress": progress, "hacking": {}, "base_scores": {}}
    assert "no longer known: the base's validation" in caplog.text
    rewarded = dataclasses.replace(config, rewards=tuple(reversed(config.rewards)))
    assert recalled(checkpoint, rewarded).record["measured"] == {"levels": (), "noise_shares": ()}
    assert checkpoint.record == kept


@pytest.mark.slow
def test_a_run_that_goes_on_with_other_steps_measures_them(tiny_config: RunConfig) -> None:
    config = changed(dataclasses.replace(tiny_config, advantage=MEASURED), train={"num_updates": 1})
    assert len(schedule_of(train(config))["weights"]) == 4
    other = changed(config, rollout={"num_steps": 3}, train={"num_updates": 2})
    run = train(other, resume=True, allow_changed=True)
    assert len(schedule_of(run)["weights"]) == 3
    assert len(metrics(run)) == 2


@pytest.mark.slow
def test_a_gate_at_the_bases_mean_refuses_other_rewards(tiny_config: RunConfig) -> None:
    gate = AdvantageConfig(shaping="gate", gamma=30.0)
    config = changed(dataclasses.replace(tiny_config, advantage=gate), train={"num_updates": 1})
    run = train(config)
    before = (run / "config.yaml").read_text()
    other = dataclasses.replace(
        changed(config, train={"num_updates": 2}), rewards=tuple(reversed(config.rewards))
    )
    with pytest.raises(ConfigError, match=r"mean scores of the base by these rewards.*gate_floor"):
        train(other, resume=True, allow_changed=True)
    assert (run / "config.yaml").read_text() == before  # the run can still go on as it was
    train(changed(other, advantage={"gate_floor": 0.5}), resume=True, allow_changed=True)


def test_a_reward_that_never_answers_ends_the_measuring(
    tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(scores: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
        return noise_variance(scores.index_fill(1, torch.tensor([1]), torch.nan), group_ids)

    monkeypatch.setattr(measure, "noise_variance", silent)
    with pytest.raises(RewardError, match=r"^rewards: dinov2 could not score what a step moves"):
        train(dataclasses.replace(tiny_config, advantage=MEASURED))


@pytest.mark.slow
def test_the_gates_floor_is_the_mean_of_the_first_rollout(tiny_config: RunConfig) -> None:
    gate = AdvantageConfig(shaping="gate", gamma=30.0)
    rows = metrics(train(dataclasses.replace(tiny_config, advantage=gate)))
    assert rows[0]["gate/floor"] == rows[1]["gate/floor"]
    assert rows[0]["gate/floor"] == pytest.approx(rows[0]["reward/dinov2/mean"], rel=1e-5)
    assert rows[1]["gate/floor"] != pytest.approx(rows[1]["reward/dinov2/mean"], rel=1e-5)
    assert 0 < rows[0]["gate/below"] < 1
    number = dataclasses.replace(gate, gate_floor=-1.0)
    rows = metrics(train(dataclasses.replace(tiny_config, name="open", advantage=number)))
    assert [row["gate/floor"] for row in rows] == [-1, -1]
    assert [row["gate/below"] for row in rows] == [0, 0]

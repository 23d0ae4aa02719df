import dataclasses

import pytest
import torch
from helpers import assert_near, changed
from torch import Tensor

from customized_grpo.config import RolloutConfig, RunConfig
from customized_grpo.devices import pick_device
from customized_grpo.errors import ConfigError
from customized_grpo.generators.base import Conditioning
from customized_grpo.generators.flux1 import Flux1Generator
from customized_grpo.training.policy import make_policy
from customized_grpo.training.rollout import choose_trained_steps, collect_rollout
from customized_grpo.training.sampling import sample_images
from customized_grpo.types import Example, Rollout


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def roll(
    generator: Flux1Generator, config: RunConfig, examples: list[Example], seed: int = 0
) -> Rollout:
    policy = make_policy(generator, config)
    return collect_rollout(policy, generator.encode(examples), config.rollout, seeded(seed))


@pytest.mark.parametrize("dynamics", ["dance", "flow", "cps"])
def test_on_policy_ratio_is_one_at_equal_batch_shape(
    generator: Flux1Generator, tiny_config: RunConfig, examples: list[Example], dynamics: str
) -> None:
    config = changed(tiny_config, rollout={"dynamics": dynamics, "noise_level": 0.5})
    rollout = roll(generator, config, examples[:2])
    policy = make_policy(generator, config)
    conditioning = generator.encode(examples[:2]).take(rollout.group_ids)
    with torch.no_grad():
        for k in range(config.rollout.num_trained_steps):
            mean, std = policy.transition(
                rollout.latents[:, k], rollout.step_index[:, k], conditioning
            )
            log_prob = policy.log_prob(rollout.next_latents[:, k], mean, std)
            ratio = torch.exp(log_prob - rollout.log_probs[:, k])
            assert (ratio - 1).abs().mean() < 1e-6


def test_shapes_and_ranges(
    generator: Flux1Generator, tiny_config: RunConfig, examples: list[Example]
) -> None:
    rollout = roll(generator, tiny_config, examples[:2])
    config = tiny_config.rollout
    batch, trained = 2 * config.group_size, config.num_trained_steps
    channels = generator.pipeline.transformer.config.in_channels
    assert rollout.latents.shape == rollout.next_latents.shape == (batch, trained, 16, channels)
    assert rollout.latents.dtype == rollout.log_probs.dtype == torch.float32
    assert rollout.log_probs.shape == rollout.step_index.shape == (batch, trained)
    assert rollout.images.shape == (batch, 3, 64, 64)
    assert rollout.images.min() >= 0
    assert rollout.images.max() <= 1
    assert rollout.group_ids.tolist() == [0, 0, 0, 1, 1, 1]
    assert rollout.means is None


def test_batch_size_changes_no_draw(
    generator: Flux1Generator, tiny_config: RunConfig, examples: list[Example]
) -> None:
    whole = roll(generator, tiny_config, examples[:2])
    parts = roll(generator, changed(tiny_config, rollout={"batch_size": 4}), examples[:2])
    assert torch.equal(whole.step_index, parts.step_index)
    assert_near(whole.images, parts.images, terms=2**16)  # over several noisy steps


def test_groups_share_their_first_noise_unless_told_otherwise(
    generator: Flux1Generator, tiny_config: RunConfig, examples: list[Example]
) -> None:
    config = changed(tiny_config, rollout={"num_trained_steps": 3})
    shared = roll(generator, config, examples[:2]).latents[:, 0].view(2, 3, -1)
    assert (shared == shared[:, :1]).all()
    assert not torch.equal(shared[0], shared[1])
    own = roll(generator, changed(config, rollout={"shared_noise": False}), examples[:2])
    first = own.latents[:, 0].view(2, 3, -1)
    assert not (first[:, 0] == first[:, 1]).all()


def test_consecutive_steps_are_one_trajectory(
    generator: Flux1Generator, tiny_config: RunConfig, examples: list[Example]
) -> None:
    config = changed(tiny_config, rollout={"num_trained_steps": 3})
    rollout = roll(generator, config, examples[:1])
    assert torch.equal(rollout.next_latents[:, :2], rollout.latents[:, 1:])
    spread = rollout.next_latents[:, 0].std(dim=0).mean()
    assert spread > 0.01


def test_means_are_kept_on_request(
    generator: Flux1Generator, tiny_config: RunConfig, examples: list[Example]
) -> None:
    policy = make_policy(generator, tiny_config)
    conditioning = generator.encode(examples[:1])
    rollout = collect_rollout(policy, conditioning, tiny_config.rollout, seeded(), keep_means=True)
    assert rollout.means is not None
    with torch.no_grad():
        mean, _ = policy.transition(
            rollout.latents[:, 0], rollout.step_index[:, 0], conditioning.take(rollout.group_ids)
        )
    assert_near(rollout.means[:, 0], mean)


def test_only_the_window_has_noise_and_is_trained(
    generator: Flux1Generator, tiny_config: RunConfig, examples: list[Example]
) -> None:
    windowed = {"num_steps": 6, "num_trained_steps": 2, "window": (1, 3), "group_size": 3}
    config = changed(tiny_config, rollout=windowed)
    policy, conditioning = make_policy(generator, config), generator.encode(examples[:2])
    rollout = collect_rollout(policy, conditioning, config.rollout, seeded())
    assert rollout.step_index.unique().tolist() == [1, 2]
    # Before the window all samples of a group are one deterministic trajectory.
    first = rollout.latents[:, 0]
    assert all(torch.equal(first[i], first[0]) for i in (1, 2))
    start = generator.noise(2, _after_steps(2, config))
    step = policy.euler(start, 0, conditioning)
    assert_near(first[::3], step)
    assert not torch.equal(rollout.latents[0, 1], rollout.latents[1, 1])


@pytest.mark.parametrize("shared", [True, False])
def test_steps_before_the_window_run_once_per_group_if_its_samples_start_equal(
    generator: Flux1Generator,
    tiny_config: RunConfig,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
    shared: bool,
) -> None:
    windowed = {"num_steps": 5, "num_trained_steps": 1, "window": (2, 3), "shared_noise": shared}
    config = changed(tiny_config, rollout=windowed)
    rows, plain = [], generator.velocity

    def counted(latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        rows.append(len(latents))
        return plain(latents, sigma, conditioning)

    monkeypatch.setattr(generator, "velocity", counted)
    rollout = roll(generator, config, examples[:2])
    assert rows == ([2, 2, 6, 6, 6] if shared else [6] * 5)
    # Each sample alone, step by step, is the oracle of where the window starts.
    conditioning = generator.encode(examples[:2]).take(rollout.group_ids)
    policy, random = make_policy(generator, config), _after_steps(2, config)
    start = generator.noise(2 if shared else 6, random)
    for row in range(6):
        one = torch.tensor([row])
        latents = start[rollout.group_ids[row] if shared else row][None]
        for step in (0, 1):
            latents = policy.euler(latents, step, conditioning.take(one))
        assert_near(rollout.latents[row, 0], latents[0])


def _after_steps(num_groups: int, config: RunConfig) -> torch.Generator:
    """The rollout's generator after it has drawn the trained steps."""
    generator = seeded()
    choose_trained_steps(num_groups, config.rollout, generator)
    return generator


def test_trained_steps_are_per_group_and_never_the_last() -> None:
    config = RolloutConfig(num_steps=25, num_trained_steps=15)
    steps = choose_trained_steps(200, config, seeded())
    assert steps.shape == (200, 15)
    assert (steps.diff(dim=1) > 0).all()
    assert steps.max() == 23
    assert steps.min() == 0
    assert len(steps.unique(dim=0)) > 190
    counts = steps.flatten().bincount(minlength=24).float()
    assert (counts / 200 - 15 / 24).abs().max() < 0.15


def test_deterministic_sampling_repeats_itself_in_any_batch_size(
    generator: Flux1Generator, tiny_config: RunConfig, examples: list[Example]
) -> None:
    policy, conditioning = make_policy(generator, tiny_config), generator.encode(examples)
    noise = generator.noise(4, seeded())
    whole = sample_images(policy, conditioning, noise, 4)
    assert torch.equal(whole, sample_images(policy, conditioning, noise, 4))
    parts = sample_images(policy, conditioning, noise, 3)
    assert_near(parts, whole)


def test_autocast_stays_close_to_float32(
    generator: Flux1Generator, tiny_config: RunConfig, examples: list[Example]
) -> None:
    conditioning, noise = generator.encode(examples), generator.noise(4, seeded())
    exact, fast = (
        make_policy(generator, dataclasses.replace(tiny_config, mixed_precision=mode))
        for mode in ("no", "bf16")
    )
    steps = torch.arange(4)
    with torch.no_grad():
        a, b = (policy.velocity(noise, steps, conditioning) for policy in (exact, fast))
    assert b.dtype == torch.float32
    assert not torch.equal(a, b)
    assert (a - b).norm() < 0.03 * a.norm()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu_is_named() -> None:
    assert pick_device("auto").type == "cpu"
    with pytest.raises(ConfigError, match="no GPU is visible"):
        pick_device("cuda")

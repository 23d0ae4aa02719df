import dataclasses
import itertools
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import assert_near, changed, perturb_lora

from customized_grpo.config import GrpoAlgorithm, LoraSettings, LossConfig, RunConfig
from customized_grpo.errors import ConfigError
from customized_grpo.generators.base import Conditioning
from customized_grpo.generators.flux1 import Flux1Generator
from customized_grpo.generators.flux_kontext import FluxKontextConfig
from customized_grpo.generators.lora import attach_lora, keep_start
from customized_grpo.ops import Dynamics, StepWeight, normalize_ratio, sde_moments
from customized_grpo.training import loss
from customized_grpo.training.advantages import assign_credit
from customized_grpo.training.loss import accumulate_gradient, policy_batch
from customized_grpo.training.policy import Policy, make_policy
from customized_grpo.training.rollout import collect_rollout
from customized_grpo.types import Advantages, Example, Rollout

UNPINNED = LossConfig(pin_ratio=False, clip_range=0.2)

NOISY = 2**16  # a log-probability divides the rounding of a mean by a variance

batch_of = partial(policy_batch, losses=GrpoAlgorithm().losses)


@dataclasses.dataclass(kw_only=True)
class Scene:
    """A rollout with its advantages, ready to be trained on."""

    policy: Policy
    rollout: Rollout
    advantages: Advantages
    conditioning: Conditioning

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for p in self.policy.generator.transformer.parameters() if p.requires_grad]

    def gradient(self, rollout: Rollout, config: LossConfig = UNPINNED, **options):
        """Loss statistics and flat gradient on a rollout."""
        weights = self.policy.step_weights(config.step_weight, range(5), config.ratio_norm)
        batch = batch_of(rollout, self.advantages, torch.arange(len(rollout.group_ids)), weights)
        for parameter in self.parameters:
            parameter.grad = None
        options = {"pinned": False, "micro_batch_size": None} | options
        stats = accumulate_gradient(self.policy, batch, self.conditioning, config, **options)
        return stats, torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])


@pytest.fixture
def scene(generator: Flux1Generator, tiny_config: RunConfig, examples: list[Example]) -> Scene:
    steps = {"num_steps": 6, "num_trained_steps": 4}
    # Log-probabilities of a density, which GRPO-Guard's ratio and the oracles here are about.
    config = changed(tiny_config, rollout={**steps, "dynamics": "flow", "noise_level": 0.7})
    torch.manual_seed(0)
    attach_lora(generator.transformer, LoraSettings(rank=4), generator.lora_targets)
    policy = make_policy(generator, config)
    prompts = generator.encode(examples[:2])
    seeded = torch.Generator().manual_seed(0)
    rollout = collect_rollout(policy, prompts, config.rollout, seeded, keep_means=True)
    scores = torch.randn(6, 2, generator=seeded)
    advantages = assign_credit(
        scores,
        rollout.group_ids,
        rollout.sigmas,
        config.advantage,
        config.rewards,
        ("identity", "prompt"),
    )
    perturb_lora(generator.transformer, 1e-3)  # a policy a little off the one that sampled
    return Scene(
        policy=policy,
        rollout=rollout,
        advantages=advantages,
        conditioning=prompts.take(rollout.group_ids),
    )


def test_the_kl_may_be_to_the_lora_that_the_run_started_from(scene: Scene, tmp_path: Path) -> None:
    """Against another model with that LoRA alone, sample by sample and step by step."""
    generator, rollout = scene.policy.generator, scene.rollout
    transformer = generator.transformer
    generator.save_weights(tmp_path)
    keep_start(transformer)
    to_start = dataclasses.replace(UNPINNED, kl_weight=1.0, kl_to="start")
    base, _ = scene.gradient(rollout, dataclasses.replace(to_start, kl_to="base"))
    stats, _ = scene.gradient(rollout, to_start)
    assert stats["norm_excess"] < 1e-3 * base["norm_excess"]
    assert stats["kl"] < 1e-6 * base["kl"]  # rounding: the trained one is merged, the kept is not
    with torch.no_grad():
        for parameter in scene.parameters:
            parameter.add_(2e-3 * torch.randn(parameter.shape))
    stats, gradient = scene.gradient(rollout, to_start)
    other = FluxKontextConfig(path="embedded:generator").build(torch.device("cpu"))
    other.load_weights(tmp_path)
    start = dataclasses.replace(scene.policy, generator=other)
    expected = []
    for row, column in itertools.product(*map(range, rollout.step_index.shape)):
        condition = scene.conditioning.take(torch.tensor([row]))
        step, latents = rollout.step_index[row, column][None], rollout.latents[row, column][None]
        with torch.no_grad():
            (mean, std), (reference, _) = (
                policy.transition(latents, step, condition) for policy in (scene.policy, start)
            )
        expected.append(((mean - reference).square() / (2 * std.square())).mean())
    assert_near(stats["kl"], torch.stack(expected).mean(), terms=NOISY)
    free, ungrounded = scene.gradient(rollout, UNPINNED)
    assert "kl" not in free
    assert (gradient - ungrounded).abs().max() > 0
    kept = [p for name, p in transformer.named_parameters() if ".start." in name]
    assert len(kept) == len(scene.parameters)
    assert not any(p.requires_grad or p.grad is not None for p in kept)


def shuffled(rollout: Rollout, order: torch.Tensor) -> Rollout:
    """The same transitions with the trained steps in another order."""
    columns = {
        name: getattr(rollout, name)[:, order]
        for name in ("latents", "next_latents", "log_probs", "step_index", "means")
    }
    return dataclasses.replace(rollout, **columns)


def test_shuffling_the_trained_steps_leaves_the_loss_unchanged(scene: Scene) -> None:
    order = torch.tensor([2, 0, 3, 1])
    stats, gradient = scene.gradient(scene.rollout)
    other_stats, other_gradient = scene.gradient(shuffled(scene.rollout, order))
    assert_near(other_stats["loss"], stats["loss"], scale=1)  # a sum around 0
    assert_near(other_gradient, gradient)


def test_weighting_by_shuffled_position_would_be_noticed(scene: Scene) -> None:
    """The reference code's mistake: advantage looked up by place in the list, not by step."""
    order = torch.tensor([2, 0, 3, 1])
    rollout = shuffled(scene.rollout, order)
    right = batch_of(rollout, scene.advantages, torch.arange(6), torch.ones(6)).advantage
    by_position = scene.advantages.per_step[:, : len(order)].flatten()
    assert not torch.allclose(right, by_position, atol=1e-3)
    unshuffled = batch_of(scene.rollout, scene.advantages, torch.arange(6), torch.ones(6)).advantage
    torch.testing.assert_close(right.view(6, 4), unshuffled.view(6, 4)[:, order])
    assert not torch.allclose(by_position.view(6, 4), unshuffled.view(6, 4)[:, order], atol=1e-3)


@pytest.mark.parametrize("micro_batch_size", [1, 5, 24])
def test_micro_batches_change_neither_loss_nor_gradient(
    scene: Scene, micro_batch_size: int
) -> None:
    config = dataclasses.replace(UNPINNED, kl_weight=0.1)
    stats, gradient = scene.gradient(scene.rollout, config)
    part_stats, part_gradient = scene.gradient(
        scene.rollout, config, micro_batch_size=micro_batch_size
    )
    for name, value in stats.items():
        assert_near(part_stats[name], value, NOISY, scale=1)
    assert_near(part_gradient, gradient, NOISY)


def test_invalid_samples_are_left_out_of_loss_and_denominator(scene: Scene) -> None:
    _, whole = scene.gradient(scene.rollout)
    valid = torch.tensor([True, True, False, True, True, True])
    scene.advantages = dataclasses.replace(scene.advantages, valid=valid)
    batch = batch_of(scene.rollout, scene.advantages, torch.arange(6), torch.ones(6))
    assert len(batch.advantage) == 5 * 4
    assert 2 not in batch.sample_index
    _, without = scene.gradient(scene.rollout)
    assert not torch.allclose(whole, without)


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_numbers_of_a_sharded_model_are_of_valid_samples(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, micro_batch_size: int | None
) -> None:
    """It computes the pairs of the others, too, as its passes are meetings of all processes."""
    config = dataclasses.replace(UNPINNED, kl_weight=0.1, norm_weight=0.1)
    valid = torch.tensor([True, True, False, True, True, True])
    scene.advantages = dataclasses.replace(
        scene.advantages, valid=valid, per_step=scene.advantages.per_step * valid[:, None]
    )
    expected, gradient = scene.gradient(scene.rollout, config)
    weights = scene.policy.step_weights(config.step_weight, range(5), config.ratio_norm)
    batch = batch_of(scene.rollout, scene.advantages, torch.arange(6), weights, keep_invalid=True)
    assert len(batch.advantage) == 6 * 4
    monkeypatch.setattr(loss, "is_sharded", lambda transformer: True)
    stats = accumulate_gradient(
        scene.policy, batch, scene.conditioning, config, pinned=False,
        micro_batch_size=micro_batch_size,
    )  # fmt: skip
    assert set(stats) == set(expected)
    for name, value in expected.items():
        assert_near(stats[name], value, NOISY, scale=1)
    found = torch.cat([p.grad.flatten() for p in scene.parameters if p.grad is not None])
    assert_near(found, gradient, NOISY)


def test_pinned_ratio_is_one_and_its_gradient_is_the_policy_gradient(scene: Scene) -> None:
    stats, pinned = scene.gradient(scene.rollout, LossConfig(), pinned=True)
    assert stats["ratio_abs_dev"] == 0
    assert stats["clip_fraction"] == 0
    assert stats["mismatch"] > 1e-7
    batch = batch_of(scene.rollout, scene.advantages, torch.arange(6), torch.ones(6))
    for parameter in scene.parameters:
        parameter.grad = None
    mean, std = scene.policy.transition(
        batch.latents, batch.step_index, scene.conditioning.take(batch.sample_index)
    )
    log_prob = scene.policy.log_prob(batch.next_latents, mean, std)
    (-(batch.advantage * log_prob).mean()).backward()
    plain = torch.cat([p.grad.flatten() for p in scene.parameters if p.grad is not None])
    assert_near(pinned, plain, NOISY)


def test_kl_is_zero_at_the_base_and_its_gradient_flows(scene: Scene) -> None:
    config = dataclasses.replace(UNPINNED, kl_weight=1.0)
    scene.advantages = dataclasses.replace(
        scene.advantages, per_step=torch.zeros_like(scene.advantages.per_step)
    )
    stats, gradient = scene.gradient(scene.rollout, config)
    assert stats["kl"] > 0
    assert gradient.norm() > 0
    with torch.no_grad():
        for name, parameter in scene.policy.generator.transformer.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    stats, gradient = scene.gradient(scene.rollout, config)
    assert stats["kl"] == 0


def test_without_a_step_weight_each_advantage_is_what_it_was(scene: Scene) -> None:
    assert torch.equal(scene.policy.step_weights("none", range(5), False), torch.ones(6))


def test_the_kl_holds_for_the_samples_that_it_shall(scene: Scene) -> None:
    """Its gradient is that of those samples' pairs alone, computed pair by pair."""
    rollout, policy = scene.rollout, scene.policy
    # So far from the base that their difference is no rounding, which every CPU does differently.
    perturb_lora(policy.generator.transformer, 1e-2)
    _, plain = scene.gradient(rollout)
    config = dataclasses.replace(UNPINNED, kl_weight=2.0)
    for_all, of_all = scene.gradient(rollout, config)
    held = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    scene.advantages = dataclasses.replace(scene.advantages, kl_gate=held)
    stats, gradient = scene.gradient(rollout, config)
    assert stats["kl"] == for_all["kl"]  # a number of all pairs either way
    for parameter in scene.parameters:
        parameter.grad = None
    for row, column in itertools.product(held.nonzero()[:, 0].tolist(), range(4)):
        condition = scene.conditioning.take(torch.tensor([row]))
        step, latents = rollout.step_index[row, column][None], rollout.latents[row, column][None]
        mean, std = policy.transition(latents, step, condition)
        with torch.no_grad(), policy.generator.base_policy():
            base, _ = policy.transition(latents, step, condition)
        kl = ((mean - base).square() / (2 * std.square())).mean()
        torch.autograd.backward(2.0 * kl / rollout.step_index.numel())
    alone = torch.cat([p.grad.flatten() for p in scene.parameters if p.grad is not None])
    assert alone.norm() > 0
    assert_near(gradient, plain + alone, NOISY)
    scene.advantages = dataclasses.replace(scene.advantages, kl_gate=torch.ones(6))
    assert torch.equal(scene.gradient(rollout, config)[1], of_all)


@pytest.mark.parametrize(
    ("dynamics", "ratio_norm"), [("flow", False), ("flow", True), ("dance", False), ("cps", False)]
)
@pytest.mark.parametrize("balance", ["noise", "equal"])
def test_balanced_steps_have_the_gradient_that_was_asked_for(
    scene: Scene, dynamics: Dynamics, ratio_norm: bool, balance: StepWeight
) -> None:
    """By automatic differentiation of what the loss takes, step by step, instead of formulas."""
    policy = dataclasses.replace(scene.policy, dynamics=dynamics)
    weights = policy.step_weights(balance, range(5), ratio_norm)
    gradients, slopes = [], []
    for step in range(5):
        sigma, sigma_next = policy.sigmas[step], policy.sigmas[step + 1]
        velocity = torch.zeros(1, 64, requires_grad=True)
        mean, std = sde_moments(
            velocity,
            torch.ones(1, 64),
            sigma,
            sigma_next,
            dynamics=dynamics,
            noise_level=policy.noise_level,
            sigma_max=policy.sigmas[1],
        )
        noise = torch.linspace(-1, 1, 64)[None]
        old_mean = mean.detach()
        log_prob = policy.log_prob(old_mean + std * noise, mean, std)
        if ratio_norm:
            log_prob = normalize_ratio(log_prob, log_prob.detach(), mean, old_mean, std)
        (gradient,) = torch.autograd.grad(log_prob.sum(), velocity, retain_graph=True)
        (slope,) = torch.autograd.grad(mean.sum(), velocity)
        gradients.append(gradient.norm() * weights[step])
        slopes.append(slope.norm())
    wanted = torch.stack(slopes) if balance == "noise" else torch.ones(5)
    shares = torch.stack(gradients)
    torch.testing.assert_close(shares / shares.sum(), wanted / wanted.sum(), rtol=1e-5, atol=0)
    assert weights[:5].mean().item() == pytest.approx(1)


def test_a_pinned_ratio_norm_is_the_balance_by_noise(scene: Scene) -> None:
    _, normed = scene.gradient(scene.rollout, LossConfig(ratio_norm=True), pinned=True)
    _, noise = scene.gradient(scene.rollout, LossConfig(step_weight="noise"), pinned=True)
    _, plain = scene.gradient(scene.rollout, LossConfig(), pinned=True)
    assert_near(normed / normed.norm(), noise / noise.norm(), NOISY)
    assert torch.cosine_similarity(normed, plain, dim=0) < 0.999


def test_ratio_norm_centres_the_ratio(scene: Scene) -> None:
    guarded = dataclasses.replace(UNPINNED, ratio_norm=True)
    plain, _ = scene.gradient(scene.rollout)
    normed, gradient = scene.gradient(scene.rollout, guarded)
    assert normed["ratio_abs_dev"] < plain["ratio_abs_dev"]
    assert gradient.norm() > 0
    pinned, _ = scene.gradient(scene.rollout, guarded, pinned=True)
    assert pinned["ratio_abs_dev"] == 0


def test_the_kl_mask_takes_the_place_of_the_clip(scene: Scene) -> None:
    """Against a plain loop over pairs, with torch's own KL of two normal distributions."""
    batch = batch_of(scene.rollout, scene.advantages, torch.arange(6), torch.ones(6))
    assert batch.old_mean is not None
    losses, moved, further = [], [], []
    for pair in range(len(batch.advantage)):
        row = torch.tensor([pair])
        mean, std = scene.policy.transition(
            batch.latents[row],
            batch.step_index[row],
            scene.conditioning.take(batch.sample_index[row]),
        )
        now = torch.distributions.Normal(mean.double(), std.double().expand_as(mean))
        before = torch.distributions.Normal(batch.old_mean[row].double(), now.scale)
        new = now.log_prob(batch.next_latents[row].double()).mean()
        change = new - before.log_prob(batch.next_latents[row].double()).mean()
        moved.append(torch.distributions.kl_divergence(now, before).mean().item())
        further.append(bool(change * batch.advantage[pair] > 0))
        losses.append(-batch.advantage[pair] * change.exp())
    threshold = 1.001 * sorted(moved)[len(moved) // 2]
    config = dataclasses.replace(UNPINNED, kl_mask=threshold)
    kept = [not (d >= threshold and f) for d, f in zip(moved, further, strict=True)]
    assert 0.5 < sum(kept) / len(kept) < 1
    for parameter in scene.parameters:
        parameter.grad = None
    expected = sum(loss for loss, k in zip(losses, kept, strict=True) if k) / len(losses)
    expected.backward()
    plain = torch.cat([p.grad.flatten() for p in scene.parameters if p.grad is not None])
    stats, gradient = scene.gradient(scene.rollout, config, micro_batch_size=5)
    assert_near(gradient, plain, NOISY)
    assert stats["clip_fraction"] == pytest.approx(1 - sum(kept) / len(kept))
    assert stats["rollout_kl"] == pytest.approx(sum(moved) / len(moved), rel=1e-3)
    _, clipped = scene.gradient(scene.rollout)
    assert torch.cosine_similarity(gradient, clipped, dim=0) < 0.999


def test_a_pinned_update_is_within_every_trust_region(scene: Scene) -> None:
    stats, masked = scene.gradient(scene.rollout, LossConfig(kl_mask=1e-12), pinned=True)
    _, clipped = scene.gradient(scene.rollout, LossConfig(), pinned=True)
    assert torch.equal(masked, clipped)
    assert stats["rollout_kl"] == stats["clip_fraction"] == 0


@pytest.mark.parametrize("advantage", [0.0, 1.0])
def test_the_norm_penalty_adds_its_gradient(scene: Scene, advantage: float) -> None:
    """To the loss's own; computed here pair by pair, with the adapters off for the reference."""
    scene.advantages = dataclasses.replace(
        scene.advantages, per_step=advantage * scene.advantages.per_step
    )
    config = dataclasses.replace(UNPINNED, norm_weight=3.0)
    stats, gradient = scene.gradient(scene.rollout, config, micro_batch_size=5)
    _, plain = scene.gradient(scene.rollout)
    batch = batch_of(scene.rollout, scene.advantages, torch.arange(6), torch.ones(6))
    for parameter in scene.parameters:
        parameter.grad = None
    excess = []
    for pair in range(len(batch.advantage)):
        row = torch.tensor([pair])
        given = (batch.latents[row], batch.step_index[row])
        condition = scene.conditioning.take(batch.sample_index[row])
        with torch.no_grad(), scene.policy.generator.base_policy():
            allowed = scene.policy.velocity(*given, condition).square().sum().sqrt()
        length = scene.policy.velocity(*given, condition).square().sum().sqrt()
        excess.append((length - allowed).clamp(min=0) / allowed)
    assert 0 < sum(bool(x > 0) for x in excess) < len(excess)
    (3 * torch.stack(excess).mean()).backward()
    penalty = torch.cat([p.grad.flatten() for p in scene.parameters if p.grad is not None])
    assert stats["norm_excess"] == pytest.approx(torch.stack(excess).mean().item(), rel=1e-3)
    assert penalty.norm() > 0
    assert_near(gradient, penalty + plain, NOISY)


def test_a_surrogate_of_ones_own_is_what_is_trained(scene: Scene) -> None:
    """REINFORCE, whose gradient is PPO's where the ratio is pinned."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Reinforce(GrpoAlgorithm):
        type: str = "reinforce"

        def losses(self, terms, /):
            return -terms.advantage * terms.log_prob, {"surprise": -terms.log_prob.detach().mean()}

    batch = batch_of(
        scene.rollout,
        scene.advantages,
        torch.arange(6),
        torch.ones(6),
        losses=Reinforce().losses,
    )
    for parameter in scene.parameters:
        parameter.grad = None
    numbers = accumulate_gradient(
        scene.policy, batch, scene.conditioning, LossConfig(), pinned=True, micro_batch_size=5
    )
    own = torch.cat([p.grad.flatten() for p in scene.parameters if p.grad is not None])
    _, ppo = scene.gradient(scene.rollout, LossConfig(), pinned=True)
    assert_near(own, ppo, NOISY)
    assert "ratio_mean" not in numbers
    surprise = -scene.rollout.log_probs.mean().item()
    assert numbers["surprise"] == pytest.approx(surprise, rel=1e-2)


@pytest.mark.parametrize(
    ("found", "got"),
    [
        (torch.ones(2), "got Tensor"),
        ((torch.ones(2, 1), {}), r"losses of the shape \[2, 1\]"),
        ((torch.ones(3), {}), r"losses of the shape \[3\]"),
        ((torch.ones(2), None), r"losses of the shape \[2\]"),
    ],
)
def test_losses_that_are_none_are_named(found: object, got: str) -> None:
    with pytest.raises(ConfigError, match=rf"losses must return losses \[2\] of the pairs.*{got}"):
        loss.checked_losses(found, 2)


def test_a_weight_of_0_leaves_the_loss_and_its_kl_alone(scene: Scene) -> None:
    """The length of velocities is logged where the base is asked anyway, and moves nothing."""
    config = dataclasses.replace(UNPINNED, kl_weight=0.1)
    stats, gradient = scene.gradient(scene.rollout, config)
    assert stats["norm_excess"] > 0
    _, other = scene.gradient(scene.rollout, dataclasses.replace(config, norm_weight=1e-30))
    assert_near(other, gradient)
    plain, _ = scene.gradient(scene.rollout)
    assert "norm_excess" not in plain
    assert "kl" not in plain

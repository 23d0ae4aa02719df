"""The objectives' gradients and what follows from them, against plain autograd."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from chaos import content, small_run
from helpers import assert_near, changed, metrics
from loops import make_loop
from torch import Tensor

from customized_grpo import registry
from customized_grpo.config import (
    BalanceSettings,
    ConstantSchedule,
    ForwardAlgorithm,
    MeasuredSchedule,
    RunConfig,
    TdwSchedule,
    check_config,
)
from customized_grpo.errors import ConfigError
from customized_grpo.ops import balanced_factors, measured_weights
from customized_grpo.runs.ranks import ALONE
from customized_grpo.training import balance
from customized_grpo.training.advantages import assign_credit, objective_weights
from customized_grpo.training.balance import rebalance
from customized_grpo.training.loop import Experience, Loop, inner_rows
from customized_grpo.training.train import train

NOISY = 2**18  # a log-probability divides the rounding of a mean by a variance
NAMES: tuple[str, ...] = ("identity", "prompt")


@pytest.fixture
def config(tiny_config: RunConfig) -> RunConfig:
    """Naive weights, so that the advantage is the sum of its parts; each rollout is measured."""
    return changed(
        tiny_config,
        lora={"rank": 4},
        rollout={"group_size": 4},
        advantage={
            "shaping": "linear",
            "center": False,
            "schedule": ConstantSchedule(prompt=0.3),
            "balance": BalanceSettings(every=1, decay=0.25),
        },
        loss={"step_weight": "equal"},
        train={"micro_batch_size": 3, "ema_decay": None},
    )


def plain_gradient(loop: Loop, experience: Experience, per_step: Tensor) -> Tensor:
    """Of the mean of -A log p over all pairs, one pair at a time."""
    rollout, loss = experience.rollout, loop.config.loss
    weights = loop.policy.step_weights(loss.step_weight, loop.algorithm.steps, loss.ratio_norm)
    for parameter in loop.parameters:
        parameter.grad = None
    for row in range(len(rollout.images)):
        for k, step in enumerate(rollout.step_index[row]):
            mean, std = loop.policy.transition(
                rollout.latents[row, k][None],
                step[None],
                experience.conditioning.take(torch.tensor([row])),
            )
            log_prob = loop.policy.log_prob(rollout.next_latents[row, k][None], mean, std)
            advantage = per_step[row, step] * weights[step]
            (-advantage * log_prob.sum() / rollout.step_index.numel()).backward()
    return torch.cat([p.grad.flatten() for p in loop.parameters if p.grad is not None])


def test_factors_are_those_of_the_objectives_own_gradients(
    config: RunConfig, tmp_path: Path
) -> None:
    config = changed(
        config,
        advantage={"schedule": TdwSchedule(high=1.0, low=0.0)},
        loss={"step_weight": "none"},  # then late steps, the identity's, have more of the gradient
    )
    loop = make_loop(config, tmp_path)
    experience = loop.collect(0)
    names = loop.rewards.objectives
    weights = objective_weights(loop.policy.sigmas[:-1], config.advantage, names)
    even = weights / weights[:3].mean(0) / 2  # of the trained steps; the schedule's shape alone
    parts = experience.advantages.per_objective
    gradients = torch.stack(
        [plain_gradient(loop, experience, parts[:, n, None] * even[:, n]) for n in range(2)]
    )
    gram = gradients.double() @ gradients.double().T
    norms = gram.diagonal().sqrt()
    wanted = 0.25 + 0.75 * balanced_factors(gram, "marble")
    numbers = experience.metrics
    for n, name in enumerate(names):
        assert numbers[f"balance/norm/{name}"] == pytest.approx(norms[n].item(), rel=1e-3)
        assert experience.factors[name] == pytest.approx(wanted[n].item(), rel=1e-3)
        assert numbers[f"balance/factor/{name}"] == experience.factors[name]
    cosine = (gram[0, 1] / norms.prod()).item()
    assert numbers[f"balance/cosine/{names[0]}/{names[1]}"] == pytest.approx(cosine, abs=1e-3)
    assert abs(wanted[0] - 1) > 0.05, "a scene in which nothing has to be balanced shows nothing"


def test_a_factor_on_the_weight_is_one_on_the_gradient(config: RunConfig, tmp_path: Path) -> None:
    """The loss of the first update is affine in the advantage."""
    loop = make_loop(config, tmp_path)
    experience = loop.collect(0)
    names = loop.rewards.objectives
    weights = objective_weights(loop.policy.sigmas[:-1], config.advantage, names)
    parts = experience.advantages.per_objective
    gradients = [
        experience.factors[name]
        * plain_gradient(loop, experience, parts[:, n, None] * weights[:, n])
        for n, name in enumerate(names)
    ]
    expected = torch.stack(gradients).sum(0)
    loop.optimizer = torch.optim.SGD(loop.parameters, 0.0)
    taken: list[Tensor] = []
    loop.optimizer.register_step_pre_hook(
        lambda *_: taken.extend(p.grad.flatten() for p in loop.parameters if p.grad is not None)
    )
    (batch_rows,) = inner_rows(loop.config)
    loop.update(loop._batch_of(experience, batch_rows), experience.conditioning, is_first=True)
    assert all(p.grad is None for p in loop.parameters)  # pictures need the memory
    found = torch.cat(taken)
    norm = expected.norm().clamp(min=config.train.max_grad_norm)
    assert_near(found, expected * config.train.max_grad_norm / norm, NOISY)


@pytest.mark.slow
def test_measuring_changes_nothing_but_the_factors(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With factors of 1, bit by bit."""
    monkeypatch.setattr(balance, "balanced_factors", lambda gram, _: torch.ones(len(gram)).double())
    found = []
    for name, settings in (("without", None), ("with", BalanceSettings(every=1))):
        balanced = changed(config, advantage={"balance": settings})
        run = train(dataclasses.replace(balanced, name=name))
        kept: dict[str, Any] = content(run)
        measured = [n for n in kept["metrics.jsonl"][0] if n.startswith("balance/")]
        assert bool(measured) == (settings is not None)
        for row in kept["metrics.jsonl"]:
            for number in measured:
                del row[number]
        found.append(kept)
    assert found[0] == found[1]


@pytest.mark.slow
def test_a_rollout_in_between_keeps_the_factors(config: RunConfig) -> None:
    settings = BalanceSettings(method="mgda", every=2)
    run = train(changed(config, advantage={"balance": settings}, train={"num_updates": 3}))
    rows = metrics(run)
    assert ["balance/factor/prompt" in row for row in rows] == [True, False, True]
    assert rows[0]["balance/factor/prompt"] != rows[2]["balance/factor/prompt"]
    assert sum(rows[2][f"balance/factor/{name}"] for name in NAMES) == pytest.approx(2)


def test_the_weights_that_a_run_has_measured_are_those_that_are_balanced(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = MeasuredSchedule(num_prompts=2, num_samples=2)
    loop = make_loop(changed(config, advantage={"schedule": schedule}), tmp_path)
    loop.measure()
    given: list[Tensor] = []

    def spy(factors, gradient, per_objective, weights, *rest, **options):
        given.append(weights)
        return rebalance(factors, gradient, per_objective, weights, *rest, **options)

    monkeypatch.setattr("customized_grpo.training.loop.rebalance", spy)
    loop.collect(0)
    shares = torch.tensor(loop.measured.noise_shares)
    order = ["identity", "prompt"].index
    weights = measured_weights(shares)[:, [order(name) for name in loop.rewards.objectives]]
    assert torch.equal(given[0], weights)
    assert len(weights.unique()) > 2, "weights that are all alike show nothing"


@pytest.mark.parametrize("method", ["marble", "mgda"])
@pytest.mark.parametrize("prompt", [0.1, 0.5, 0.9])
def test_marble_leaves_to_the_schedule_how_much_of_each_is_wanted(
    prompt: float, method: Any
) -> None:
    """Its factors make up for the lengths of the gradients; MGDA makes a step of its own."""
    gradients, weights = torch.tensor([[8.0, 0.0], [-1.0, 2.0]]), torch.tensor([1 - prompt, prompt])
    turn = iter(gradients)
    factors, _ = rebalance(
        dict.fromkeys(NAMES, 1.0),
        lambda part: [next(turn) * part.sum()],
        torch.ones(2, 2),
        weights[None],
        range(1),
        BalanceSettings(method=method, decay=0.0),
        ALONE,
    )
    found = torch.tensor([factors[name] for name in NAMES])
    if method == "marble":
        assert found[1] / found[0] == pytest.approx(8 / 5**0.5)
        return
    weighted = weights[:, None] * gradients
    products = weighted @ (found @ weighted)  # of what is stepped with every objective's own
    assert products.min() > 0, "improves both, whatever their weights"
    assert found[0] == pytest.approx(0, abs=1e-6) or torch.allclose(*products, rtol=1e-4)


def test_what_moves_without_any_advantage_is_no_objectives() -> None:
    slopes = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))

    def gradient(part: Tensor, rest: float) -> list[Tensor | None]:
        return [torch.einsum("bt,btd->d", part, slopes) + rest, None]

    per_objective = torch.tensor([[1.0, -0.5], [-0.3, 2.0]])
    found = [
        rebalance(
            dict.fromkeys(NAMES, 1.0),
            partial(gradient, rest=rest),
            per_objective,
            torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.7, 0.3]]),
            range(2),
            BalanceSettings(),
            ALONE,
            has_rest=has_rest,
        )[0]
        for rest, has_rest in ((0.0, False), (3.0, True), (3.0, False))
    ]
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] != pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "nft" else [])
        for name in registry.plug_types(registry.ALGORITHMS)
    ],
)
def test_losses_that_say_so_are_affine_in_the_advantage(
    name: str, config: RunConfig, tmp_path: Path
) -> None:
    """Beside an older policy that samples, where there is one."""
    algorithm = registry.load_plug(registry.ALGORITHMS, name)()
    if isinstance(algorithm, ForwardAlgorithm):
        config = changed(config, loss={"step_weight": "none"}, rollout={"num_trained_steps": 4})
    if not algorithm.is_affine:
        with pytest.raises(ConfigError, match=r"advantage.balance must be null for .* not affine"):
            check_config(dataclasses.replace(config, algorithm=algorithm))
        return
    loop = make_loop(dataclasses.replace(config, algorithm=algorithm), tmp_path)
    if loop.algorithm.old is not None:
        for tensor in loop.algorithm.old.average:
            tensor.mul_(0.5)
    experience = loop.collect(0)
    assert set(experience.factors.values()) != {1.0}
    rows, loss = torch.arange(len(experience.rollout.images)), loop.config.loss.policy_only()

    def gradient(per_step: Tensor) -> Tensor:
        part = dataclasses.replace(experience.advantages, per_step=per_step)
        batch = loop.algorithm.batch(
            loop.policy, experience.rollout, part, experience.conditioning, rows
        )
        loop._gradient(batch, experience.conditioning, loss, pinned=True)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in loop.parameters]
        return torch.cat([grad.flatten() for grad in grads])

    one, other = torch.randn(2, len(rows), 4, generator=torch.Generator().manual_seed(1)).unbind()
    rest = gradient(torch.zeros_like(one))
    found = [gradient(part) - rest for part in (one, other, one + other)]
    added = (found[2] + rest).abs().max().item()  # the older policy's part, of which both are rid
    assert_near(found[0] + found[1], found[2], scale=added)
    assert found[2].abs().max() > 0
    names, steps = loop.rewards.objectives, loop.algorithm.steps
    weights = objective_weights(loop.policy.sigmas[:-1], config.advantage, names)
    even = weights / weights[steps.start : steps.stop].mean(0) / 2
    parts = experience.advantages.per_objective[:, None, :] * even
    own = torch.stack([gradient(part) - rest for part in parts.unbind(-1)]).double()
    wanted = 0.25 + 0.75 * balanced_factors(own @ own.T, "marble")
    factors = [experience.factors[name] for name in names]
    assert factors == pytest.approx(wanted.tolist(), rel=1e-5)


def test_factors_are_averaged_and_survive_a_broken_gradient(
    caplog: pytest.LogCaptureFixture,
) -> None:
    gradients = iter([[torch.tensor([3.0]), None], [torch.tensor([1.0]), torch.tensor([0.0])]] * 2)
    arguments = (torch.ones(2, 2), torch.full((3, 2), 0.5), range(3))
    settings = BalanceSettings(method="marble", decay=0.5)
    before = {"identity": 1.0, "prompt": 1.0}
    found, numbers = rebalance(before, lambda _: next(gradients), *arguments, settings, ALONE)
    assert found == pytest.approx({"identity": 0.75, "prompt": 1.25})
    assert numbers["balance/cosine/identity/prompt"] == pytest.approx(1)
    broken = [torch.tensor([torch.inf])]
    kept, numbers = rebalance(found, lambda _: broken, *arguments, settings, ALONE)
    assert (kept, numbers) == (found, {})
    assert "a gradient is not finite; all factors stay" in caplog.text


def test_no_factors_leave_every_bit_of_the_advantage(config: RunConfig) -> None:
    scores = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    arguments = (scores, torch.arange(2).repeat_interleave(4), torch.linspace(1, 0, 5))
    given = (*arguments, config.advantage, config.rewards, NAMES)
    plain = assign_credit(*given)
    for factors in (None, {}, dict.fromkeys(NAMES, 1.0)):
        assert torch.equal(assign_credit(*given, factors=factors).per_step, plain.per_step)
    other = assign_credit(*given, factors={"identity": 2.0, "prompt": 0.0}).per_step
    expected = (2 * 0.7 * plain.per_objective[:, 0]).clamp(-5, 5)
    torch.testing.assert_close(other, expected[:, None].expand(-1, 4))


@pytest.mark.slow
def test_a_failed_update_is_not_measured_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is rescued is the state before the rollout that comes again."""
    flags = ("--advantage.balance", "{every: 1}", "--train.save_every", "4")
    straight = train(small_run(tmp_path / "straight", "run", 6, *flags))
    config = small_run(tmp_path, "run", 6, *flags)
    update, calls = Loop.update, iter(range(20))
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "update", lambda *a, **k: update(*a, **k) if next(calls) < 2 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(config)
    assert content(train(config, resume=True)) == content(straight)

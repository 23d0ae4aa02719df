"""From reward scores to the advantage of every sample at every denoising step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from customized_grpo.config import (
    AdvantageConfig,
    ConstantSchedule,
    CustomSchedule,
    MeasuredSchedule,
    RewardConfig,
)
from customized_grpo.errors import ConfigError
from customized_grpo.ops import (
    SCHEDULES,
    SHAPINGS,
    Shaping,
    group_normalize,
    measured_weights,
    shape_advantages,
    win_rates,
)
from customized_grpo.registry import import_object
from customized_grpo.types import Advantages


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What a run has measured of the model that it began with, and needs to its end; as JSON."""

    levels: tuple[float, ...] = ()
    """Mean raw score of every objective in the first rollout, as ``raw_scores`` orders them."""
    noise_shares: tuple[tuple[float, float], ...] = ()
    """Of what all steps together move, what each moves: T rows of (identity, prompt)."""

    @classmethod
    def of(cls, found: dict[str, list]) -> Measured:
        """Reads what a checkpoint of ``dataclasses.asdict`` of it holds."""
        rows = tuple((identity, prompt) for identity, prompt in found.get("noise_shares", ()))
        return cls(levels=tuple(found.get("levels", ())), noise_shares=rows)


NOTHING = Measured()


def objective_advantages(
    scores: Tensor,
    group_ids: Tensor,
    rewards: Sequence[RewardConfig],
    objectives: Sequence[str],
) -> Tensor:
    """Group-normalised advantage of every objective ``[B, N]`` from scores ``[B, R]``.

    Rewards of one objective are mixed by weight after normalisation, and the mix is normalised
    again. An image that at least one reward could not score is left out of its group altogether:
    its row is NaN.
    """
    unscorable = scores.isnan().any(dim=1, keepdim=True)
    normalized = group_normalize(scores.masked_fill(unscorable, torch.nan), group_ids)
    columns = []
    for objective in objectives:
        mixed = _mix(normalized, rewards, objective)
        is_mixed = sum(reward.objective == objective for reward in rewards) > 1
        columns.append(group_normalize(mixed, group_ids) if is_mixed else mixed)
    return torch.cat(columns, 1)


def raw_scores(scores: Tensor, rewards: Sequence[RewardConfig]) -> Tensor:
    """Scores of the objectives ``[B, N]`` in the units of their rewards, from scores ``[B, R]``.

    Columns are identity, prompt, then further ones by first mention. Rewards of one objective are
    mixed by weight. An image that at least one reward could not score is NaN throughout.
    """
    names = dict.fromkeys(reward.objective for reward in rewards)
    ordered = sorted(names, key=lambda name: (name != "identity", name != "prompt"))
    scored = scores.masked_fill(scores.isnan().any(1, keepdim=True), torch.nan)
    return torch.cat([_mix(scored, rewards, objective) for objective in ordered], 1)


def mean_levels(scores: Tensor, rewards: Sequence[RewardConfig]) -> tuple[float, ...]:
    """Means of ``raw_scores`` over the images that could be scored."""
    return tuple(raw_scores(scores, rewards).nanmean(0).tolist())


def disagreement(
    scores: Tensor,
    rewards: Sequence[RewardConfig],
    evaluations: Tensor,
    evaluators: Sequence[RewardConfig],
    group_ids: Tensor,
) -> Tensor:
    """How much higher every sample stands in its group by the rewards of an objective, scores
    ``[B, R]``, than by its evaluators, ``[B, E]``: the difference of the win rates ``[B]``, the
    largest of the objectives that have both, in [-1, 1].

    A sample that a reward or an evaluator could not score is NaN, and nobody's rival.
    """
    judged = {evaluator.objective for evaluator in evaluators}
    objectives = dict.fromkeys(r.objective for r in rewards if r.objective in judged)
    unknown = scores.isnan().any(1) | evaluations.isnan().any(1)
    by_rewards, by_evaluators = (
        win_rates(table.masked_fill(unknown[:, None], torch.nan), group_ids)
        for table in (scores, evaluations)
    )
    gaps = [_mix(by_rewards, rewards, o) - _mix(by_evaluators, evaluators, o) for o in objectives]
    return torch.cat(gaps, 1).amax(1)


def suspects(disagreement: Tensor, share: float) -> Tensor | None:
    """1 for the ``share`` of the samples ``[B]`` that disagree most, if they do at all, else 0;
    more where several disagree equally. None if nothing is known of any sample.

    After GARDO (arXiv:2512.24138), which ranks by one reward and over the whole rollout, adapts the
    share, and moves the reference.
    """
    known = disagreement[~disagreement.isnan()]
    if not len(known):
        return None
    count = max(1, math.ceil(share * len(known) - 1e-6))  # .07 of 100 are 7
    least = known.sort(descending=True).values[count - 1]
    return ((disagreement >= least) & (disagreement > 0)).float()


def shares_of_noise(
    variances: Tensor, rewards: Sequence[RewardConfig]
) -> tuple[tuple[float, float], ...]:
    """What each step moves, ``Measured.noise_shares``, from the rewards' variances ``[T, R]``.

    That of an objective is the mean of its rewards', by weight, as each is normalised before they
    are mixed; what they move together is left out.
    """
    shares = variances / variances.sum(0).clamp(min=torch.finfo(variances.dtype).tiny)
    identity, prompt = (_mix(shares, rewards, name)[:, 0] for name in ("identity", "prompt"))
    return tuple(zip(identity.tolist(), prompt.tolist(), strict=True))


def _mix(values: Tensor, rewards: Sequence[RewardConfig], objective: str) -> Tensor:
    """The mean ``[B, 1]`` of an objective's rewards by weight, of columns of rewards ``[B, R]``."""
    members = [i for i, reward in enumerate(rewards) if reward.objective == objective]
    weights = torch.tensor([rewards[i].weight for i in members], device=values.device)
    return (values[:, members] * weights / weights.sum()).sum(1, keepdim=True)


def objective_weights(
    sigmas: Tensor,
    config: AdvantageConfig,
    objectives: Sequence[str],
    measured: Measured = NOTHING,
) -> Tensor:
    """Weight of every objective at every noise level ``[len(sigmas), N]``; rows sum to 1.

    Raises:
        ConfigError: if a function of one's own returns something else, or the weights are those
            that a run measures and it has not.
    """
    pair = _schedule(sigmas, config, measured)
    rest = 1 - sum(config.extra_weights.values())
    columns = {"identity": pair[:, 0] * rest, "prompt": pair[:, 1] * rest}
    columns |= {
        name: torch.full_like(pair[:, 0], weight) for name, weight in config.extra_weights.items()
    }
    return torch.stack([columns[name] for name in objectives], 1)


def _schedule(sigmas: Tensor, config: AdvantageConfig, measured: Measured) -> Tensor:
    """Weights of identity and prompt ``[len(sigmas), 2]``."""
    schedule = config.schedule
    if isinstance(schedule, MeasuredSchedule):
        if len(measured.noise_shares) != len(sigmas):
            raise ConfigError(
                "advantage.schedule.type must be another than measured where no run has measured "
                f"these {len(sigmas)} steps; write the weights of its schedule.json as a custom one"
            )
        return measured_weights(torch.tensor(measured.noise_shares, device=sigmas.device))
    if isinstance(schedule, CustomSchedule):
        target = schedule.target
        weights = import_object(target, "advantage.schedule.target")(sigmas)
        if not isinstance(weights, Tensor) or weights.shape != (len(sigmas), 2):
            raise ConfigError(
                f"advantage.schedule.target: {target} must return a tensor of shape "
                f"({len(sigmas)}, 2), got {getattr(weights, 'shape', weights)!r}"
            )
        return weights.to(sigmas)  # wherever, and in whatever type, it was made
    options = asdict(schedule)  # of the function's own names
    return SCHEDULES[options.pop("type")](sigmas, **options)


def one_sided(sigmas: Tensor, steps: range, config: AdvantageConfig) -> str | None:
    """What is wrong with a schedule that shall move the weight from one objective to the other,
    if the same one leads in all ``steps`` that may be trained, of the noise levels ``[T + 1]``."""
    is_meant = isinstance(config.schedule, ConstantSchedule | MeasuredSchedule)
    if is_meant or not _shaping(config).weighted_sum:
        return None
    prompt = _schedule(sigmas[:-1], config, NOTHING)[steps.start : steps.stop, 1]
    if prompt.min() <= 0.5 <= prompt.max():
        return None
    leader, other = ("prompt", "identity") if prompt.min() > 0.5 else ("identity", "prompt")
    return (
        f"advantage.schedule: {leader} has more weight than {other} in every step that is trained "
        f"(prompt: {prompt.min():.2f} to {prompt.max():.2f}, at noise levels "
        f"{sigmas[steps.start]:.2f} to {sigmas[steps.stop - 1]:.2f}); move the schedule into these "
        "steps, raise rollout.num_steps, or write a constant one if that is meant"
    )


def _shaping(config: AdvantageConfig) -> Shaping:
    found = config.find_shaping()
    return SHAPINGS[found] if isinstance(found, str) else found


def assign_credit(
    scores: Tensor,
    group_ids: Tensor,
    sigmas: Tensor,
    config: AdvantageConfig,
    rewards: Sequence[RewardConfig],
    objectives: Sequence[str],
    measured: Measured = NOTHING,
    factors: Mapping[str, float] | None = None,
) -> Advantages:
    """Scores ``[B, R]`` -> advantages of all T steps of the schedule ``sigmas`` ``[T + 1]``.

    Weights of objectives are multiplied by their ``factors``, if there are any.

    Raises:
        ConfigError: as ``objective_weights``; or the shaping compares with what the base scored,
            and that is not known.
    """
    per_objective = objective_advantages(scores, group_ids, rewards, objectives)
    weights = objective_weights(sigmas[:-1], config, objectives, measured)
    if factors:
        weights = weights * weights.new_tensor([factors[name] for name in objectives])
    reads_scores = _shaping(config).score is not None
    per_step = shape_advantages(
        config.find_shaping(),
        per_objective,
        weights,
        gamma=config.strength(),
        center=config.center,
        group_ids=group_ids,
        clip=config.clip,
        scores=raw_scores(scores, rewards) if reads_scores else None,
        levels=_levels(config, measured, scores) if reads_scores else None,
    )
    return Advantages(
        per_objective=per_objective, per_step=per_step, valid=~per_objective.isnan().any(1)
    )


def _levels(config: AdvantageConfig, measured: Measured, like: Tensor) -> Tensor:
    """What ``raw_scores`` are compared with ``[N]``."""
    check_levels(config, measured)
    if config.gate_floor is not None:
        return like.new_tensor([config.gate_floor, torch.nan])  # gate reads the identity's alone
    return like.new_tensor(measured.levels)


def check_levels(config: AdvantageConfig, measured: Measured) -> None:
    """Looks whether what a shaping of raw scores compares with is there.

    Raises:
        ConfigError: if it is the base's scores, and they are not known.
    """
    if _shaping(config).score is None or config.gate_floor is not None or measured.levels:
        return
    raise ConfigError(
        f"advantage.shaping {config.shaping} needs the mean scores of the base by these rewards, "
        "which a run takes from its first rollout and this one has not kept; start another run, "
        "or, for gate, set advantage.gate_floor (so far it is gate/floor in metrics.jsonl)"
    )


def gate_statistics(
    scores: Tensor,
    config: AdvantageConfig,
    rewards: Sequence[RewardConfig],
    measured: Measured,
) -> dict[str, float]:
    """Where the floor of the gate is, and the share of valid samples below it; {} without one."""
    if config.shaping != "gate":
        return {}
    floor = _levels(config, measured, scores)[0]
    identity = raw_scores(scores, rewards)[:, 0]
    below = (identity[~identity.isnan()] < floor).float().mean()
    return {"gate/floor": floor.item(), "gate/below": below.item()}


def share_statistics(advantages: Advantages, objectives: Sequence[str]) -> dict[str, float]:
    """Shares of valid samples by the signs of their identity and prompt advantages."""
    if not {"identity", "prompt"} <= set(objectives) or not advantages.valid.any():
        return {}
    rows = advantages.per_objective[advantages.valid]
    identity, prompt = (rows[:, objectives.index(name)] for name in ("identity", "prompt"))
    return {
        "share/conflicted": (identity * prompt < 0).float().mean().item(),
        "share/identity_only": ((identity > 0) & (prompt < 0)).float().mean().item(),
        "share/prompt_only": ((identity < 0) & (prompt > 0)).float().mean().item(),
        "share/both_positive": ((identity > 0) & (prompt > 0)).float().mean().item(),
        "share/both_negative": ((identity < 0) & (prompt < 0)).float().mean().item(),
    }

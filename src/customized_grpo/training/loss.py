"""The gradient of one update: micro-batches, the losses of the algorithms, KL, GRPO-Guard."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from customized_grpo.config import LossConfig
from customized_grpo.devices import is_out_of_memory
from customized_grpo.errors import ConfigError, ResourceError
from customized_grpo.generators.base import Conditioning, Generator, keeping
from customized_grpo.generators.cpu import lora_merged
from customized_grpo.generators.lora import start_policy
from customized_grpo.ops import gaussian_kl, norm_excess, normalize_ratio
from customized_grpo.runs.ranks import ALONE, Ranks
from customized_grpo.runs.sharding import is_sharded
from customized_grpo.training.forward import forward_process
from customized_grpo.training.policy import Policy
from customized_grpo.types import (
    Advantages,
    Batch,
    ForwardBatch,
    ForwardTerms,
    PairLosses,
    PolicyBatch,
    PolicyTerms,
    Rollout,
)

logger = logging.getLogger("customized_grpo")


def policy_batch(
    rollout: Rollout,
    advantages: Advantages,
    rows: Tensor,
    step_weights: Tensor,
    losses: Callable[[PolicyTerms], PairLosses],
    keep_invalid: bool = False,
) -> PolicyBatch:
    """Trained transitions of the samples ``rows`` (int64) of the rollout.

    Advantages are multiplied by the factor ``step_weights`` ``[T]`` of their step, that of
    ``loss.step_weight``; TDW's weights are in the advantages already.
    Invalid samples, whose advantage is 0, are left out, or kept with zeros for all they have.
    """
    is_valid = advantages.valid[rows]
    if not keep_invalid:
        rows, is_valid = rows[is_valid], is_valid[is_valid]
    step_index = rollout.step_index[rows]
    num_trained, gate = step_index.shape[1], advantages.kl_gate

    def pairs(values: Tensor) -> Tensor:
        kept = values[rows]
        if keep_invalid:  # weight 0 times NaN would be NaN
            kept = kept.where(is_valid.view(-1, *[1] * (kept.dim() - 1)), 0)
        return kept.flatten(0, 1)

    return PolicyBatch(
        losses=losses,
        latents=pairs(rollout.latents),
        next_latents=pairs(rollout.next_latents),
        step_index=step_index.flatten(),
        old_log_prob=pairs(rollout.log_probs),
        advantage=(advantages.per_step[rows] * step_weights).gather(1, step_index).flatten(),
        sample_index=rows.repeat_interleave(num_trained),
        weight=is_valid.float().repeat_interleave(num_trained),
        old_mean=None if rollout.means is None else pairs(rollout.means),
        kl_gate=None if gate is None else gate[rows].repeat_interleave(num_trained),
    )


def accumulate_gradient(
    policy: Policy,
    batch: Batch,
    conditioning: Conditioning,
    config: LossConfig,
    *,
    pinned: bool,
    micro_batch_size: int | None,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """The gradient of the mean loss over all M pairs, whatever the micro-batch size.

    It is collected where the parameters keep theirs: nothing of its size is held beside it. So the
    update is done again from its first pair, with half of the micro-batch, where one does not fit
    the memory.

    Args:
        policy: what is trained.
        batch: M (sample, step) pairs. Without a pull to the untrained or an old model those of
            advantage 0 have no gradient: they count in the mean and are not computed, unless the
            model is sharded. A pass through a sharded one is a meeting of all ranks, and the pairs
            they hold are equally many.
        conditioning: of the rollout's samples ``[B, ...]``; pairs pick their rows.
        config: of the loss.
        pinned: take the new log-probs, detached, as the old ones (ratio exactly 1); of no meaning
            for a ``ForwardBatch``.
        micro_batch_size: pairs per forward and backward; None = all.
        ranks: the processes that share the pairs; gradients and numbers are then of all pairs.

    Returns:
        Means over the computed pairs of valid samples: what the algorithm gives; ``mismatch``
        (mean |ratio - 1| against the rollout's own log-probs), or of a ``ForwardBatch``
        ``old_distance`` (mean square to the velocities of the policy that sampled); and, if used,
        ``kl`` and ``norm_excess`` (to the untrained one); ``loss``, the mean over all; and, if it
        did not fit, the ``micro_batch_size`` that did.
    """
    transformer = policy.generator.transformer
    sharded = is_sharded(transformer)
    pairs = torch.arange(len(batch.advantage), device=batch.advantage.device)
    pulled = config.needs_base or (
        isinstance(batch, ForwardBatch) and batch.old_velocity is not None
    )
    if not (sharded or pulled) and ranks.any(bool(batch.advantage.any())):
        pairs = batch.advantage.nonzero()[:, 0]
    weights = (batch.weight, batch.weight[pairs])
    num_pairs, num_computed = (ranks.sum(int(weight.sum())) for weight in weights)
    num_pairs = max(num_pairs, 1)  # no sample of this update may be valid
    if isinstance(batch, ForwardBatch):
        pairs_loss = partial(_forward_loss, policy, batch, conditioning, config, num_pairs)
    else:
        pairs_loss = partial(_pairs_loss, policy, batch, conditioning, config, pinned, num_pairs)
    size = micro_batch_size or len(pairs)
    # FSDP leaves the mean of the ranks' gradients in each part; the loss is a sum over them.
    scale = ranks.world_size if sharded else 1
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    with lora_merged(transformer):
        trained = [p for p in transformer.parameters() if p.requires_grad]
        collect = partial(_collect, policy.generator, pairs_loss, pairs, batch.weight)
        while (totals := collect(size, trained, scale, num_computed)) is None:
            size = _halved(min(size, len(pairs)), sharded)
    if not sharded:
        _sum_gradients(parameters, ranks)
    values = torch.stack(list(totals.values())).tolist() if totals else []  # waits for the device
    fitted = {} if size == (micro_batch_size or len(pairs)) else {"micro_batch_size": float(size)}
    return _sum_numbers(ranks.all_gather_object(dict(zip(totals, values, strict=True)))) | fitted


def _sum_gradients(parameters: list[nn.Parameter], ranks: Ranks) -> None:
    if ranks.world_size == 1:
        return
    here = [parameter.grad is not None for parameter in parameters]
    somewhere = [any(found) for found in zip(*ranks.all_gather_object(here), strict=True)]
    for parameter, used in zip(parameters, somewhere, strict=True):
        if used and parameter.grad is None:  # this rank had no pair that counts
            parameter.grad = torch.zeros_like(parameter)
    ranks.all_reduce([parameter.grad for parameter in parameters if parameter.grad is not None])


def _sum_numbers(parts: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part in parts) for name in names}


def _collect(
    generator: Generator,
    pairs_loss: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]],
    pairs: Tensor,
    weight: Tensor,
    size: int,
    parameters: list[nn.Parameter],
    scale: int,
    num_computed: int,
) -> dict[str, Tensor] | None:
    """The gradient of all pairs, ``size`` at a time, and its statistics; None if one of them does
    not fit the memory, and then no gradient."""
    totals: dict[str, Tensor] = defaultdict(lambda: pairs.new_zeros((), dtype=torch.float32))
    for parameter in parameters:
        parameter.grad = None
    try:
        with keeping(generator):
            for rows in pairs.split(size) if len(pairs) else ():
                loss, stats = pairs_loss(rows)
                (loss * scale).backward()
                totals["loss"] += loss.detach()
                share = weight[rows].sum() / num_computed
                for name, value in stats.items():  # a mean over no pair is NaN
                    totals[name] += torch.where(share > 0, value * share, 0)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    else:
        return totals
    for parameter in parameters:  # after the traceback and what it holds are gone
        parameter.grad = None
    return None


def _halved(size: int, sharded: bool) -> int:
    """Half of a micro-batch that did not fit.

    Raises:
        ResourceError: if there is no half, or the ranks would part ways.
    """
    if size == 1:
        raise ResourceError(
            "one (sample, step) pair alone does not fit the memory; set "
            "generator.gradient_checkpointing, generator.quantization or smaller pictures"
        )
    if sharded:
        raise ResourceError(
            f"a micro-batch of {size} pairs does not fit the memory, and with fsdp it is not "
            "halved; lower train.micro_batch_size"
        )
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # in pieces of the size that did not fit
    half = -(-size // 2)
    logger.warning(
        "a micro-batch of %d pairs does not fit the memory; going on with %d", size, half
    )
    return half


def _reference(generator: Generator, config: LossConfig) -> AbstractContextManager[None]:
    """A context in which the model is the untrained one."""
    if config.kl_to == "start":
        return start_policy(generator.transformer)
    return generator.base_policy()


def _predict(
    policy: Policy,
    batch: Batch,
    conditioning: Conditioning,
    config: LossConfig,
    rows: Tensor,
    latents: Tensor,
) -> tuple[Tensor, Tensor, slice | Tensor]:
    """Velocities of pairs ``rows`` by the model and by the untrained one (the model's where nothing
    needs those), of valid samples alone, and the places of their pairs among ``rows``: all, but
    where a sharded model, whose passes are meetings of all ranks, computes those of others, too."""
    step_index, condition = batch.step_index[rows], conditioning.take(batch.sample_index[rows])
    velocity = reference = policy.velocity(latents, step_index, condition)
    if config.needs_base:
        with torch.no_grad(), _reference(policy.generator, config):
            reference = policy.velocity(latents, step_index, condition)
    sharded = is_sharded(policy.generator.transformer)
    valid = batch.weight[rows].nonzero()[:, 0] if sharded else slice(None)
    return velocity[valid], reference[valid], valid


def _pairs_loss(
    policy: Policy,
    batch: PolicyBatch,
    conditioning: Conditioning,
    config: LossConfig,
    pinned: bool,
    num_pairs: int,
    rows: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    latents = batch.latents[rows]
    velocity, reference, valid = _predict(policy, batch, conditioning, config, rows, latents)
    rows, latents = rows[valid], latents[valid]
    step_index = batch.step_index[rows]
    mean, std = policy.moments(velocity, latents, step_index)
    log_prob = policy.log_prob(batch.next_latents[rows], mean, std)
    loss, stats = _surrogate(batch, config, pinned, num_pairs, rows, log_prob, mean, std)
    stats["mismatch"] = (torch.exp(log_prob.detach() - batch.old_log_prob[rows]) - 1).abs().mean()
    if not config.needs_base:
        return loss, stats
    reference_mean, _ = policy.moments(reference, latents, step_index)
    penalties = {
        "kl": (config.kl_weight, gaussian_kl(mean, reference_mean, std)),
        "norm_excess": (config.norm_weight, norm_excess(velocity, reference)),
    }
    return _penalised(loss, stats, penalties, batch, num_pairs, rows)


def _forward_loss(
    policy: Policy,
    batch: ForwardBatch,
    conditioning: Conditioning,
    config: LossConfig,
    num_pairs: int,
    rows: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    sigma = policy.sigmas[batch.step_index[rows]]
    latents, target = forward_process(batch, rows, sigma)
    velocity, reference, valid = _predict(policy, batch, conditioning, config, rows, latents)
    rows, sigma, target = rows[valid], sigma[valid], target[valid]
    old = velocity.detach() if batch.old_velocity is None else batch.old_velocity[rows]
    terms = ForwardTerms(
        velocity=velocity,
        old_velocity=old,
        target=target,
        sigma=sigma,
        advantage=batch.advantage[rows],
        clip=batch.clip,
    )
    losses, stats = checked_losses(batch.losses(terms), len(rows))
    old_distance = (velocity.detach() - old).square().flatten(1).mean(1)
    penalties = {"old_distance": (0.0, old_distance)}
    if config.needs_base:
        penalties |= {
            "kl": (config.kl_weight, (velocity - reference).square().flatten(1).mean(1)),
            "norm_excess": (config.norm_weight, norm_excess(velocity, reference)),
        }
    return _penalised(losses.sum() / num_pairs, stats, penalties, batch, num_pairs, rows)


def checked_losses(found: Any, count: int) -> PairLosses:
    """What an algorithm gives for ``count`` pairs, if it is what it should be.

    Raises:
        ConfigError: if it is not.
    """
    is_pair = isinstance(found, tuple) and len(found) == 2
    shape = tuple(found[0].shape) if is_pair and isinstance(found[0], Tensor) else None
    if shape in ((), (count,)) and isinstance(found[1], dict):
        return found
    kind = type(found).__name__ if shape is None else f"losses of the shape {list(shape)}"
    raise ConfigError(
        f"algorithm: losses must return losses [{count}] of the pairs, or their sum, and a dict of "
        f"numbers, got {kind}; correct it"
    )


def _penalised(
    loss: Tensor,
    stats: dict[str, Tensor],
    penalties: dict[str, tuple[float, Tensor]],
    batch: Batch,
    num_pairs: int,
    rows: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its statistics with penalties ``[m]``, each by its weight; the KL's only where
    it holds."""
    for name, (factor, penalty) in penalties.items():
        stats[name] = penalty.detach().mean()
        weight = batch.weight[rows]
        if name == "kl" and batch.kl_gate is not None:
            weight = weight * batch.kl_gate[rows]
        if factor:
            loss = loss + factor * (penalty * weight).sum() / num_pairs
    return loss, stats


@torch.no_grad()
def outputs(policy: Policy, batch: Batch, conditioning: Conditioning, rows: Tensor) -> Tensor:
    """A number ``[m]`` for each of the pairs ``rows`` that is not finite where the model's output
    is not: the log-probability, or the size of the velocity."""
    step_index, condition = batch.step_index[rows], conditioning.take(batch.sample_index[rows])
    if isinstance(batch, ForwardBatch):
        latents, _ = forward_process(batch, rows, policy.sigmas[step_index])
        return policy.velocity(latents, step_index, condition).abs().flatten(1).mean(1)
    mean, std = policy.transition(batch.latents[rows], step_index, condition)
    return policy.log_prob(batch.next_latents[rows], mean, std)


def _surrogate(
    batch: PolicyBatch,
    config: LossConfig,
    pinned: bool,
    num_pairs: int,
    rows: Tensor,
    log_prob: Tensor,
    mean: Tensor,
    std: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy loss of pairs ``rows``, within the trust region that the config names."""
    old_mean = mean.detach()
    old_log_prob = log_prob.detach() if pinned else batch.old_log_prob[rows]
    if config.needs_means and not pinned:
        assert batch.old_mean is not None, "the rollout was asked to keep its means"
        old_mean = batch.old_mean[rows]
    if config.ratio_norm:
        log_prob = normalize_ratio(log_prob, old_log_prob, mean, old_mean, std)
        old_log_prob = torch.zeros_like(log_prob)
    has_mask = config.kl_mask is not None
    terms = PolicyTerms(
        log_prob=log_prob,
        old_log_prob=old_log_prob,
        advantage=batch.advantage[rows],
        clip_range=config.clip_range,
        divergence=gaussian_kl(mean.detach(), old_mean, std) if has_mask else None,
        kl_mask=config.kl_mask,
    )
    losses, stats = checked_losses(batch.losses(terms), len(rows))
    return losses.sum() / num_pairs, stats

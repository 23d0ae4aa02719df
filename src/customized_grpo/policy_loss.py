"""The gradient of one update: micro-batches, the clipped loss, KL, GRPO-Guard."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from customized_grpo.config import LossConfig
from customized_grpo.generators.base import Conditioning
from customized_grpo.ops import clipped_surrogate, gaussian_kl, normalize_ratio
from customized_grpo.rollout import Policy
from customized_grpo.types import Advantages, PolicyBatch, Rollout


def policy_batch(rollout: Rollout, advantages: Advantages, samples: Tensor) -> PolicyBatch:
    """Trained transitions of the valid samples among ``samples`` (int64 rows of the rollout)."""
    samples = samples[advantages.valid[samples]]
    step_index = rollout.step_index[samples]
    num_trained = step_index.shape[1]
    return PolicyBatch(
        latents=rollout.latents[samples].flatten(0, 1),
        next_latents=rollout.next_latents[samples].flatten(0, 1),
        step_index=step_index.flatten(),
        old_log_prob=rollout.log_probs[samples].flatten(),
        advantage=advantages.per_step[samples].gather(1, step_index).flatten(),
        sample_index=samples.repeat_interleave(num_trained),
        old_mean=None if rollout.means is None else rollout.means[samples].flatten(0, 1),
    )


def accumulate_gradient(
    policy: Policy,
    batch: PolicyBatch,
    conditioning: Conditioning,
    config: LossConfig,
    *,
    pinned: bool,
    micro_batch_size: int | None,
) -> dict[str, float]:
    """Adds the gradient of the mean loss over all M pairs, whatever the micro-batch size.

    Args:
        policy: what is trained.
        batch: M (sample, step) pairs.
        conditioning: of the rollout's samples ``[B, ...]``; pairs pick their rows.
        config: of the loss.
        pinned: take the new log-probs, detached, as the old ones (ratio exactly 1).
        micro_batch_size: pairs per forward and backward; None = all.

    Returns:
        Means over the pairs: ``loss``, ``ratio_mean``, ``ratio_abs_dev``, ``clip_fraction``,
        ``mismatch`` (mean |ratio - 1| against the rollout's own log-probs) and, if used, ``kl``.
    """
    num_pairs = len(batch.advantage)
    totals: dict[str, float] = defaultdict(float)
    for rows in torch.arange(num_pairs, device=batch.latents.device).split(
        micro_batch_size or num_pairs
    ):
        loss, stats = _pairs_loss(policy, batch, conditioning, config, rows, pinned)
        loss.backward()
        totals["loss"] += loss.item()
        for name, value in stats.items():
            totals[name] += value.item() * len(rows) / num_pairs
    return dict(totals)


def _pairs_loss(
    policy: Policy,
    batch: PolicyBatch,
    conditioning: Conditioning,
    config: LossConfig,
    rows: Tensor,
    pinned: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    latents, step_index = batch.latents[rows], batch.step_index[rows]
    condition = conditioning.take(batch.sample_index[rows])
    mean, std = policy.transition(latents, step_index, condition)
    log_prob = policy.log_prob(batch.next_latents[rows], mean, std)
    rollout_log_prob = batch.old_log_prob[rows]
    mismatch = (torch.exp(log_prob.detach() - rollout_log_prob) - 1).abs().mean()
    old_log_prob = log_prob.detach() if pinned else rollout_log_prob
    if config.ratio_norm:
        assert batch.old_mean is not None, "the rollout was asked to keep its means"
        old_mean = mean.detach() if pinned else batch.old_mean[rows]
        log_prob = normalize_ratio(log_prob, old_log_prob, mean, old_mean, std)
        old_log_prob = torch.zeros_like(log_prob)
    num_pairs = len(batch.advantage)
    loss, stats = clipped_surrogate(
        log_prob, old_log_prob, batch.advantage[rows], config.clip_range, denominator=num_pairs
    )
    stats["mismatch"] = mismatch
    if config.kl_weight:
        with torch.no_grad(), policy.generator.base_policy():
            reference_mean, _ = policy.transition(latents, step_index, condition)
        divergence = gaussian_kl(mean, reference_mean, std)
        stats["kl"] = divergence.detach().mean()
        loss = loss + config.kl_weight * divergence.sum() / num_pairs
    return loss, stats

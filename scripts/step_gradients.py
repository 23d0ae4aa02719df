"""How much does each denoising step teach of each objective? What TDW weighs, measured on a base.

python scripts/step_gradients.py configs/emoji.yaml --num_rollouts 16

For every rollout of training examples, step k and objective o: the policy gradient g of the pairs
(sample, k) alone, with the advantages of o alone. Printed are its norm in one rollout, mostly
noise, and its signal, the root of the mean of g_i . g_j over pairs of different rollouts i, j: what
is left when rollouts are averaged (0 where that mean is negative). Weights of the steps, such as
TDW's, move the balance of the objectives by what the steps they raise teach of each: the last line
is the prompt's share of the run's weights, each step counted by its norm.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from customized_grpo.config import GrpoAlgorithm, RunConfig, load_config
from customized_grpo.data.base import DataSource
from customized_grpo.devices import pick_device
from customized_grpo.rewards.base import RewardSet
from customized_grpo.training.advantages import objective_advantages, objective_weights
from customized_grpo.training.build import build_world, make_trainable
from customized_grpo.training.loss import accumulate_gradient, policy_batch
from customized_grpo.training.policy import Policy, make_policy
from customized_grpo.training.rollout import collect_rollout
from customized_grpo.types import Advantages

OBJECTIVES = ("prompt", "identity")


def gradients(
    policy: Policy, data: DataSource, rewards: RewardSet, config: RunConfig, number: int
) -> Tensor:
    """Gradients ``[steps, objectives, D]`` of one rollout."""
    prompts = data.training(number, config.rollout.prompts_per_rollout)
    conditioning = policy.generator.encode(prompts)
    random = torch.Generator().manual_seed(config.seed + number)
    rollout = collect_rollout(policy, conditioning, config.rollout, random)
    examples = [prompts[group] for group in rollout.group_ids.tolist()]
    scores = rewards.score(rollout.images, examples).scores
    per_objective = objective_advantages(scores, rollout.group_ids, config.rewards, OBJECTIVES)
    conditioning = conditioning.take(rollout.group_ids)
    steps = range(policy.num_steps - 1)
    return torch.stack(
        [
            torch.stack(
                [
                    _gradient(policy, rollout, conditioning, per_objective[:, o], step, config)
                    for o in range(len(OBJECTIVES))
                ]
            )
            for step in steps
        ]
    )


def _gradient(policy, rollout, conditioning, advantage: Tensor, step: int, config) -> Tensor:
    steps = torch.arange(policy.num_steps, device=advantage.device)
    advantages = Advantages(
        per_objective=advantage[:, None],
        per_step=advantage.nan_to_num()[:, None] * (steps == step),
        valid=~advantage.isnan(),
    )
    as_they_are = torch.ones(policy.num_steps, device=advantage.device)
    rows, losses = torch.arange(len(advantage)), GrpoAlgorithm().losses
    batch = policy_batch(rollout, advantages, rows, as_they_are, losses)
    parameters = [p for p in policy.generator.transformer.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    size = config.train.micro_batch_size
    loss = config.loss.policy_only()  # pairs of other steps are then not computed
    accumulate_gradient(policy, batch, conditioning, loss, pinned=True, micro_batch_size=size)
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def norm_and_signal(found: Tensor) -> tuple[Tensor, Tensor]:
    """Root mean square norm, and what different rollouts share, of ``[R, D]``."""
    count = len(found)
    squares, whole = found.square().sum(1), found.sum(0).square().sum()
    shared = (whole - squares.sum()) / (count * (count - 1))
    return squares.mean().sqrt(), shared.clamp(min=0).sqrt()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--num_rollouts", type=int, default=16)
    args = parser.parse_args()
    config = load_config(args.config)
    device = pick_device(config.device)
    data, generator = build_world(config, device)
    rewards = RewardSet(config.rewards, device)
    torch.manual_seed(config.seed)
    make_trainable(generator, config)
    policy = make_policy(generator, config)
    numbers = track(range(args.num_rollouts), description="rollouts")
    found = torch.stack([gradients(policy, data, rewards, config, n) for n in numbers])

    print(f"{args.num_rollouts} rollouts of {config.rollout.prompts_per_rollout} x "
          f"{config.rollout.group_size} samples, seed {config.seed}")  # fmt: skip
    weights = objective_weights(policy.sigmas[:-1].cpu(), config.advantage, OBJECTIVES)
    norms = torch.zeros(found.shape[1], len(OBJECTIVES))
    print("step  sigma" + "".join(f"{f'{o} norm':>16}{'signal':>12}" for o in OBJECTIVES))
    for step in range(found.shape[1]):
        pairs = [norm_and_signal(found[:, step, o]) for o in range(len(OBJECTIVES))]
        norms[step] = torch.stack([norm for norm, _ in pairs])
        cells = "".join(f"{norm.item():>16.3e}{signal.item():>12.3e}" for norm, signal in pairs)
        print(f"{step:>4}  {policy.sigmas[step]:.3f}{cells}")
    weighed = (norms * weights[: len(norms)]).sum(0)
    print(f"prompt's share: {weighed[0] / weighed.sum():.3f}")


if __name__ == "__main__":
    main()

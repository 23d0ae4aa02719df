"""Which denoising steps decide which reward? The premise of TDW, measured on a base model.

python scripts/noise_attribution.py configs/emoji.yaml --num_examples 48

For every step k, groups of samples that share everything but the noise added at step k: the
standard deviation of a reward within a group is what chance at that step does to it, and all that
a policy gradient can credit the step with. TDW pays where the prompt's share of the steps falls
in the course of denoising and the identity's rises. Validation examples (training subjects).
``measured`` is the prompt's weight by a schedule of type measured.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from customized_grpo.config import MeasuredSchedule, RunConfig, load_config
from customized_grpo.devices import pick_device
from customized_grpo.files import write_atomic
from customized_grpo.generators.base import Conditioning
from customized_grpo.rewards.base import RewardSet
from customized_grpo.training.advantages import Measured, objective_weights, shares_of_noise
from customized_grpo.training.build import build_world
from customized_grpo.training.policy import Policy, make_policy
from customized_grpo.training.rollout import collect_rollout
from customized_grpo.types import Example


def scores_by_noise(
    policy: Policy,
    conditioning: Conditioning,
    examples: list[Example],
    rewards: RewardSet,
    config: RunConfig,
    window: tuple[int, int],
) -> Tensor:
    """Scores ``[P, G, R]`` of groups with noise in ``window`` only."""
    rollout_config = replace(
        config.rollout,
        shared_noise=True,
        window=window,
        num_trained_steps=1,
        num_steps=policy.num_steps,
    )
    generator = torch.Generator().manual_seed(config.seed)
    rollout = collect_rollout(policy, conditioning, rollout_config, generator)
    repeated = [examples[group] for group in rollout.group_ids.tolist()]
    scores = rewards.score(rollout.images, repeated).scores
    return scores.view(len(examples), -1, len(rewards.names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--num_examples", type=int, default=48)
    parser.add_argument("--num_steps", type=int, help="default: as in the config")
    parser.add_argument("--out", type=Path, help="JSON file of the numbers")
    args = parser.parse_args()
    config = load_config(args.config)
    device = pick_device(config.device)
    data, model = build_world(config, device)
    examples = data.validation(args.num_examples)
    conditioning = model.encode(examples)
    rewards = RewardSet(config.rewards, device)
    policy = make_policy(model, config, args.num_steps)

    windows = [(k, k + 1) for k in range(policy.num_steps - 1)]
    scores = [
        scores_by_noise(policy, conditioning, examples, rewards, config, window)
        for window in track([*windows, (0, policy.num_steps - 1)], description="steps")
    ]
    rows = [some.std(1).mean(0).tolist() for some in scores]
    variances = torch.stack([some.var(1).mean(0) for some in scores[:-1]]).cpu()
    last = torch.zeros(1, len(rewards.names))  # the last step has no noise
    shares = shares_of_noise(torch.cat([variances, last]), config.rewards)
    sigmas, objectives = policy.sigmas[:-1].cpu(), ("identity", "prompt")
    own, other = (
        objective_weights(sigmas, advantage, objectives, Measured(noise_shares=shares))[:, 1]
        for advantage in (config.advantage, replace(config.advantage, schedule=MeasuredSchedule()))
    )
    print(f"{len(examples)} examples x {config.rollout.group_size} samples, seed {config.seed}")
    names = "".join(f"{name:>12}" for name in rewards.names)
    print(f"step  sigma  {names}   w_prompt   measured")
    for step, row in enumerate(rows):
        head = f"{step:>4}  {policy.sigmas[step]:.3f}" if step < len(windows) else " all       "
        weight = f"{own[step]:>11.3f}{other[step]:>11.3f}" if step < len(windows) else ""
        print(head + "  " + "".join(f"{value:>12.4f}" for value in row) + weight)
    if args.out:
        content = {"rewards": rewards.names, "sigmas": policy.sigmas.tolist(), "std": rows}
        write_atomic(args.out, json.dumps(content) + "\n")


if __name__ == "__main__":
    main()

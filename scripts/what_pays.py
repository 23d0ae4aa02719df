"""Which pictures does the advantage push up? Measured on what a base model samples.

python scripts/what_pays.py configs/emoji.yaml --num_examples 256

Groups of the base, each sample sorted by the truth (the data must know it): copies of the
reference, right in both, another subject, prompt missed, neither. Of each kind the mean advantage
by each objective alone, what the config's shaping adds to their even sum, and by both, as the
config shapes them, at several weights of the prompt. Where copies are above 0 a policy gradient
begins by making more of them; a schedule that shall unlearn copying must weigh the prompt more than
that where it is decided, in the early steps. Validation examples (training subjects).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from customized_grpo.config import ConstantSchedule, RunConfig, load_config
from customized_grpo.devices import pick_device
from customized_grpo.rewards.attributes import AttributeClassifier
from customized_grpo.rewards.base import RewardSet
from customized_grpo.rewards.truth import Truth
from customized_grpo.training.advantages import assign_credit
from customized_grpo.training.build import build_world
from customized_grpo.training.policy import make_policy
from customized_grpo.training.rollout import collect_rollout
from customized_grpo.types import Advantages

OBJECTIVES = ("identity", "prompt")
WEIGHTS = (0.5, 0.6, 0.7, 0.8, 0.9)


def samples(config: RunConfig, num_examples: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Scores ``[P, G, R]`` of the base's samples, and the kinds ``[P, G]`` bool."""
    device = pick_device(config.device)
    data, model = build_world(config, device)
    examples = data.validation(num_examples)
    policy, rewards = make_policy(model, config), RewardSet(config.rewards, device)
    rng = torch.Generator().manual_seed(config.seed)
    size, count = config.rollout.prompts_per_rollout, config.rollout.group_size
    images, scores = [], []
    for start in track(range(0, num_examples, size), description="groups"):
        some = examples[start : start + size]
        rollout = collect_rollout(policy, model.encode(some), config.rollout, rng)
        repeated = [some[group] for group in rollout.group_ids.tolist()]
        scores.append(rewards.score(rollout.images, repeated).scores.view(len(some), count, -1))
        images.append(rollout.images.unflatten(0, (len(some), count)))
    embedder = RewardSet(config.evaluators, device, "evaluators").embedder("identity")
    if config.evaluation.classifier is None:
        raise SystemExit("evaluation.classifier must be set: what else says what is in a picture?")
    classifier = AttributeClassifier.load(config.evaluation.classifier, device)
    truth = Truth(examples, data, embedder, classifier, device)
    shares = [truth(sample) for sample in torch.cat(images).unbind(1)]
    prompt, subject, copy = (
        torch.stack([share[name] for share in shares], 1).bool()
        for name in ("prompt_right", "subject_right", "copies")
    )
    kinds = {
        "copy": copy,
        "right in both": prompt & subject & ~copy,
        "another subject": prompt & ~subject & ~copy,
        "prompt missed": ~prompt & subject & ~copy,
        "neither": ~prompt & ~subject & ~copy,
    }
    return torch.cat(scores), kinds


def advantages(config: RunConfig, scores: Tensor) -> dict[str, Tensor]:
    """By each objective, by the shaping, and by both at each of the weights, ``[P * G]``."""
    groups = torch.arange(len(scores), device=scores.device).repeat_interleave(scores.shape[1])
    sigmas = torch.tensor([1.0, 0.0], device=scores.device)

    def credit(weight: float, **changes: Any) -> Advantages:
        schedule = ConstantSchedule(prompt=weight)
        setting = replace(config.advantage, schedule=schedule, **changes)
        return assign_credit(
            scores.flatten(0, 1), groups, sigmas, setting, config.rewards, OBJECTIVES
        )

    plain = credit(0.5, shaping="linear", center=False)
    shaped = {f"{weight:.1f}": credit(weight).per_step[:, 0] for weight in WEIGHTS}
    added = {config.advantage.shaping: shaped["0.5"] - plain.per_step[:, 0]}
    return dict(zip(OBJECTIVES, plain.per_objective.unbind(1), strict=True)) | added | shaped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--num_examples", type=int, default=256)
    args = parser.parse_args()
    config = load_config(args.config)
    scores, kinds = samples(config, args.num_examples)
    columns = advantages(config, scores)
    print(f"{len(scores)} examples x {scores.shape[1]} samples, seed {config.seed}")
    print(
        "mean advantage ± standard error: by one objective, what the shaping adds at .5, "
        "by both at weights of the prompt"
    )
    print(f"{'':16}{'share':>8}" + "".join(f"{name:>16}" for name in columns))
    for name, kind in kinds.items():
        rows = kind.flatten()
        cells = [
            f"{values[rows].mean():+.3f} ± {values[rows].std() / rows.sum().sqrt():.3f}"
            for values in columns.values()
        ]
        share = f"{kind.float().mean():8.3f}"
        print(f"{name:16}{share}" + "".join(f"{cell:>16}" for cell in cells))
    identity, prompt = (columns[name][kinds["copy"].flatten()].mean() for name in OBJECTIVES)
    if identity > 0 > prompt:
        print(
            f"a weighted sum punishes copies above a weight of {identity / (identity - prompt):.2f}"
        )
    else:
        print(f"copies: identity {identity:+.3f}, prompt {prompt:+.3f}; no weight changes the sign")


if __name__ == "__main__":
    main()

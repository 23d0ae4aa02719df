"""Run folders as training leaves them, without the training."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from customized_grpo.config import LoraSettings, RunConfig, dump_config
from customized_grpo.training.build import build_generator, make_trainable


def make_run(
    config: RunConfig, scale: float = 0.02, lora: bool = True, rank: int = 4, alpha: float = 8
) -> Path:
    """A run whose trained weights are the base's and some noise."""
    settings = dataclasses.replace(config.lora or LoraSettings(), rank=rank, alpha=alpha)
    config = dataclasses.replace(config, lora=settings if lora else None)
    run = Path(config.output_dir, config.name)
    run.mkdir(parents=True)
    (run / "environment.json").write_text("{}\n")
    (run / "config.yaml").write_text(dump_config(config))
    generator = build_generator(config, torch.device("cpu"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        make_trainable(generator, config)
    random = torch.Generator().manual_seed(1)
    for name, parameter in generator.transformer.named_parameters():
        if "lora_B" in name or (not lora and name.endswith("to_q.weight")):
            parameter.data += scale * torch.randn(parameter.shape, generator=random)
    generator.save_weights(run / "weights")
    return run

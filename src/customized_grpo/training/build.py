"""From a config to what trains: data source, generator, trainable weights, optimizer."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from customized_grpo.config import RunConfig, TrainConfig
from customized_grpo.data.base import DataSource
from customized_grpo.errors import ConfigError, needs_extra, within
from customized_grpo.generators.base import Generator
from customized_grpo.generators.cpu import use_stock_blocks
from customized_grpo.generators.lora import attach_lora, keep_start, trust_autocast
from customized_grpo.runs.files import START

logger = logging.getLogger("customized_grpo")

_MAX_VERSIONS = 64  # of a compiled block; torch's limit of 8 is reached by two picture shapes


class _LimitHit(logging.Filter):
    """Says once, in the terms of a config, what torch says of every kind of block."""

    def filter(self, record: logging.LogRecord) -> bool:
        if "recompile_limit" not in record.getMessage():
            return True
        logger.warning(
            "compile: the transformer's blocks have met more than %d kinds of input and are not "
            "compiled for further ones; references of fewer shapes help, or compile: false",
            _MAX_VERSIONS,
        )
        self.filter = lambda record: "recompile_limit" not in record.getMessage()
        return False


def build_world(config: RunConfig, device: torch.device) -> tuple[DataSource, Generator]:
    """Loads data source and generator; their errors name the section of the config."""
    logger.info("reading data: %s", config.data.type)
    with within("data"):
        data: DataSource = config.data.build(config.seed)
    generator = build_generator(config, device)
    for example in data.listed():
        generator.check(example)
    return data, generator


def build_generator(config: RunConfig, device: torch.device) -> Generator:
    """Loads the generator; its errors name the section of the config."""
    logger.info("loading generator: %s", config.generator.type)
    with within("generator"):
        return config.generator.build(device)


def from_own_start(config: RunConfig, run: Path) -> RunConfig:
    """The config with the LoRA that the run in a folder has kept, if it began with one: what is at
    ``lora.path`` may be gone by now, or another one."""
    lora, start = config.lora, run / START
    if lora is None or lora.path is None or not start.is_dir():
        return config
    return replace(config, lora=replace(lora, path=str(start)))


def make_trainable(generator: Generator, config: RunConfig) -> None:
    """Adds LoRA, or unfreezes the transformer where the config has none."""
    if config.lora is not None:
        attach_lora(generator.transformer, config.lora, generator.lora_targets)
        if config.loss.kl_to == "start":
            keep_start(generator.transformer)
        if config.mixed_precision == "bf16":
            trust_autocast(generator.transformer)
    elif getattr(generator.transformer, "is_quantized", False):
        raise ConfigError("lora: must not be null with generator.quantization, got null; add lora")
    else:
        generator.transformer.requires_grad_(True).float()
    if config.compile:
        _compile(generator.transformer)


def _compile(transformer: Any) -> None:
    """Compiles the repeated blocks; a length that has been seen to change is one for all lengths.

    All blocks of a kind share their versions: one for the rollout, two for the update, one for the
    KL, each again with a length that is fixed or free.

    Raises:
        ConfigError: if diffusers names no repeated blocks in it.
    """
    if not getattr(transformer, "_repeated_blocks", None):
        raise ConfigError(
            f"compile must be false for {type(transformer).__name__}, got true; diffusers "
            "names no repeated blocks in it"
        )
    from torch._dynamo import config

    use_stock_blocks(transformer)
    config.recompile_limit = _MAX_VERSIONS
    logging.getLogger("torch._dynamo.convert_frame").addFilter(_LimitHit())
    transformer.compile_repeated_blocks()


def load_trained(generator: Generator, weights: Path, mixed_precision: str) -> None:
    """Puts what a run has trained into its generator."""
    generator.load_weights(weights)
    if mixed_precision == "bf16":
        trust_autocast(generator.transformer)


def find_optimizer(config: TrainConfig) -> Any:
    """AdamW, or bitsandbytes' with its state in 8 bits (arXiv:2110.02861).

    Raises:
        ConfigError: if that is asked for and not installed.
    """
    if config.optimizer != "adamw-8bit":
        return torch.optim.AdamW
    with needs_extra("bitsandbytes", "train.optimizer: 'adamw-8bit'"):
        from bitsandbytes.optim import AdamW8bit
    return AdamW8bit


def make_optimizer(parameters: list[nn.Parameter], config: TrainConfig) -> torch.optim.Optimizer:
    """See ``find_optimizer``."""
    optimizer = find_optimizer(config)
    fused = {"fused": True} if optimizer is torch.optim.AdamW else {}  # one pass over each weight
    return optimizer(
        parameters,
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        **fused,
    )

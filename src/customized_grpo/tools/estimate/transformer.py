"""Counts of the trained transformer: a rollout's pass and a trained pair, of one sample."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from customized_grpo.config import LoraSettings
from customized_grpo.errors import CheckpointError, ConfigError
from customized_grpo.generators.cpu import lora_merged
from customized_grpo.generators.lora import add_lora, attach_lora, trust_autocast
from customized_grpo.generators.lora_files import read_lora
from customized_grpo.tools.estimate.architectures import Component
from customized_grpo.tools.estimate.autocast import cuda_autocast
from customized_grpo.tools.estimate.checkpoints import build, parameters
from customized_grpo.tools.estimate.counting import count, make_fake, on_skeletons
from customized_grpo.tools.estimate.prefixed import KIND, Prefixed

_PREFIX = "prefix_"
_DEPTHS = ("num_layers", "num_single_layers")  # of diffusers' transformers


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What the transformer sees of one sample."""

    target: tuple[int, int]  # rows and columns
    references: tuple[tuple[int, int], ...]
    text: int

    @property
    def image(self) -> int:
        """Tokens of target and references."""
        return sum(map(math.prod, (self.target, *self.references)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixCount:
    """Text and references of one prompt, where their passes are not those of samples."""

    forward_flops: float = 0.0
    forward_peak: float = 0.0  # bytes of activations
    kept: float = 0.0  # bytes of keys and values
    pair_flops: float = 0.0  # with adapters: a pass, and one back for all that saw it
    pair_peak: float = 0.0
    checkpointed_peak: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerCount:
    """One sample; bytes of activations grow in proportion to the batch, those of weights do not."""

    parameters: float  # weights of the model without adapters
    trained: float  # weights that are trained
    forward_flops: float  # one pass without gradient, adapters merged where the rollout does so
    forward_peak: float  # bytes of activations
    merged: float  # bytes of the sums of weights and adapters, once however large the batch
    pair_flops: float
    """Forward and backward with adapters; frozen weights need no gradient of their own."""
    pair_peak: float  # bytes of activations, all kept for the backward pass
    casts: float  # bytes of trained weights in bfloat16, kept once for the backward pass of a batch
    checkpointed_peak: float  # the same if only the inputs of the blocks are kept
    block: float  # parameters of the largest block
    latents: float  # numbers in the latents of one sample
    prefix: PrefixCount = PrefixCount()
    """What all steps and samples of a prompt share, and the passes above leave out."""


def count_transformer(
    component: Component,
    tokens: Tokens,
    lora: LoraSettings | None,
    dtype: torch.dtype,
    autocast: bool,
    merges: bool = True,
) -> TransformerCount:
    """Counts one sample of a transformer as diffusers builds it.

    The blocks of a kind are alike, so that every number is a straight line in the depth: two or
    three shallow models are run and give that of any depth.

    Args:
        component: class and config.
        tokens: of one sample.
        lora: adapters; None = all weights are trained.
        dtype: of the frozen weights.
        autocast: bfloat16 autocast, as ``mixed_precision: bf16``.
        merges: whether adapters are merged where that can be done; not with quantised weights or
            compiled blocks.
    """
    kind, config = component
    defaults = build(component, torch.bfloat16).config
    depths = {name: defaults[name] for name in _DEPTHS if name in defaults}
    start = {name: min(depth, 2) for name, depth in depths.items()}
    adapt = _adapting(component, lora)

    def measure(changes: dict[str, int]) -> dict[str, float]:
        return _measure((kind, {**config, **changes}), tokens, adapt, dtype, autocast, merges)

    shallow = measure(start)
    total, blocks = dict(shallow), []
    for name, depth in depths.items():
        if depth > start[name]:
            deeper = measure({**start, name: start[name] + 1})
            slope = {key: deeper[key] - shallow[key] for key in shallow}
            blocks.append(slope)
            for key in total:
                total[key] += (depth - start[name]) * slope[key]
    # With checkpoints the backward pass holds what one block needs, besides what is kept.
    largest = {key: max((b[key] for b in blocks), default=shallow[key]) for key in shallow}
    for part in ("", _PREFIX) if f"{_PREFIX}kept" in total else ("",):
        kept = total.pop(f"{part}checkpointed_kept")
        total[f"{part}checkpointed_peak"] = kept + largest[f"{part}pair_peak"]
    shared = {n.removeprefix(_PREFIX): total.pop(n) for n in [*total] if n.startswith(_PREFIX)}
    return TransformerCount(
        **total,
        block=largest["parameters"],
        latents=math.prod(tokens.target) * defaults.in_channels,
        prefix=PrefixCount(**shared),
    )


def _adapting(component: Component, lora: LoraSettings | None) -> Callable[[Any], None]:
    """What makes a model trainable, also one of fewer blocks than a LoRA to go on from has."""
    if lora is None:
        return lambda model: model.requires_grad_(True).float()
    if lora.path is None:
        return lambda model: attach_lora(model, lora, lora_targets(model))
    pairs = read_lora(Path(lora.path), build(component, torch.bfloat16), "lora.path: ")

    def add(model: Any) -> None:
        model.requires_grad_(False)
        there = dict(model.named_modules())
        some = {name: pair for name, pair in pairs.items() if name in there}
        if not some:
            raise CheckpointError(
                f"lora.path: must adapt the first blocks, from which all are counted, {lora.path} "
                "does not; estimate it with lora.rank in its place"
            )
        add_lora(model, some)

    return add


def _measure(
    component: Component,
    tokens: Tokens,
    adapt: Callable[[Any], None],
    dtype: torch.dtype,
    autocast: bool,
    merges: bool,
) -> dict[str, float]:
    """The numbers of ``TransformerCount``, of a model as deep as the config says."""
    model = build(component, dtype)
    number = parameters(model)
    adapt(model)
    if autocast and getattr(model, "peft_config", None):
        trust_autocast(model)
    make_fake(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    size, known = sum(parameter.numel() for parameter in trained), set(model.parameters())
    passes = _passes(model, tokens, autocast)
    merged = lora_merged(model) if merges else nullcontext()
    numbers = {"parameters": float(number), "trained": float(size)}
    with on_skeletons, torch.no_grad(), merged:
        numbers["merged"] = float(sum(p.nbytes for p in set(model.parameters()) - known))
        for name, run in passes.items():
            forward = count(run)
            numbers |= {f"{name}forward_flops": forward.flops, f"{name}forward_peak": forward.peak}
    casts = numbers["casts"] = 2.0 * size if autocast else 0.0
    with on_skeletons:
        for parameter in trained:  # as in all micro-batches but the first: gradients are added up
            parameter.grad = torch.empty_like(parameter)
        for name, run in passes.items():
            pair = count(lambda run=run: _backward(run()))
            numbers |= {f"{name}pair_flops": pair.flops, f"{name}pair_peak": pair.peak - casts}
        if _PREFIX in passes:
            with torch.no_grad():
                numbers[f"{_PREFIX}kept"] = sum(t.nbytes for t in passes[_PREFIX]())
        model.train().enable_gradient_checkpointing()
        for name, run in passes.items():
            numbers[f"{name}checkpointed_kept"] = count(run).kept
    return numbers


def _passes(model: Any, tokens: Tokens, autocast: bool) -> dict[str, Callable[[], list[Tensor]]]:
    """The pass of a sample and, of a model that has it apart, that of a prompt."""
    if type(model).__name__ != KIND:
        return {"": lambda: [_run(model, tokens, autocast)]}
    parts = Prefixed(
        model=model,
        target=math.prod(tokens.target),
        references=tuple(math.prod(grid) for grid in tokens.references),
        text=tokens.text,
        autocast=autocast,
    )

    def prefix() -> list[Tensor]:
        return [tensor for layer in parts.prefix() for tensor in layer]

    with on_skeletons, torch.no_grad():
        kept = [(torch.empty_like(k), torch.empty_like(v)) for k, v in parts.prefix()]
    for tensor in (t for layer in kept for t in layer):
        tensor.requires_grad_()
    return {"": lambda: [parts.velocity(kept)], _PREFIX: prefix}


def _backward(outputs: list[Tensor]) -> None:
    torch.stack([tensor.float().mean() for tensor in outputs]).sum().backward()


def _run(model: Any, tokens: Tokens, autocast: bool) -> Tensor:
    inputs = transformer_inputs(model, tokens, torch.float32 if autocast else model.dtype)
    with cuda_autocast(enabled=autocast):
        return model(**inputs, return_dict=False)[0][:, : math.prod(tokens.target)]


def lora_targets(model: nn.Module) -> list[str]:
    """Names of the attention projections that LoRA adapts unless a config says otherwise."""
    from customized_grpo.generators.flux2_klein import LORA_TARGETS
    from customized_grpo.generators.pipeline import PipelineGenerator

    if type(model).__name__ != "Flux2Transformer2DModel":
        return list(PipelineGenerator.lora_targets)
    linear = (name for name, part in model.named_modules() if isinstance(part, nn.Linear))
    return [name for name in linear if LORA_TARGETS.search(f".{name}")]


def transformer_inputs(model: Any, tokens: Tokens, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments for one sample, as the adapter of its family gives them, or a ConfigError."""
    kind, config = type(model).__name__, model.config
    common: dict[str, Any] = {
        "hidden_states": torch.empty(1, tokens.image, config.in_channels, dtype=dtype),
        "encoder_hidden_states": torch.empty(
            1, tokens.text, config.joint_attention_dim, dtype=dtype
        ),
        "timestep": torch.empty(1, dtype=dtype),
    }
    if kind == "QwenImageTransformer2DModel":
        shapes = [(1, *size) for size in (tokens.target, *tokens.references)]
        mask = torch.empty(1, tokens.text, dtype=torch.int64)
        return {**common, "encoder_hidden_states_mask": mask, "img_shapes": [shapes]}
    known = ("FluxTransformer2DModel", "Flux2Transformer2DModel", "Flux3Transformer2DModel")
    if kind not in known:
        raise ConfigError(f"path: a {kind} cannot be counted; use a FLUX or Qwen-Image checkpoint")
    axes = len(config.axes_dims_rope)
    common["img_ids"] = torch.empty(tokens.image, axes)
    common["txt_ids"] = torch.empty(tokens.text, axes)
    if kind == "FluxTransformer2DModel":
        common["pooled_projections"] = torch.empty(1, config.pooled_projection_dim, dtype=dtype)
        common["guidance"] = torch.empty(1, dtype=dtype) if config.guidance_embeds else None
    if kind == "Flux3Transformer2DModel":
        count = math.prod(tokens.target)
        pixels, ids = common["hidden_states"], common["img_ids"]
        common |= {"hidden_states": pixels[:, :count], "img_ids": ids[:count]}
        common |= {"image_cond_hidden_states": pixels[:, count:], "image_cond_ids": ids[count:]}
    return common

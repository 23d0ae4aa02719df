"""The work of one iteration: a rollout and its updates, stage by stage, from a run's config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from customized_grpo.config import RewardConfig, RunConfig
from customized_grpo.errors import ConfigError, within
from customized_grpo.generators.pipeline import PipelineConfig, Size
from customized_grpo.tools.estimate.checkpoints import (
    counted_path,
    pipeline_components,
    text_tokens,
)
from customized_grpo.tools.estimate.encoders import (
    EncoderCount,
    RewardCount,
    count_rewards,
    count_text_encoder,
    count_vae,
)
from customized_grpo.tools.estimate.transformer import Tokens, TransformerCount, count_transformer

_NATIVE_SIZE = 1024
_PATCH = 16  # pixels per token: VAE 8, patches of 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What all devices together do in one stage of an iteration."""

    name: str
    flops: float  # useful ones: each once, without what is computed again to save memory
    float32: float  # share of the FLOPs that are computed in float32, the others in bfloat16
    again: float = 0.0  # FLOPs of what is computed again
    weights: float = 0.0
    """Bytes of the transformer's weights, which every pass of every device reads."""
    passes: int = 0  # (sample, step) pairs of the transformer
    batch: int = 1  # pairs per pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A run's counts; see ``count_run``."""

    config: RunConfig
    tokens: Tokens
    transformer: TransformerCount
    encode: EncoderCount  # one example: prompt and references; parameters: of all text encoders
    decode: EncoderCount  # one image; parameters: of the VAE
    rewards: RewardCount
    evaluators: RewardCount  # those that are there while it trains
    guidance_passes: int  # passes of the transformer per velocity
    shown: Workload | None = None
    """Of pictures that are not trained on, where they have another size."""
    stand_in: str = ""
    """The checkpoint whose shapes were counted where those of the config's cannot be read."""

    @property
    def samples(self) -> int:
        """Images of a rollout."""
        return self.config.rollout.prompts_per_rollout * self.config.rollout.group_size

    @property
    def size(self) -> Size:
        """Pixels of a picture."""
        return self.tokens.target[0] * _PATCH, self.tokens.target[1] * _PATCH

    @property
    def velocities(self) -> int:
        """(sample, step) pairs that a rollout computes.

        Samples that start from one noise are one until the first step of the window has noise.
        """
        rollout = self.config.rollout
        before = rollout.window[0] if rollout.window and rollout.shared_noise else 0
        shared = rollout.prompts_per_rollout * before
        return shared + self.samples * (rollout.num_steps - before)

    @property
    def pairs(self) -> int:
        """Trained (sample, step) pairs of all updates of a rollout."""
        return self.samples * self.config.rollout.num_trained_steps

    @property
    def measurements(self) -> float:
        """Gradients of a whole rollout besides its updates', on average: where the objectives are
        balanced one for each, and one without any beside an older policy."""
        balance = self.config.advantage.balance
        num_objectives = len({reward.objective for reward in self.config.rewards})
        taken = num_objectives + self.config.has_old_policy
        return 0.0 if balance is None else taken / balance.every

    @property
    def prefixes(self) -> tuple[int, int, float]:
        """How often a rollout, all its updates, and what it measures besides (on average) compute
        what the samples of a prompt share.

        Sharded, every pass has it. Else once a prompt: again where a rollout's first steps are one
        for a group, and in each update of samples of all groups.
        """
        rollout, train = self.config.rollout, self.config.train
        if self.config.fsdp:
            return self._in_every_pass
        shared = bool(rollout.window and rollout.window[0] and rollout.shared_noise)
        updates = train.inner_updates if train.split == "samples" else 1
        prompts = rollout.prompts_per_rollout
        return prompts * (1 + shared), prompts * updates, prompts * self.measurements

    @property
    def _in_every_pass(self) -> tuple[int, int, float]:
        return self.velocities, self.pairs, self.pairs * self.measurements

    @property
    def saved(self) -> float:
        """Share of the FLOPs of rollout and updates that shared prefixes save."""
        spent, without = (
            sum(self._flops(prefixes)[:2]) for prefixes in (self.prefixes, self._in_every_pass)
        )
        return 1 - spent / without

    def _flops(self, prefixes: tuple[int, int, float]) -> tuple[float, float, float]:
        """Of a rollout, of its updates and what it measures, and what these compute again."""
        config, model, prefix = self.config, self.transformer, self.transformer.prefix
        generator: Any = config.generator
        others, again = _others(config), generator.gradient_checkpointing
        sampled, trained, measured = prefixes
        pairs, derived = self.pairs * (1 + self.measurements), trained + measured
        rollout = self.velocities * model.forward_flops + sampled * prefix.forward_flops
        update = pairs * model.pair_flops + derived * prefix.pair_flops
        # Nothing is measured of other models.
        update += others * (self.pairs * model.forward_flops + trained * prefix.forward_flops)
        repeated = pairs * model.forward_flops + derived * prefix.forward_flops
        passes = self.guidance_passes
        return passes * rollout, passes * update, passes * again * repeated

    def stages(self) -> tuple[Stage, ...]:
        """encode, rollout, decode, reward, update."""
        config, model, rewards = self.config, self.transformer, self.rewards
        prompts = config.rollout.prompts_per_rollout
        judges = [rewards] + [self.evaluators] * (config.loss.kl_share < 1)
        scored = sum(self.samples * j.image_flops + prompts * j.example_flops for j in judges)
        dtype, autocast = _precision(config)
        is_float32 = float(dtype == torch.float32)
        by_autocast = is_float32 * (not autocast)
        weights = model.parameters * weight_bytes(config)
        passes = self.guidance_passes * self.velocities
        trained = self.guidance_passes * self.pairs
        compared = trained * _others(config)
        trained = round(trained * (1 + self.measurements))
        rollout, update, again = self._flops(self.prefixes)
        return (
            Stage(name="encode", flops=prompts * self.encode.flops, float32=is_float32),
            Stage(
                name="rollout",
                flops=rollout,
                float32=by_autocast,
                weights=weights,
                passes=passes,
                batch=config.rollout.batch_size or self.samples,
            ),
            Stage(name="decode", flops=self.samples * self.decode.flops, float32=by_autocast),
            Stage(name="reward", flops=scored, float32=rewards.float32),
            Stage(
                name="update",
                flops=update,
                float32=by_autocast,
                again=again,
                weights=weights,
                passes=2 * trained + compared,  # what is computed again finds its weights there
                batch=config.train.micro_batch_size or self.pairs,
            ),
        )


def _others(config: RunConfig) -> int:
    """Models, besides the trained one, that an update asks for each pair's velocity."""
    return config.loss.needs_base + config.has_old_policy


def weight_bytes(config: RunConfig) -> float:
    """Bytes per weight of the transformer."""
    generator: Any = config.generator
    if config.lora is None:
        return 4.0
    if generator.quantization is not None:
        return {"int8": 1.0, "nf4": 0.53}[generator.quantization]  # nf4: and a scale per 64
    return 4.0 if generator.dtype == "float32" else 2.0


def gathered_bytes(config: RunConfig) -> float:
    """Bytes per weight that sharded processes send each other: see ``runs.sharding.shard``."""
    is_cast = config.lora is None and config.mixed_precision == "bf16"
    return 2.0 if is_cast else weight_bytes(config)


def _precision(config: RunConfig) -> tuple[torch.dtype, bool]:
    """Type of the frozen weights, and whether there is autocast."""
    generator: Any = config.generator
    return getattr(torch, generator.dtype), config.mixed_precision == "bf16"


def count_run(config: RunConfig, references: int = 1, text: int | None = None) -> Workload:
    """Counts a run; the weights that its config names need not be there.

    Args:
        config: of the run.
        references: square pictures of the subject per prompt.
        text: tokens of a prompt; None = what the generator pads to.

    Raises:
        ConfigError: if the generator is of another kind, or a shape unknown.
    """
    generator = config.generator
    if not isinstance(generator, PipelineConfig):
        raise ConfigError(
            f"generator.type must be a pipeline's of diffusers, got {generator.type!r}; other "
            "generators cannot be counted from their config"
        )
    with within("generator"):
        path = counted_path(generator.type, generator.path)
        components = pipeline_components(path)
        native = components["vae"][1].get("sample_size", _NATIVE_SIZE)
        size = (generator.height or native, generator.width or native)
        square = (_NATIVE_SIZE, _NATIVE_SIZE)
        seen = [generator.reference_size(square, size, references, _PATCH)] * references
        pictures = generator.picture_tokens(references)
        if text is None:
            text = (generator.max_sequence_length or text_tokens(path)) + pictures
        tokens = Tokens(target=_grid(size), references=tuple(_grid(s) for s in seen), text=text)
        dtype, autocast = _precision(config)
        merges = generator.quantization is None and not config.compile
        transformer = count_transformer(
            components["transformer"], tokens, config.lora, dtype, autocast, merges
        )
        decode, pictured = count_vae(components["vae"], size, seen, dtype, autocast)
        read = [
            count_text_encoder(component, text, pictures, dtype)
            for name, component in components.items()
            if name.startswith("text_encoder")
        ]
    passes = generator.passes()
    is_sized = not {"height", "width"}.isdisjoint(config.evaluation.of_generator())
    return Workload(
        config=config,
        tokens=tokens,
        transformer=transformer,
        encode=EncoderCount(
            parameters=sum(r.parameters for r in read),
            flops=pictured.flops + passes * sum(r.flops for r in read),
            peak=max(pictured.peak, *(r.peak for r in read)),
        ),
        decode=decode,
        rewards=count_rewards(config.rewards, references),
        evaluators=count_rewards(_evaluators(config), references),
        guidance_passes=passes,
        shown=count_run(config.evaluated(), references, text) if is_sized else None,
        stand_in="" if path == generator.path else path,
    )


def _evaluators(config: RunConfig) -> tuple[RewardConfig, ...]:
    return config.evaluators if config.evaluation.validate_every else ()


def _grid(size: Size) -> tuple[int, int]:
    return size[0] // _PATCH, size[1] // _PATCH

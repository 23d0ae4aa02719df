"""Seconds, memory and money of a run on given devices, from its counts."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from customized_grpo.config import ForwardAlgorithm, RunConfig
from customized_grpo.errors import ConfigError
from customized_grpo.generators.pipeline import decoded_at_once
from customized_grpo.tools.estimate.devices import Device
from customized_grpo.tools.estimate.workload import (
    Stage,
    Workload,
    gathered_bytes,
    weight_bytes,
)
from customized_grpo.training.validation import NUM_SAMPLES

TIGHT = 0.9
"""Of a memory: the prediction leaves out fragmentation and kernels' workspaces."""

DEFAULT_MFU = 0.4
"""Share of the peak that the model's products reach; assumed until a benchmark says otherwise."""
_CPU_MFU = 0.75
"""The same in float32 on a CPU: configs/emoji.yaml took 3.05 s an update of 708 GFLOP with two
threads of a Xeon, whose core does 140 GFLOP/s."""

_NODE = 8  # devices that share the fast link
_REWARD_BATCH = 64  # images per forward of a reward model


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Where the run is to happen."""

    device: Device
    num_devices: int = 1
    fsdp: bool = False  # shard the weights over the devices, in place of a copy on each (DDP)
    rollout_mfu: float = DEFAULT_MFU  # the MFU of a rollout, also of encoding, decoding and scoring
    update_mfu: float = DEFAULT_MFU

    def __post_init__(self) -> None:
        """Raises a ConfigError that names the flag if a share is none."""
        for mfu in (self.rollout_mfu, self.update_mfu):
            if not 0 < mfu <= 1:
                raise ConfigError(f"--mfu must be a share above 0, at most 1, got {mfu}")

    @property
    def link(self) -> float:
        """Bytes per second between devices, by the slowest way there is."""
        return self.device.link if self.num_devices <= _NODE else self.device.network


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCost:
    """One stage of an iteration."""

    flops: float  # useful ones, of all devices together
    seconds: float
    communication: float  # seconds of it that only wait for other devices


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on each device."""

    transformer: float
    trained: float  # with gradients, the optimizer and the average
    encoders: float  # VAE and text encoders that stay
    rewards: float
    trajectories: float
    activations: float  # the largest of any stage, with encoders that come for it

    @property
    def total(self) -> float:
        """Their sum."""
        return sum(asdict(self).values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run will take."""

    stages: dict[str, StageCost]  # the stages of one iteration: a rollout and its updates
    seconds_per_iteration: float
    seconds_per_update: float
    images_per_second: float
    hours: float
    device_hours: float
    memory: dict[str, Memory]  # 'ddp' or 'fsdp', and maybe '+checkpointing' -> memory per device
    layout: str  # the one that the run has
    ram: float  # bytes of the host's memory that loading takes at most, in each process


def assumed_mfu(config: RunConfig, device: Device) -> float:
    """What is reached of a device's peak where nobody has measured it."""
    is_float32 = device.is_cpu and config.mixed_precision == "no"
    return _CPU_MFU if is_float32 else DEFAULT_MFU


def read_mfu(mfu: float, benchmark: Path | None) -> tuple[float, float]:
    """MFU of rollout and update: measured (``benchmarks/mfu.py --json``), else ``mfu``."""
    if benchmark is None:
        return mfu, mfu
    try:
        measured = json.loads(benchmark.read_text().strip().splitlines()[-1])
        return float(measured["rollout_mfu"]), float(measured["update_mfu"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(
            f"--benchmark must end with the JSON line of benchmarks/mfu.py, got {benchmark}: "
            f"{type(error).__name__}: {error}; run `python benchmarks/mfu.py --json > FILE`"
        ) from error


def estimate(work: Workload, cluster: Cluster) -> Estimate:
    """Predicts what a run takes, evaluation and checkpoints left out.

    ``seconds = executed FLOPs of the busiest device / (peak x MFU)``, not less than reading the
    weights takes; under FSDP not less than gathering them.
    """
    train = work.config.train
    stages = {stage.name: _stage_cost(stage, work, cluster) for stage in work.stages()}
    seconds = sum(stage.seconds for stage in stages.values())
    hours = seconds * train.num_updates / train.inner_updates / 3600
    generator: Any = work.config.generator
    memory = {
        _layout(fsdp, checkpointing): predict_memory(
            work, cluster.num_devices, fsdp=fsdp, checkpointing=checkpointing
        )
        for fsdp in (False, True)
        for checkpointing in (False, True)
    }
    return Estimate(
        stages=stages,
        seconds_per_iteration=seconds,
        seconds_per_update=seconds / train.inner_updates,
        images_per_second=work.samples / seconds,
        hours=hours,
        device_hours=hours * cluster.num_devices,
        memory=memory,
        layout=_layout(cluster.fsdp, generator.gradient_checkpointing),
        ram=loading_ram(work),
    )


def _layout(fsdp: bool, checkpointing: bool) -> str:
    return ("fsdp" if fsdp else "ddp") + ("+checkpointing" if checkpointing else "")


def _stage_cost(stage: Stage, work: Workload, cluster: Cluster) -> StageCost:
    device, count = cluster.device, cluster.num_devices
    rollout, updates = work.config.rollout, work.config.train.inner_updates
    units = work.samples // updates if stage.name == "update" else work.samples
    units = rollout.prompts_per_rollout if stage.name == "encode" else units
    share = math.ceil(units / count) / units  # of the busiest device: samples are not divided
    per_flop = stage.float32 / device.float32 + (1 - stage.float32) / device.bf16
    mfu = cluster.update_mfu if stage.name == "update" else cluster.rollout_mfu
    passes = math.ceil(stage.passes * share / stage.batch) if stage.weights else 0
    computing = (stage.flops + stage.again) * share * per_flop / mfu
    needed = max(computing, passes * stage.weights / device.bandwidth)
    waits = 0.0
    if stage.weights and count > 1:
        others = (count - 1) / count
        if cluster.fsdp:  # every pass gathers the weights, while the one before computes
            gathered = work.transformer.parameters * gathered_bytes(work.config)
            waits += max(0.0, passes * gathered * others / cluster.link - needed)
        if stage.name == "update":  # all gradients are summed, in float32
            sums = updates + work.measurements
            waits += sums * 2 * others * 4 * work.transformer.trained / cluster.link
    return StageCost(flops=stage.flops, seconds=needed + waits, communication=waits)


def predict_memory(work: Workload, count: int, *, fsdp: bool, checkpointing: bool) -> Memory:
    """Predicted memory of each of ``count`` devices."""
    config, model = work.config, work.transformer
    generator: Any = config.generator
    share = 1 / count if fsdp else 1.0
    transformer = model.parameters * weight_bytes(config) * share
    if fsdp:  # the block at work and the next one, whole
        transformer += 2 * model.block * gathered_bytes(config)
    # In float32: gradient, AdamW's two moments, the average, an adapter's own weights, those that
    # the KL is relative to and those that sample.
    per_trained = 4 + (8 if config.train.optimizer == "adamw" else 2)
    per_trained += 4 * (config.train.ema_decay is not None) + 4 * (config.lora is not None)
    if config.advantage.balance is not None:  # a gradient of each objective but the last, the rest
        objectives = {reward.objective for reward in config.rewards}
        per_trained += 4 * (len(objectives) - 1 + config.has_old_policy)
    per_trained += 4 * (config.loss.kl_to == "start") + 4 * config.has_old_policy
    texts, vae = _encoder_bytes(work)
    stages = activations(work, count, fsdp=fsdp, checkpointing=checkpointing)
    return Memory(
        transformer=transformer,
        trained=model.trained * per_trained * share,
        encoders=0.0 if generator.offload else texts + vae,
        rewards=work.rewards.bytes + work.evaluators.bytes,
        trajectories=math.ceil(work.samples / count) * _sample_bytes(work),
        activations=max(stages.values()),
    )


def loading_ram(work: Workload) -> float:
    """Bytes of RAM while a pipeline is loaded: it is read as a whole before it goes to the device,
    also what is quantised; encoders that are offloaded are copied into pinned memory."""
    generator: Any = work.config.generator
    each = 4.0 if generator.dtype == "float32" else 2.0
    pinned = 4 / 3 if generator.offload else 1.0  # see generators.offload
    return work.transformer.parameters * each + sum(_encoder_bytes(work)) * pinned


def _encoder_bytes(work: Workload) -> tuple[float, float]:
    """Of the text encoders and of the VAE."""
    generator: Any = work.config.generator
    each = 4.0 if generator.dtype == "float32" else 2.0
    return work.encode.parameters * each, work.decode.parameters * each


def _transition_bytes(work: Workload) -> float:
    """Latents of one before and after a step in float32, and its mean if that is kept; of nft
    and awm the velocity by an old policy."""
    config = work.config
    is_forward = isinstance(config.algorithm, ForwardAlgorithm)
    kept = config.has_old_policy if is_forward else 2 + config.loss.needs_means
    return 4 * kept * work.transformer.latents


def _sample_bytes(work: Workload) -> float:
    """A sample's trained transitions, of which grpo alone keeps any, its final latents, picture."""
    rollout = work.config.rollout
    is_grpo = not isinstance(work.config.algorithm, ForwardAlgorithm)
    trajectory = rollout.num_trained_steps * _transition_bytes(work) if is_grpo else 0
    return trajectory + 4 * work.transformer.latents + _picture_bytes(work)


def _picture_bytes(work: Workload) -> float:
    return 4.0 * 3 * math.prod(work.size)


def activations(work: Workload, count: int, *, fsdp: bool, checkpointing: bool) -> dict[str, float]:
    """Bytes that each stage takes besides what stays; encoders that come for it included.

    Rewards score one batch while the next is sampled.
    """
    config, model = work.config, work.transformer
    generator: Any = config.generator
    images = math.ceil(work.samples / count)
    batch = min(config.rollout.batch_size or images, images)
    # Gradients to be balanced are of the whole rollout.
    updates = 1 if config.advantage.balance else config.train.inner_updates
    pairs = math.ceil(images / updates) * config.rollout.num_trained_steps
    micro = min(config.train.micro_batch_size or pairs, pairs)
    validated = config.evaluation.num_validation if config.evaluation.validate_every else 0
    shown = min(max(validated, NUM_SAMPLES), config.evaluation.batch_size)
    texts, vae = (b if generator.offload else 0.0 for b in _encoder_bytes(work))
    merged = 0.0 if fsdp else model.merged
    casts = 0.0 if checkpointing or (fsdp and config.lora is None) else model.casts
    prefix, group = model.prefix, config.rollout.group_size
    pair = model.checkpointed_peak if checkpointing else model.pair_peak
    shared = prefix.checkpointed_peak if checkpointing else prefix.pair_peak
    seen = math.ceil(micro / (group * config.rollout.num_trained_steps))  # prompts at once
    kept = work.guidance_passes * prefix.kept
    sampling = batch * model.forward_peak + math.ceil(batch / group) * kept + prefix.forward_peak
    decoding = vae + decoded_at_once(work.size) * work.decode.peak
    other = work.shown or work  # as pictures that are not trained on
    drawing = other.transformer.forward_peak + other.guidance_passes * other.transformer.prefix.kept
    scoring = min(batch, _REWARD_BATCH) * work.rewards.peak
    judged = max(validated, batch * (config.loss.kl_share < 1))
    validating = min(judged, _REWARD_BATCH) * max(work.rewards.peak, work.evaluators.peak)
    return {
        "encode": max(texts, vae) + work.encode.peak,
        "rollout": max(sampling + merged, decoding) + scoring,
        "pictures": max(
            shown * drawing + merged,
            vae + decoded_at_once(other.size) * other.decode.peak,
            validating,
        )
        + max(shown, validated) * _picture_bytes(other),
        # The sums of weights and adapters have gradients; the pairs are copies of the rollout's.
        "update": (micro * pair + seen * shared) * work.guidance_passes
        + 2 * merged
        + casts
        + pairs * _transition_bytes(work),
    }

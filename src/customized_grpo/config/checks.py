"""What the fields of a configuration demand of each other, and what its numbers mean."""

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from customized_grpo import registry
from customized_grpo.config.algorithms import (
    AwmAlgorithm,
    ForwardAlgorithm,
    GrpoAlgorithm,
    NftAlgorithm,
)
from customized_grpo.config.decoding import show, to_raw
from customized_grpo.config.limits import MOST_AT_ONCE
from customized_grpo.config.plugs import RewardConfig
from customized_grpo.config.schedules import (
    ConstantSchedule,
    CustomSchedule,
    MeasuredSchedule,
    TdwSchedule,
)
from customized_grpo.config.sections import AdvantageConfig, LossConfig, RunConfig
from customized_grpo.errors import ConfigError


def conflicts(config: RunConfig) -> Iterator[str]:
    """Yields a line for every pair of fields that cannot go together."""
    rollout, train, loss = config.rollout, config.train, config.loss
    yield from _step_conflicts(config)
    if rollout.dynamics == "cps" and rollout.noise_level > 1:
        yield (
            f"rollout.noise_level must be at most 1 for dynamics cps, got {rollout.noise_level}; "
            "its std is sin(a pi / 2)"
        )
    if (images := rollout.prompts_per_rollout * rollout.group_size) > MOST_AT_ONCE:
        yield (
            f"rollout.group_size must be at most {MOST_AT_ONCE:,} / prompts_per_rollout = "
            f"{MOST_AT_ONCE // rollout.prompts_per_rollout}, got {rollout.group_size}; all "
            f"{images:,} images of a rollout are in memory"
        )
    yield from _reward_conflicts(config.rewards)
    yield from _algorithm_conflicts(config)
    yield from _attention_conflicts(config)
    quantization = getattr(config.generator, "quantization", None)
    for name, value in (
        ("train.optimizer", train.optimizer),
        ("compile", config.compile),
        ("generator.quantization", quantization),
    ):
        if config.fsdp and value not in ("adamw", False, None):
            yield f"fsdp must be false with {name}, got {show(value)} there; it cannot be sharded"
    whole, takes = {
        "groups": ("prompts_per_rollout", "whole groups of its own"),
        "samples": ("group_size", "samples of its own of every group"),
    }[train.split]
    if getattr(rollout, whole) % train.inner_updates:
        yield (
            f"train.inner_updates must divide rollout.{whole} = {getattr(rollout, whole)} for "
            f"train.split {train.split}, got {train.inner_updates}; each update takes {takes}"
        )
    if train.split == "samples" and train.inner_updates == 1:
        yield (
            "train.split must be groups when train.inner_updates is 1, got samples; the one update "
            "takes everything: raise inner_updates"
        )
    if train.num_updates % train.inner_updates:
        yield (
            f"train.num_updates must be a multiple of train.inner_updates = {train.inner_updates}, "
            f"got {train.num_updates}; every rollout is used up"
        )
    if loss.ratio_norm and rollout.dynamics == "cps":
        yield (
            "loss.ratio_norm must be false for rollout.dynamics cps, got true; its log-probability "
            "has no variance to normalise by: take flow or dance, or loss.step_weight"
        )
    if loss.kl_mask is not None and train.inner_updates == 1:
        yield (
            f"loss.kl_mask must be null when train.inner_updates is 1, got {loss.kl_mask:g}; the "
            "policy is still the one that sampled, so it has no effect: raise inner_updates"
        )
    is_on_policy = train.inner_updates == 1 and loss.pin_ratio and loss.kl_mask is None
    if is_on_policy and loss.clip_range != LossConfig().clip_range:
        yield (
            "loss.clip_range must be left out when train.inner_updates is 1 and loss.pin_ratio "
            f"true, got {loss.clip_range:g}; the ratio is exactly 1, so there is nothing to clip: "
            "raise inner_updates"
        )
    if loss.kl_mask is not None and loss.clip_range != LossConfig().clip_range:
        yield (
            f"loss.clip_range must be left out with loss.kl_mask, got {loss.clip_range:g}; the "
            "mask takes the place of the clip"
        )
    if loss.ratio_norm and loss.step_weight == "noise":
        yield (
            "loss.step_weight must be none or equal with loss.ratio_norm, got noise; normalised "
            "ratios weigh the steps so already"
        )
    for name in ("kl_weight", "norm_weight"):
        if (weight := getattr(loss, name)) and config.lora is None:
            yield (
                f"loss.{name} must be 0 when lora is null, got {weight}; the reference is the "
                "model with its adapters switched off, so keep lora"
            )
    yield from _lora_conflicts(config)
    yield from _share_conflicts(config)
    if rollout.aspect_ratios and not hasattr(config.generator, "height"):
        yield (
            f"rollout.aspect_ratios must be empty for generator {config.generator.type}, got "
            f"{show(to_raw(rollout.aspect_ratios))}; it has no height"
        )
    for name, value in config.evaluation.of_generator().items():
        if not hasattr(config.generator, name):
            yield (
                f"evaluation.{name} must be null for generator {config.generator.type}, got "
                f"{value}; it has no {name}"
            )
    if config.evaluation.validate_every and not config.evaluators:
        yield (
            "evaluators must name a model when evaluation.validate_every is set, got none; add the "
            "models that draw the learning curve"
        )
    if config.faults.hacking != "warn" and not config.evaluation.validate_every:
        yield (
            f"faults.hacking must be warn when evaluation.validate_every is 0, got "
            f"{config.faults.hacking}; set validate_every, for validations show it"
        )
    if config.faults.hacking == "best" and not train.saves:
        yield (
            "faults.hacking must be warn or stop when train.save_every is 0, got best; there is no "
            "checkpoint to be the best: set save_every"
        )
    every, updates = config.evaluation.validate_every, train.inner_updates
    if config.faults.hacking == "best" and every and every % updates and updates % every:
        yield (
            f"evaluation.validate_every must be a multiple of train.inner_updates = {updates} for "
            f"faults.hacking best, got {every}; weights are kept at the end of a rollout, and the "
            "best are to be among those that were validated"
        )
    yield from groupwise_conflicts("evaluators", config.evaluators)
    yield from _size_conflicts(config)
    for section, plugs in (("rewards", config.rewards), ("evaluators", config.evaluators)):
        labels = [plug.label for plug in plugs]
        for i, label in enumerate(labels):
            if label in labels[:i]:
                yield f"{section}.{i}.name must be unique, got {label!r} twice; name one of them"
    types = [sink.type for sink in config.sinks]
    for i, type_ in enumerate(types):
        if type_ in types[:i]:
            yield f"sinks.{i}.type must be unique, got {type_!r} twice; remove one of them"
    yield from _advantage_conflicts(config.advantage, {r.objective for r in config.rewards})


def _reward_conflicts(rewards: Sequence[RewardConfig]) -> Iterator[str]:
    objectives = [reward.objective for reward in rewards]
    for place, reward in enumerate(rewards):
        if reward.weight != 1 and objectives.count(reward.objective) == 1:
            yield (
                f"rewards.{place}.weight must be left out for {reward.objective}'s only reward, "
                f"got {reward.weight:g}; it mixes the rewards of one objective. What identity and "
                "prompt weigh is advantage.schedule's, another objective advantage.extra_weights'"
            )


def _step_conflicts(config: RunConfig) -> Iterator[str]:
    """Steps of a trajectory need noise, which the last has none of; levels of noise do not."""
    rollout, is_forward = config.rollout, isinstance(config.algorithm, ForwardAlgorithm)
    is_ode, num_steps = rollout.dynamics == "ode", rollout.num_steps
    if is_forward and rollout.num_trained_steps > num_steps:
        yield (
            f"rollout.num_trained_steps must be at most num_steps = {num_steps}, got "
            f"{rollout.num_trained_steps}; lower it or raise rollout.num_steps"
        )
    elif not is_forward and rollout.num_trained_steps > num_steps - 1:
        yield (
            f"rollout.num_trained_steps must be at most num_steps - 1 = {num_steps - 1}, "
            f"got {rollout.num_trained_steps}; the last step is deterministic, lower it or raise "
            "rollout.num_steps"
        )
    elif rollout.window is not None:
        first, end = rollout.window
        last = num_steps if is_ode else num_steps - 1  # in a window, steps of others have noise
        if end > last or end - first < rollout.num_trained_steps:
            yield (
                f"rollout.window must hold num_trained_steps = {rollout.num_trained_steps} of the "
                f"steps 0 to {last - 1}, got [{first}, {end}]; the end is exclusive"
            )


def _algorithm_conflicts(config: RunConfig) -> Iterator[str]:
    """Deterministic pictures are for an algorithm that needs no log-probabilities, and what limits
    or weighs those is for one that does."""
    rollout, algorithm = config.rollout, config.algorithm
    is_ode, is_forward = rollout.dynamics == "ode", isinstance(algorithm, ForwardAlgorithm)
    if is_ode and not is_forward:
        yield (
            f"rollout.dynamics must be dance, flow or cps for algorithm {algorithm.type}, got ode; "
            "a step without noise has no log-probability"
        )
    if is_ode and rollout.shared_noise:
        yield (
            "rollout.shared_noise must be false for rollout.dynamics ode, got true; all pictures "
            "of a group would be the same"
        )
    if is_ode and isinstance(config.advantage.schedule, MeasuredSchedule):
        yield (
            "advantage.schedule.type must be another than measured for rollout.dynamics ode, got "
            "measured; there is no noise whose effect could be measured"
        )
    for name in ("clip_range", "kl_mask", "ratio_norm", "step_weight", "pin_ratio") * is_forward:
        default = getattr(LossConfig(), name)
        if (value := getattr(config.loss, name)) != default:
            own = f" (its clip is algorithm.{name})" * hasattr(algorithm, name)
            yield (
                f"loss.{name} must be left out for algorithm {algorithm.type}, got {show(value)}; "
                f"it is about the log-probabilities of steps, and {algorithm.type} has none{own}: "
                f"take it out of the file, or write --loss.{name} {show(default)}"
            )
    yield from _old_policy_conflicts(config)
    if not algorithm.is_affine and config.advantage.balance is not None:
        yield (
            f"advantage.balance must be null for algorithm {algorithm.type}, got "
            f"{show(to_raw(config.advantage.balance))}; its loss is not affine in the advantage, "
            "so it has no gradient for each objective: use grpo or nft"
        )
    if not isinstance(algorithm, (GrpoAlgorithm, ForwardAlgorithm)):
        yield (
            "algorithm.type must name a class derived from GrpoAlgorithm or ForwardAlgorithm, got "
            f"{algorithm.type}; they say what its losses are computed from"
        )


def _old_policy_conflicts(config: RunConfig) -> Iterator[str]:
    """What is about an older policy that samples needs one, and its memory has to grow."""
    algorithm = config.algorithm
    if not isinstance(algorithm, ForwardAlgorithm):
        return
    defaults = {f.name: f.default for f in fields(algorithm)}
    own = {NftAlgorithm: ("beta",), AwmAlgorithm: ("clip_range", "old_weight")}
    for name in own.get(type(algorithm), ()) if not config.has_old_policy else ():
        if (value := getattr(algorithm, name)) != defaults[name]:
            yield (
                f"algorithm.{name} must be left out for old_decay 0 and one update per rollout, "
                f"got {value:g}; the policy that sampled is the trained one"
            )
    rate = algorithm.old_decay_rate
    if not algorithm.old_decay and rate != defaults["old_decay_rate"]:
        yield (
            f"algorithm.old_decay_rate must be left out for old_decay 0, got {rate:g}; it is how "
            "fast the share grows up to old_decay"
        )
    if algorithm.old_decay and not rate:
        yield (
            f"algorithm.old_decay_rate must be above 0 for old_decay {algorithm.old_decay:g}, got "
            "0; the share would stay 0: set old_decay 0 if that is meant"
        )


def _share_conflicts(config: RunConfig) -> Iterator[str]:
    """A KL for some samples needs a KL, and evaluators that tell which."""
    share = config.loss.kl_share
    if share == 1:
        return
    if not config.loss.kl_weight:
        yield (
            f"loss.kl_share must be 1 when loss.kl_weight is 0, got {share:g}; there is no KL: set "
            "its weight"
        )
    if not config.evaluation.validate_every:
        yield (
            f"loss.kl_share must be 1 when evaluation.validate_every is 0, got {share:g}; the "
            "evaluators are not loaded: set validate_every"
        )
    trained = {reward.objective for reward in config.rewards}
    judged = {evaluator.objective for evaluator in config.evaluators}
    if not trained & judged:
        yield (
            f"loss.kl_share must be 1 when no evaluator is of an objective of the rewards, got "
            f"{share:g}; add one of {' or '.join(sorted(trained))}"
        )


def _lora_conflicts(config: RunConfig) -> Iterator[str]:
    """What a LoRA to start from has already, and whether the KL can be relative to it."""
    lora, loss = config.lora, config.loss
    path = None if lora is None else lora.path
    for name in ("rank", "alpha", "target_modules") if path is not None else ():
        if (value := getattr(lora, name)) is not None:
            yield (
                f"lora.{name} must be null with lora.path, got {show(to_raw(value))}; that LoRA "
                "has its own: leave it out, or replace the section by lora: {path: ...}"
            )
    if loss.kl_to == "start" and not (path and loss.needs_base):
        missing, fix = "without lora.path", "a new LoRA starts as the base"
        if path is not None:
            missing = "when loss.kl_weight and loss.norm_weight are 0"
            fix = "nothing is compared with the untrained model"
        yield f"loss.kl_to must be base {missing}, got start; {fix}"


def _attention_conflicts(config: RunConfig) -> Iterator[str]:
    """The field is that of the pipelines of diffusers; a generator of others may have none."""
    attention = getattr(config.generator, "attention", "auto")
    dtype = getattr(config.generator, "dtype", None)
    repeatable, in_half = ("auto", "sdpa", "math", "efficient"), ("cudnn", "flash", "flash_varlen")
    if config.deterministic and attention not in repeatable:
        yield (
            f"generator.attention must be one of {', '.join(repeatable)} with deterministic, got "
            f"{attention!r}; its backward pass adds in any order"
        )
    if attention in in_half and config.mixed_precision == "no" and dtype == "float32":
        yield (
            f"generator.attention must be of another kernel than {attention!r} in float32, which "
            "it cannot do; set mixed_precision bf16, or use sdpa"
        )


def _advantage_conflicts(advantage: AdvantageConfig, objectives: set[str]) -> Iterator[str]:
    shaping, schedule = advantage.shaping, advantage.schedule
    if (shaping == "custom") != (advantage.shaping_target is not None):
        yield (
            "advantage.shaping_target must be given for shaping custom, and for no other, got "
            f"{show(advantage.shaping_target)} for {shaping}; set both, or neither"
        )
        return
    try:
        has_bonus, has_score, has_sum = _parts(advantage.find_shaping())
    except ConfigError as error:
        yield str(error)
        return
    if advantage.gate_floor is not None and shaping != "gate":
        yield (
            f"advantage.gate_floor must be null for shaping {shaping}, got {advantage.gate_floor}; "
            "only gate has a floor"
        )
    if advantage.gamma is not None and not (has_bonus or has_score):
        yield (
            f"advantage.gamma must be null for shaping {shaping}, got {advantage.gamma}; it has no "
            "bonus to scale"
        )
    if advantage.center and (not has_bonus or shaping == "harmonic"):
        why = "its pole would move the whole group" if has_bonus else "it has no bonus to centre"
        yield f"advantage.center must be false for shaping {shaping}, got true; {why}"
    if isinstance(schedule, TdwSchedule) and schedule.start > schedule.end:
        yield (
            f"advantage.schedule.start must not be above end, got {schedule.start} and "
            f"{schedule.end}; both are paper steps, 0 to 25"
        )
    if isinstance(schedule, CustomSchedule):
        try:
            registry.import_object(schedule.target, "advantage.schedule.target")
        except ConfigError as error:
            yield str(error)
    if isinstance(schedule, MeasuredSchedule):
        most = MOST_AT_ONCE // schedule.num_prompts
        if schedule.num_samples > most:
            yield (
                f"advantage.schedule.num_samples must be at most {MOST_AT_ONCE:,} / num_prompts = "
                f"{most}, got {schedule.num_samples}; all images of a step are in memory"
            )
    if not has_sum and schedule != TdwSchedule():
        yield (
            f"advantage.schedule must be left out for shaping {shaping}, got "
            f"{show(to_raw(schedule))}; there is no weighted sum to schedule: take it out of the "
            "file, or write --advantage.schedule '{type: tdw}'"
        )
    if advantage.balance is not None and not (has_sum and len(objectives) > 1):
        why = "there is one objective" if has_sum else f"shaping {shaping} has no weighted sum"
        yield (
            f"advantage.balance must be null, got {show(to_raw(advantage.balance))}; {why}, so "
            "there is nothing to balance"
        )
    missing = {"identity", "prompt"} - objectives
    if missing and (has_bonus or has_score):
        yield (
            f"rewards must cover identity and prompt for shaping {shaping}, got none for "
            f"{' and '.join(sorted(missing))}; add one, or use shaping linear or gdpo"
        )
    elif len(missing) == 2:
        yield f"rewards must cover identity or prompt, got {sorted(objectives)}; add one"
    elif missing:
        share = 1.0 if missing == {"identity"} else 0.0
        if schedule != ConstantSchedule(prompt=share):
            yield (
                f"advantage.schedule must be {{type: constant, prompt: {share}}} when no reward "
                f"measures {missing.pop()}, got {show(to_raw(schedule))}; write it so"
            )
    extra = objectives - {"identity", "prompt"}
    if extra and shaping == "gate":
        yield (
            f"rewards must be of identity and prompt alone for shaping gate, got {sorted(extra)}; "
            "it trains on nothing else, make them evaluators"
        )
    if set(advantage.extra_weights) != extra:
        yield (
            f"advantage.extra_weights must name exactly the further objectives {sorted(extra)}, "
            f"got {sorted(advantage.extra_weights)}; give each a constant weight"
        )
    if (total := sum(advantage.extra_weights.values())) >= 1:
        yield (
            f"advantage.extra_weights must sum to less than 1, got {total:g}; identity and prompt "
            "share the rest"
        )


def groupwise_conflicts(section: str, plugs: Sequence[RewardConfig]) -> Iterator[str]:
    """Yields a line for every reward that scores groups where there are none."""
    for i, plug in enumerate(plugs):
        if plug.is_groupwise:
            yield (
                f"{section}.{i} must score single pictures, got {plug.label!r}, which ranks those "
                "of a group: that says nothing of a picture alone; make it one of a run's rewards, "
                "or take another criterion"
            )


def _size_conflicts(config: RunConfig) -> Iterator[str]:
    """Scores of a group, such as ranks, are as large in every group: what goes by their size learns
    nothing from them."""
    ranked = [reward.label for reward in config.rewards if reward.is_groupwise]
    is_measured = isinstance(config.advantage.schedule, MeasuredSchedule)
    by_size = [("shaping", "gate", config.advantage.shaping == "gate")]
    by_size.append(("schedule", "measured", is_measured))
    for name, value, is_chosen in by_size:
        if ranked and is_chosen:
            yield (
                f"advantage.{name} must not be {value} with reward {ranked[0]!r}, which scores the "
                "pictures of a group against each other, so that every group's scores are as "
                "large; take another one"
            )


def _parts(shaping: Any) -> tuple[bool, bool, bool]:
    """Whether a shaping has a bonus, a score of its own, and a weighted sum."""
    if isinstance(shaping, str):
        has_bonus = shaping not in ("linear", "gdpo", "gate")
        return has_bonus, shaping == "gate", shaping not in ("synergy_only", "gate")
    return shaping.bonus is not None, shaping.score is not None, shaping.weighted_sum


def explain_batch(config: RunConfig) -> str:
    """Explains the run's arithmetic of samples, groups, pairs and updates, in a few lines."""
    rollout, train = config.rollout, config.train
    images = rollout.prompts_per_rollout * rollout.group_size
    groups, samples = rollout.prompts_per_rollout, rollout.group_size
    if train.split == "groups":
        groups //= train.inner_updates
    else:
        samples //= train.inner_updates
    pairs = groups * samples * rollout.num_trained_steps
    passes = -(-pairs // (train.micro_batch_size or pairs))
    rollouts = train.num_updates // train.inner_updates
    lines = [
        f"rollout: {rollout.prompts_per_rollout} prompts x {rollout.group_size} samples = {images} "
        f"images, {rollout.num_steps} denoising steps each; samples of a prompt form a group.",
        f"update: {groups} groups x {samples} samples x {rollout.num_trained_steps} "
        f"trained steps = {pairs} (sample, step) pairs, in {passes} forward/backward "
        f"{'pass' if passes == 1 else 'passes'}, then 1 optimizer step.",
        f"run: {train.num_updates} updates / {train.inner_updates} per rollout = {rollouts} "
        f"{'rollout' if rollouts == 1 else 'rollouts'} = {rollouts * images} images.",
    ]
    schedule = config.advantage.schedule
    if isinstance(schedule, MeasuredSchedule):
        first, end = rollout.window or (0, rollout.num_steps - 1)
        prompts, samples = schedule.num_prompts, schedule.num_samples
        lines.insert(
            0,
            f"measured first: {end - first} steps x {prompts} prompts x {samples} samples = "
            f"{(end - first) * prompts * samples} images, for the weights of the steps.",
        )
    if isinstance(config.algorithm, ForwardAlgorithm):
        what = "pictures are noised anew at these steps' noise levels for the update."
        lines.append(f"{config.algorithm.type}: {what}")
    elif train.inner_updates == 1 and config.loss.pin_ratio:
        lines.append("ratio: 1 at every update (pinned, one update per rollout), as it should be.")
    return "\n".join(lines)

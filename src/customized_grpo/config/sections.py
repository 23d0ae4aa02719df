"""The sections of a run's configuration; the base classes of its plugs are in ``plugs``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from customized_grpo import registry
from customized_grpo.buckets import Ratio
from customized_grpo.config.algorithms import ForwardAlgorithm, GrpoAlgorithm
from customized_grpo.config.faults import FaultConfig
from customized_grpo.config.limits import (
    Count,
    EveryUpdates,
    FilePath,
    GroupSize,
    Minutes,
    NumSteps,
    NumUpdates,
    Rank,
    Seed,
    Side,
)
from customized_grpo.config.plugs import (
    AlgorithmPlug,
    DataPlug,
    GeneratorPlug,
    Plug,
    RewardPlug,
    SinkPlug,
)
from customized_grpo.config.schedules import (
    BalanceSettings,
    Decay,
    ImportPath,
    ScheduleConfig,
    TdwSchedule,
)
from customized_grpo.errors import ConfigError

OpenUnitInterval = Annotated[float, Field(gt=0, lt=1)]
_GAMMA, _GATE_GAMMA = 0.4, 5.0  # the released recipes, arXiv:2510.18263 and arXiv:2606.23950
_SAMPLE_MINUTES, _SAVE_MINUTES = 60.0, 15.0  # a grid costs more than a checkpoint

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters on the transformer, the only weights that are trained."""

    path: str | None = None
    """LoRA to go on from, with its modules, ranks and alphas: a safetensors file or its folder, of
    diffusers, PEFT, kohya, ai-toolkit, ComfyUI, or a run's weights; null = a new one."""

    rank: Rank | None = None
    """Rank of new adapters; null = 32. The paper uses 512 on FLUX."""

    alpha: PositiveFloat | None = None
    """Scale of new adapters is alpha / rank; null = rank, a scale of 1."""

    target_modules: tuple[str, ...] | None = None
    """Modules that get an adapter, by the end of their names, or, with `*` for any part, by whole
    names, such as blocks.*.proj_out; null = the generator's attention projections."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """How images are sampled for training."""

    num_steps: Annotated[NumSteps, Field(ge=2)] = 25
    """Denoising steps T of a trajectory (paper: 25)."""

    num_trained_steps: NumSteps = 14
    """Steps K trained per group, at most num_steps - 1; the last has no noise (paper: 14 of 24).
    For nft and awm levels of noise per sample, up to all num_steps."""

    window: tuple[NonNegativeInt, NumSteps] | None = None
    """Steps with noise, first and end (exclusive); only they can be trained, the others are
    deterministic (MixGRPO, arXiv:2507.21802). null = all but the last."""

    dynamics: Literal["dance", "flow", "cps", "ode"] = "dance"
    """SDE of a step: DanceGRPO's (the paper's), Flow-GRPO's or Flow-CPS's; ode = without noise, for
    algorithms nft and awm."""

    noise_level: PositiveFloat = 0.4
    """Noise of the SDE: eta of dance (paper: 0.4), a of flow (0.7) and cps (at most 1); of no
    effect for ode."""

    shift: PositiveFloat | None = None
    """Time shift of the noise schedule (paper: 3); null = the generator's own schedule."""

    group_size: GroupSize = 12
    """Samples G of one prompt, compared with each other (paper: 12)."""

    prompts_per_rollout: Count = 4
    """Prompts P, and so groups, of one rollout."""

    shared_noise: bool = True
    """Start all samples of a group from the same noise (paper: true)."""

    aspect_ratios: tuple[Ratio | Literal["reference"], ...] = ()
    """Shapes of the pictures, width:height, at the generator's area: each rollout has one of them,
    in random turns; reference = its first reference's. None = the generator's height and width."""

    batch_size: Count | None = None
    """Samples denoised together; null = the whole rollout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageConfig:
    """How the objectives' advantages become one number per sample and step."""

    shaping: Literal[
        "sars", "linear", "min", "max", "harmonic", "product", "synergy_only", "gdpo", "gate",
        "custom",
    ] = "sars"  # fmt: skip
    """Bonus on top of the weighted sum: the paper's SARS, one of its ablations, or your own; or, in
    place of both, gate: the prompt alone, less a penalty for too little identity (DivRL,
    arXiv:2606.23950)."""

    shaping_target: ImportPath | None = None
    """Import path of an `ops.Shaping` for shaping custom: `package.module:NAME`."""

    gamma: PositiveFloat | None = None
    """Strength of the bonus, null = the released recipe's 0.4; or of the penalty of gate, per
    squared unit of the identity reward, null = DivRL's 5. Not where there is neither."""

    gate_floor: float | None = None
    """Score of the identity reward below which gate punishes; null = the base's mean, in the first
    rollout. For gate alone."""

    center: bool = False
    """Subtract the group's mean bonus, which is below 0 (paper: false)."""

    clip: PositiveFloat = 5.0
    """Bound on the absolute advantage (paper: 5)."""

    schedule: ScheduleConfig = field(default_factory=TdwSchedule)
    """How identity and prompt share the weight: tdw, constant, linear, cosine, measured, custom."""

    balance: BalanceSettings | None = None
    """Multiply the weights so that the objectives' gradients make one step for all; null = not."""

    extra_weights: dict[str, PositiveFloat] = field(default_factory=dict)
    """Constant weights of objectives besides identity and prompt, which share what is left of 1."""

    def strength(self) -> float:
        """gamma, or the default of the shaping."""
        if self.gamma is not None:
            return self.gamma
        return _GATE_GAMMA if self.shaping == "gate" else _GAMMA

    def find_shaping(self) -> Any:
        """What `ops.shape_advantages` takes: the name of a built-in shaping, or your own.

        Raises:
            ConfigError: if there is no `Shaping` under `shaping_target`.
        """
        if self.shaping_target is None:
            return self.shaping
        from customized_grpo.ops import Shaping

        found = registry.import_object(self.shaping_target, "advantage.shaping_target")
        if not isinstance(found, Shaping):
            raise ConfigError(
                "advantage.shaping_target must name a customized_grpo.ops.Shaping, got "
                f"{self.shaping_target!r} = {found!r}; write NAME = Shaping(bonus=...)"
            )
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """The policy loss."""

    clip_range: OpenUnitInterval = 1e-4
    """PPO's clip of the ratio (paper: 1e-4; log-probs are means over dimensions)."""

    kl_mask: PositiveFloat | None = None
    """Instead of the clip: no gradient where a step's KL to the policy that sampled has reached
    this, 1e-5 for example, and would grow (Flow-DPPO, arXiv:2606.11025); null = the clip."""

    kl_weight: NonNegativeFloat = 0.0
    """Weight of the Gaussian KL to the untrained model, see kl_to (paper: 0); for algorithms nft
    and awm of the mean squared difference of the velocities (NFT's authors: 1e-4; AWM's: 1e-4,
    3e-3)."""

    kl_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """At least this share of a rollout's samples are those that the KL holds for, each as without
    it: those that rewards put higher in their group than evaluators do, by most (after GARDO,
    arXiv:2512.24138: 0.1); 1 = all. The evaluators are then not blind to the training."""

    kl_to: Literal["base", "start"] = "base"
    """The untrained model, of norm_weight too: base = without any LoRA; start = with the LoRA of
    lora.path, which stays in memory beside the trained one (4 bytes per weight of it)."""

    norm_weight: NonNegativeFloat = 0.0
    """Weight of a penalty on velocities longer than the untrained model's, by the share that they
    are longer (NormGuard, arXiv:2606.27771); 0 = none."""

    ratio_norm: bool = False
    """Normalise the log-ratios of the steps (GRPO-Guard, arXiv:2510.22319)."""

    step_weight: Literal["none", "noise", "equal"] = "none"
    """What a step's gradient counts: none = as it is, late steps most (paper), noise = times the
    noise of the step, late steps less so (TempFlow-GRPO, arXiv:2508.04324), equal = all alike."""

    pin_ratio: bool = True
    """The first update after a rollout takes its own log-probs as the old ones: ratio exactly 1."""

    @property
    def needs_means(self) -> bool:
        """Whether the loss compares a step's mean with the one it was sampled with."""
        return self.ratio_norm or self.kl_mask is not None

    @property
    def needs_base(self) -> bool:
        """Whether the loss compares the model with the untrained one."""
        return bool(self.kl_weight or self.norm_weight)

    def policy_only(self) -> LossConfig:
        """The same without the pull to the untrained model."""
        return replace(self, kl_weight=0.0, norm_weight=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The optimizer and its arithmetic."""

    num_updates: NumUpdates = 300
    """Optimizer steps of the run; a multiple of inner_updates."""

    inner_updates: Count = 1
    """Optimizer steps per rollout, each on its own share of it, see split."""

    split: Literal["groups", "samples"] = "groups"
    """What each of several updates takes: whole groups of its own, or samples of its own of every
    group (the released recipe). Advantages are those of whole groups either way."""

    micro_batch_size: Count | None = None
    """(sample, step) pairs per forward and backward; never changes the gradient; null = all.
    Where it does not fit a GPU's memory it is halved, for the rest of the run."""

    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"
    """adamw-8bit keeps AdamW's state in 8 bits (extra bitsandbytes): for training all weights."""

    learning_rate: PositiveFloat = 2e-5
    """AdamW's learning rate (paper: 2e-5)."""

    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's betas (paper: 0.9 0.999)."""

    weight_decay: NonNegativeFloat = 1e-4
    """AdamW's weight decay (paper: 1e-4)."""

    max_grad_norm: PositiveFloat = 1.0
    """Gradient norm above which the gradient is scaled down (paper: 1)."""

    ema_decay: Decay | None = None
    """Decay per update of an exponential moving average of the weights; null = none."""

    sample_every: EveryUpdates = 20
    """Updates between grids of sample pictures; 0 = only the first and the last, unless
    sample_minutes says more."""

    sample_minutes: Minutes | None = None
    """Minutes after which a grid comes though sample_every is not reached; 0 = not by minutes; null
    = 60, or 0 where sample_every is 0."""

    save_every: EveryUpdates = 50
    """Updates between checkpoints, which are written at the end of a rollout; 0 = none, unless
    save_minutes says so or the run is interrupted."""

    save_minutes: Minutes | None = None
    """Minutes after which a checkpoint comes though save_every is not reached, so that no more than
    that is lost, or one rollout; 0 = not by minutes; null = 15, or 0 where save_every is 0."""

    keep_checkpoints: Count = 2
    """How many of the newest stay; the best by the learning curve, if there is one, stays too."""

    def minutes(self, what: Literal["sample", "save"]) -> float:
        """What ``sample_minutes`` or ``save_minutes`` says, or stands for where it is null."""
        every, minutes = getattr(self, f"{what}_every"), getattr(self, f"{what}_minutes")
        default = _SAMPLE_MINUTES if what == "sample" else _SAVE_MINUTES
        return minutes if minutes is not None else default * (every > 0)

    @property
    def saves(self) -> bool:
        """Whether there are checkpoints besides those of interrupts."""
        return bool(self.save_every or self.minutes("save"))


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """What prompts and references became when they were encoded, of data that repeat."""

    num_examples: Annotated[int, Field(ge=1, le=10**9)] = 1024
    """Kept in memory (FLUX.1: about 6 MB each); the least recently used go first."""

    folder: FilePath | None = None
    """Keep them on disk too, for later runs; null = not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationConfig:
    """Deterministic sampling on held-out examples, base against tuned."""

    num_examples: Count = 128
    """Held-out examples."""

    num_steps: NumSteps | None = None
    """Denoising steps; null = rollout.num_steps."""

    guidance_scale: NonNegativeFloat | None = None
    """Guidance of all pictures that are not trained on; null = the generator's, as in training."""

    height: Side | None = None
    """Pixels of all pictures that are not trained on; null = the generator's, as in training."""

    width: Side | None = None
    """See height."""

    validate_every: EveryUpdates = 0
    """Updates between scores of validation examples in the log, the learning curve; 0 = none."""

    num_validation: Count = 128
    """Validation examples of the learning curve."""

    seed: Seed = 0
    """Seed of the starting noise, the same for base and tuned."""

    batch_size: Count = 64
    """Images sampled together."""

    classifier: str | None = None
    """A ResNetForImageClassification with labels 'attribute/value': tells whether what the prompt
    asks for is there, in data that say what that is; 'embedded:evaluator-attributes'."""

    def of_generator(self) -> dict[str, Any]:
        """Fields that the generator has too, and that differ here."""
        names = ("guidance_scale", "height", "width")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """Everything about a run."""

    name: FileName
    """Folder of the run under output_dir; letters, digits, dot, underscore and hyphen."""

    seed: Seed = 0
    """Seed of everything random; the same seed gives the same run on the same CPU, and with
    `deterministic` on the same GPU."""

    output_dir: FilePath = "runs"
    """Folder that holds the run folders."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto = cuda where there is one."""

    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16 = autocast of the model's forward and backward; SDE and losses stay float32."""

    deterministic: bool = False
    """Train on a GPU with kernels only that give the same bits each time, so that a seed and a
    resumed run do too; slower. On a CPU it is so anyway."""

    compile: bool = False
    """torch.compile the transformer's blocks: pays in long runs, after a minute of compilation, and
    another when lengths of pictures or texts first change; a CPU needs a C++ compiler."""

    fsdp: bool = False
    """Shard the transformer over the processes of torchrun (FSDP2), for models that do not fit one
    GPU: less memory, more communication. Alone, a process has nothing to share."""

    data: DataPlug
    """Where references and prompts come from."""

    generator: GeneratorPlug
    """The image generator that is trained."""

    rewards: Annotated[tuple[RewardPlug, ...], Field(min_length=1)]
    """The reward models that train it."""

    evaluators: tuple[RewardPlug, ...] = ()
    """Reward models that only evaluate; never trained on."""

    lora: LoraSettings | None = field(default_factory=LoraSettings)
    """Low-rank adapters; null = train all weights of the transformer."""

    algorithm: AlgorithmPlug = field(default_factory=GrpoAlgorithm)
    """How samples and their advantages become a gradient."""

    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How images are sampled for training."""

    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    """From rewards to advantages."""

    loss: LossConfig = field(default_factory=LossConfig)
    """The policy loss."""

    train: TrainConfig = field(default_factory=TrainConfig)
    """The optimizer and its arithmetic."""

    faults: FaultConfig = field(default_factory=FaultConfig)
    """What a run puts up with."""

    cache: CacheConfig = field(default_factory=CacheConfig)
    """Encoded prompts and references."""

    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Base against tuned on held-out examples."""

    sinks: tuple[SinkPlug, ...] = ()
    """Where numbers and sample pictures go besides the run folder, while the run goes on."""

    @property
    def pointwise_rewards(self) -> tuple[RewardPlug, ...]:
        """The rewards that can score a picture alone."""
        return tuple(reward for reward in self.rewards if not reward.is_groupwise)

    @property
    def has_old_policy(self) -> bool:
        """Whether older weights than those that are trained sample, or may have sampled.

        With one update per rollout and no memory, nft and awm train what samples.
        """
        if not isinstance(self.algorithm, ForwardAlgorithm):
            return False
        return bool(self.algorithm.old_decay) or self.train.inner_updates > 1

    def evaluated(self) -> RunConfig:
        """The same for a generator that is not trained: guided and sized as evaluation says."""
        own = self.evaluation.of_generator()
        plug: Any = self.generator
        evaluation = replace(self.evaluation, **dict.fromkeys(own))
        return replace(self, generator=replace(plug, **own), evaluation=evaluation)

    def plugs(self) -> dict[str, Plug]:
        """All plugs of the run by the section where they stand, such as ``rewards.0``."""
        lists = {name: getattr(self, name) for name in ("rewards", "evaluators", "sinks")}
        numbered = {f"{name}.{i}": p for name, plugs in lists.items() for i, p in enumerate(plugs)}
        single = {name: getattr(self, name) for name in ("data", "generator", "algorithm")}
        return single | numbered

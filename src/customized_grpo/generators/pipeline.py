"""What the adapters of all families share: loading, devices, references, guidance, weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import NonNegativeFloat
from torch import Tensor, nn

from customized_grpo.assets import check_finite, is_embedded, one_line, resolve_checkpoint
from customized_grpo.buckets import bucket_for
from customized_grpo.config import Checkpoint, GeneratorConfig, find_checkpoints
from customized_grpo.config.limits import Count, Side
from customized_grpo.errors import CheckpointError, ConfigError, DataError
from customized_grpo.generators.attention import Attention, check_attention, use_attention
from customized_grpo.generators.base import Conditioning
from customized_grpo.generators.lora import adapters_disabled, load_lora, save_lora
from customized_grpo.generators.lora_files import holds_lora
from customized_grpo.generators.offload import Offloaded
from customized_grpo.ops import shifted_sigmas
from customized_grpo.types import Example, crop_and_resize

Size = tuple[int, int]
"""Height and width in pixels."""

_DECODED_PIXELS = 2**20  # of the pictures that a VAE decodes at once


def decoded_at_once(size: Size) -> int:
    """How many pictures of a size a VAE decodes together; its memory grows with them."""
    return max(1, _DECODED_PIXELS // (size[0] * size[1]))


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineConfig(GeneratorConfig):
    """A checkpoint in diffusers format, how it is sampled, and how it is kept in memory."""

    is_guided_by_text: ClassVar[bool] = False
    """Whether a guidance_scale above 1 means a second pass with another prompt."""

    path: str
    """Folder or hub id of the checkpoint, or 'embedded:generator'."""
    height: Side | None = None
    """Pixels of the output; None: the checkpoint's native size."""
    width: Side | None = None
    """See height."""
    guidance_scale: NonNegativeFloat | None = None
    """The same in training and evaluation, unless that has its own; None: see the family."""
    max_sequence_length: Count | None = None
    """Text tokens per prompt, longer ones are cut; None: the tokenizer's limit."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the frozen weights; LoRA weights are always float32."""
    offload: bool = False
    """Keep text encoders and VAE on the CPU except while they work."""
    quantization: Literal["int8", "nf4"] | None = None
    """How the frozen transformer is kept under LoRA: int8 halves bfloat16's memory (extra torchao),
    nf4 quarters it (extra bitsandbytes, needs a GPU)."""
    attention: Attention = "auto"
    """Kernel of the transformer's attention. sdpa: torch chooses; math, efficient, cudnn: torch's;
    flash, flash_varlen, xformers: of these packages. auto: sdpa, on a CPU faster code of ours."""
    tile_vae: bool = False
    """Encode and decode pictures above the VAE's own size in tiles: less memory, faint seams."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time to train."""

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """See Plug."""
        return find_checkpoints(self, {"path": "pipeline"})

    def check(self) -> None:
        """See Plug: whether packages and GPU that quantization and attention need are there."""
        check_attention(self.attention)
        if self.quantization is not None:
            quantization_config(self.quantization)

    def reference_size(self, image: Size, target: Size, count: int, multiple: int) -> Size:
        """Pixels at which a reference, one of ``count``, is encoded: the target's area in its own
        aspect ratio."""
        return bucket_for(*image, target[0] * target[1], multiple)

    def picture_tokens(self, references: int) -> int:
        """Tokens of the references in the text encoder."""
        return 0

    def passes(self) -> int:
        """Passes of the transformer per velocity."""
        return 2 if self.is_guided_by_text and (self.guidance_scale or 0) > 1 else 1


def loading(config: PipelineConfig) -> AbstractContextManager[None]:
    """Whatever a damaged checkpoint raises inside, while it is loaded or read, is one line."""
    return one_line(
        f"path: {config.path!r} cannot be loaded as a checkpoint of {config.type} in diffusers "
        "format (a hub id needs network or an earlier download, and gated models a login; "
        "`cgrpo doctor CONFIG` tells which)"
    )


def load_pipeline(config: PipelineConfig, pipeline_class: Any, **components: Any) -> Any:
    """The stock pipeline from a folder or hub id, safetensors only; to be called in ``loading``.

    Raises:
        ConfigError: if weights are missing or not finite; of the libraries anything.
    """
    folder, dtype = resolve_checkpoint(config.path), getattr(torch, config.dtype)
    components = {**_text_encoders(pipeline_class, folder, dtype), **components}
    if config.quantization is not None:
        components["quantization_config"] = quantization_config(config.quantization)
    pipeline = pipeline_class.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, **components
    )
    check_components(pipeline, config)
    return pipeline


def check_components(pipeline: Any, config: PipelineConfig) -> None:
    """Raises a ConfigError if weights of a pipeline's models are missing or not finite."""
    for name, module in pipeline.components.items():
        if isinstance(module, nn.Module) and not (config.quantization and name == "transformer"):
            check_finite(module.state_dict(), f"path: {config.path!r}: {name}")


def _text_encoders(pipeline_class: Any, folder: str, dtype: torch.dtype) -> dict[str, Any]:
    """The transformers models of a pipeline."""
    import transformers

    encoders: dict[str, Any] = {}
    for name, entry in pipeline_class.load_config(folder).items():
        library, kind = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        cls = getattr(transformers, str(kind), None) if library == "transformers" else None
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            encoders[name] = load_text_encoder(cls, folder, name, dtype)
    return encoders


def load_text_encoder(cls: Any, source: str, name: str, dtype: torch.dtype) -> Any:
    """A model of transformers, which would fill weights that are missing at random; diffusers
    leaves them on the meta device.

    Raises:
        ConfigError: if weights are missing; of the libraries anything.
    """
    encoder, info = cls.from_pretrained(
        source, subfolder=name, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(f"path: {name}: must hold {missing[0]!r}, it is missing")
    return encoder


def quantization_config(kind: str) -> Any:
    """diffusers' settings of a ``quantization``.

    Raises:
        ConfigError: if its package or a GPU that it needs is missing.
    """
    from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig, TorchAoConfig

    try:
        if kind == "int8":
            from torchao.quantization import Int8WeightOnlyConfig

            how: Any = TorchAoConfig(Int8WeightOnlyConfig())
        else:
            import bitsandbytes  # noqa: F401

            how = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
    except ImportError as error:
        extra = "torchao" if kind == "int8" else "bitsandbytes"
        raise ConfigError(
            f"quantization: {kind!r} needs the extra package ({error}); "
            f"pip install 'customized-grpo[{extra}]'"
        ) from error
    if kind == "nf4" and not torch.cuda.is_available():
        raise ConfigError("quantization: 'nf4' needs a GPU, and none is visible; use 'int8'")
    return PipelineQuantizationConfig(quant_mapping={"transformer": how})


class PipelineGenerator(ABC):
    """Adapter over a stock pipeline; latents are packed ``[B, S, C]``, S the target's tokens."""

    lora_targets: tuple[str, ...] = (
        "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"
    )  # fmt: skip
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    latents_per_token: ClassVar[int] = 2
    """On a side."""
    tokens_per_step: ClassVar[int] = 1
    """By how many tokens at once a side of a picture grows."""
    max_references: int = 1

    def __init__(
        self, pipeline: Any, config: PipelineConfig, device: torch.device, native_size: int
    ) -> None:
        self.pipeline, self.config, self.device = pipeline, config, device
        self.transformer: nn.Module = pipeline.transformer.eval()
        self._guidance = self._check_guidance(config.guidance_scale)
        if config.gradient_checkpointing:
            pipeline.transformer.enable_gradient_checkpointing()
        use_attention(pipeline.transformer, config.attention)
        if config.tile_vae:
            pipeline.vae.enable_tiling()
        self.patch: int = self.latents_per_token * pipeline.vae_scale_factor
        self.multiple: int = self.tokens_per_step * self.patch
        self.height, self.width = native_size, native_size
        self._set_size(config.height, config.width)
        pipeline.transformer.to(device)
        self._offloaded: dict[tuple[str, ...], Offloaded] = {}
        for names in (self.text_encoders, ("vae",)):
            modules = [getattr(pipeline, name) for name in names]
            if config.offload:
                self._offloaded[names] = Offloaded(modules, device)
            else:
                for module in modules:
                    module.to(device)

    def guided(self, scale: float) -> Self:
        """See Guidable."""
        other = copy(self)
        other.config = replace(self.config, guidance_scale=scale)
        other._guidance = other._check_guidance(scale)
        return other

    def sized(self, height: int | None, width: int | None) -> Self:
        """See Sizable."""
        other = copy(self)
        other._set_size(height, width)
        other.config = replace(self.config, height=other.height, width=other.width)
        return other

    def shaped(self, height: int, width: int) -> Self:
        """See Sizable."""
        area = self.height * self.width
        return self.sized(*bucket_for(height, width, area, self.multiple))

    def _set_size(self, height: int | None, width: int | None) -> None:
        native, step = self.height, self.multiple
        for name, value in (("height", height), ("width", width)):
            if value is None:
                continue
            if is_embedded(self.config.path) and value != native:
                raise ConfigError(
                    f"{name}: must be {native} for {self.config.path}, which has seen no other "
                    f"pictures, got {value}; leave it out"
                )
            if value % step:
                near = " or ".join(str(n * step) for n in (value // step, -(-value // step)) if n)
                raise ConfigError(
                    f"{name}: must be a multiple of {step}, which VAE and transformer divide a "
                    f"picture into, got {value}; write {near}"
                )
            setattr(self, name, value)

    def _check_guidance(self, scale: float | None) -> float | None:
        """The guidance as ``_predict`` takes it, if the checkpoint does; None is without."""
        return scale if self.config.passes() == 2 else None

    @property
    def grid(self) -> Size:
        """Rows and columns of the target's tokens."""
        return self.height // self.patch, self.width // self.patch

    def check(self, example: Example) -> None:
        """See the Protocol."""
        count = len(example.references)
        if not 1 <= count <= self.max_references:
            takes = "exactly one reference" if self.max_references == 1 else (
                f"1 to {self.max_references} references"
            )  # fmt: skip
            raise DataError(
                f"example {example.id!r}: {self.config.type} takes {takes}, got {count}"
            )

    @torch.no_grad()
    def encode(self, examples: Sequence[Example]) -> Conditioning:
        """See the Protocol. References of other shapes lose a margin to the nearest allowed one."""
        for example in examples:
            self.check(example)
        with self._at_work(*self.text_encoders):  # one at a time: many at once fill a GPU
            texts = [self._encode_text(example) for example in examples]
        with self._at_work("vae"):
            pictures = [self._encode_references(example) for example in examples]
        return Conditioning.stack(
            [
                Conditioning(
                    per_sample={**text, "reference_latents": latents},
                    shared={**shared, **positions},
                )
                for (text, shared), (latents, positions) in zip(texts, pictures, strict=True)
            ]
        )

    def _encode_references(self, example: Example) -> tuple[Tensor, dict[str, Tensor]]:
        """Packed latents ``[1, s, C]`` of all references, and the positions with the target's."""
        images = [self._sized(image, len(example.references)) for image in example.references]
        latents = [self._encode_images(image[None].to(self.device)) for image in images]
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        return torch.cat(latents, 1), self._positions(sizes)

    def _sized(self, reference: Tensor, count: int) -> Tensor:
        return crop_and_resize(reference, *self._size_of(reference, count))

    def _size_of(self, reference: Tensor, count: int) -> Size:
        """At which a reference, one of ``count``, is encoded."""
        _, height, width = reference.shape
        target = self.height, self.width
        return self.config.reference_size((height, width), target, count, self.multiple)

    def sigmas(self, num_steps: int, shift: float | None) -> Tensor:
        """See the Protocol; the default is the pipeline's own schedule at this size."""
        if shift is not None:
            return shifted_sigmas(num_steps, shift)
        import numpy as np

        ours = self.pipeline.scheduler  # set_timesteps changes a scheduler: a copy is asked
        scheduler = type(ours).from_config(ours.config)
        scheduler.set_timesteps(
            sigmas=np.linspace(1.0, 1 / num_steps, num_steps), mu=self._mu(num_steps)
        )
        return scheduler.sigmas.float()

    def noise(self, count: int, rng: torch.Generator) -> Tensor:
        """See the Protocol."""
        (rows, columns), side = self.grid, self.latents_per_token
        channels = self.pipeline.transformer.config.in_channels // side**2
        spatial = torch.randn(count, channels, side * rows, side * columns, generator=rng)
        return self._pack(spatial).to(self.device)

    def velocity(self, latents: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See the Protocol."""
        reference = conditioning.per_sample["reference_latents"]
        hidden = torch.cat([latents, reference.to(latents.dtype)], 1)
        # Latents are float32 for the sake of the SDE; the transformer takes its own precision only.
        if not torch.is_autocast_enabled(latents.device.type):
            dtype = self.pipeline.transformer.dtype
            hidden, conditioning = hidden.to(dtype), conditioning.cast(dtype)
        return self._predict(hidden, sigma, conditioning)[:, : latents.shape[1]].float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See the Protocol.

        In the VAE's own precision, as in the stock pipeline: autocast, which it is called under,
        would compute the norms of one in bfloat16 in float32 on a GPU.
        """
        kind, is_half = latents.device.type, self.pipeline.vae.dtype != torch.float32
        exact = torch.autocast(kind, enabled=False) if is_half else nullcontext()
        parts = latents.split(decoded_at_once((self.height, self.width)))
        with self._at_work("vae"), exact:
            images = [self._decode(part).float() for part in parts]
        return (torch.cat(images) / 2 + 0.5).clamp(0, 1)

    def base_policy(self) -> AbstractContextManager[None]:
        """See the Protocol."""
        return adapters_disabled(self.transformer)

    def save_weights(self, folder: Path) -> None:
        """See the Protocol: a LoRA file, or the whole transformer after full fine-tuning."""
        if getattr(self.transformer, "peft_config", None):
            save_lora(type(self.pipeline), self.transformer, folder)
        else:
            self.pipeline.transformer.save_pretrained(folder / "transformer")

    def load_weights(self, folder: Path) -> None:
        """See the Protocol; a LoRA may be anyone's, in a folder or as a file, see ``lora_files``.

        Raises:
            CheckpointError: if they are missing, damaged or of another model.
        """
        saved = folder / "transformer"
        if holds_lora(folder) or not saved.is_dir():
            load_lora(self.transformer, folder)
            return
        with one_line(f"{saved}: cannot be loaded as the weights of a run", CheckpointError):
            tuned = type(self.pipeline.transformer).from_pretrained(saved, use_safetensors=True)
            check_finite(tuned.state_dict(), str(saved), CheckpointError)
            self.transformer.float().load_state_dict(tuned.state_dict())

    def _at_work(self, *names: str) -> AbstractContextManager[None]:
        """Encoders on the device inside, and away again afterwards if they are offloaded."""
        return self._offloaded[names].at_work() if self.config.offload else nullcontext()

    @abstractmethod
    def _encode_text(self, example: Example) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Per-sample ``[1, ...]`` and shared conditioning by the prompt."""

    @abstractmethod
    def _encode_images(self, images: Tensor) -> Tensor:
        """Packed latents ``[B, s, C]`` of images ``[B, 3, h, w]`` in [0, 1]."""

    @abstractmethod
    def _positions(self, sizes: Sequence[Size]) -> dict[str, Tensor]:
        """Position ids of target and references, as the transformer takes them."""

    @abstractmethod
    def _mu(self, num_steps: int) -> float:
        """Shift of the schedule, in the scheduler's terms."""

    @abstractmethod
    def _pack(self, latents: Tensor) -> Tensor:
        """``[B, C, h, w]`` -> ``[B, h w / n, n C]`` with n latents a token."""

    @abstractmethod
    def _predict(self, hidden: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The transformer's output ``[B, S + s, C]``, guided where the family has guidance."""

    @abstractmethod
    def _decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` in [-1, 1] of packed latents."""

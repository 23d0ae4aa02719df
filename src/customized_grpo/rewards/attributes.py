"""Is what the prompt asks for in the picture? A classifier says so, no reward and no evaluator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from customized_grpo.assets import resolve_checkpoint
from customized_grpo.errors import ConfigError
from customized_grpo.rewards.preprocess import Preprocessing
from customized_grpo.types import Example


class AttributeClassifier:
    """A ResNetForImageClassification whose labels are 'attribute/value'.

    The logits of one attribute are a softmax of their own; the value 'none' is what an attribute
    has that the prompt does not ask for.
    """

    def __init__(self, model: Any, preprocess: Preprocessing) -> None:
        self._model, self._preprocess = model, preprocess
        self._places: dict[str, dict[str, int]] = {}
        for index, label in sorted(model.config.id2label.items()):
            attribute, _, value = label.partition("/")
            self._places.setdefault(attribute, {})[value] = index

    @classmethod
    def load(cls, path: str, device: torch.device) -> AttributeClassifier:
        """From a folder, a hub id or 'embedded:evaluator-attributes'.

        Raises:
            ConfigError: if there is no such checkpoint, or its labels are of another kind.
        """
        from transformers import ResNetForImageClassification

        try:
            folder = resolve_checkpoint(path)
        except ConfigError as error:
            reason = str(error).removeprefix("path: ")
            raise ConfigError(f"evaluation.classifier: {reason}") from error
        try:
            model = ResNetForImageClassification.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"evaluation.classifier: {path!r} is not a ResNetForImageClassification "
                f"checkpoint: {' '.join(str(error).split())}"
            ) from error
        labels = list(model.config.id2label.values())  # pyright: ignore
        if odd := [label for label in labels if "/" not in label]:
            raise ConfigError(
                f"evaluation.classifier: labels must be 'attribute/value', got {odd[0]!r} in "
                f"{path!r}"
            )
        model = model.to(device).eval().requires_grad_(False)  # pyright: ignore
        return cls(model, Preprocessing.from_pretrained(folder))

    @torch.no_grad()
    def hits(self, images: Tensor, examples: Sequence[Example]) -> dict[str, Tensor]:
        """``attribute/NAME`` -> ``[B]``: 1 = found, 0 = not, NaN = not asked for."""
        logits = self._model(self._preprocess(images)).logits
        hits: dict[str, Tensor] = {}
        for attribute, places in self._places.items():
            values = list(places)
            chosen = logits[:, list(places.values())].argmax(1).tolist()
            wanted = [example.attributes.get(attribute, "none") for example in examples]
            if all(want == "none" for want in wanted):
                continue
            hits[f"attribute/{attribute}"] = torch.tensor(
                [
                    torch.nan if want == "none" else float(values[got] == want)
                    for want, got in zip(wanted, chosen, strict=True)
                ]
            )
        return hits

"""Is what the prompt asks for in the picture? A classifier says so, no reward and no evaluator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from customized_grpo.assets import one_line
from customized_grpo.errors import ConfigError
from customized_grpo.rewards.loading import load_model
from customized_grpo.rewards.preprocess import Preprocessing, blank
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
        """Loads one from a folder, a hub id or 'embedded:evaluator-attributes'.

        Raises:
            ConfigError: if there is no such checkpoint, or its labels are of another kind.
        """
        from transformers import ResNetForImageClassification

        model = load_model(ResNetForImageClassification, path, device, "evaluation.classifier")
        labels = list(model.config.id2label.values())
        if odd := [label for label in labels if "/" not in str(label)]:
            raise ConfigError(
                f"evaluation.classifier: labels must be 'attribute/value', got {odd[0]!r} in "
                f"{path!r}"
            )
        classifier = cls(model, Preprocessing.from_pretrained(path, "evaluation.classifier"))
        with one_line(f"evaluation.classifier: {path!r} does not work"), torch.no_grad():
            classifier._logits(blank(device))[:, list(model.config.id2label)]
        return classifier

    def _logits(self, images: Tensor) -> Tensor:
        return self._model(self._preprocess(images)).logits

    @torch.no_grad()
    def hits(self, images: Tensor, examples: Sequence[Example]) -> dict[str, Tensor]:
        """``attribute/NAME`` -> ``[B]``: 1 = found, 0 = not, NaN = not asked for."""
        logits = self._logits(images)
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

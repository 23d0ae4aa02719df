"""What is asked of the playground, checked before it is drawn; and what comes out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from customized_grpo.config.decoding import is_clean
from customized_grpo.data.images import KEPT_PIXELS, Picture, check_pictures, opened
from customized_grpo.errors import ConfigError, DataError
from customized_grpo.generators.lora_files import holds_lora
from customized_grpo.runs.checkpoint import WEIGHTS
from customized_grpo.runs.files import checkpoint_folders, finished_updates
from customized_grpo.tools.generate import Target
from customized_grpo.types import Example

MOST_SEEDS = 2**32
MOST_STRENGTH = 2.0
MOST_LETTERS = 2000
_WHERE = "reference picture"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedWeights:
    """Weights that a run has written."""

    label: str
    """Says when."""
    folder: Path
    is_lora: bool
    """Whether its strength can be chosen; known also when a run under way has deleted it."""


def list_trained(run: Path | None, target: Target) -> tuple[TrainedWeights, ...]:
    """All weights of a run, the last are its end's; or those that came with a config, or none.

    The checkpoint of a run's last update is left out: it is the end.
    """
    if run is None:
        found = {} if target.weights is None else {"trained": target.weights}
    else:
        found = {f"after update {int(f.name)}": f / WEIGHTS for f in checkpoint_folders(run)}
        if (end := run / WEIGHTS).is_dir():
            last = target.config.train.num_updates
            kept = finished_updates(run) or last
            found.pop(f"after update {kept}", None)
            found["at the end of training" if kept == last else f"kept, of update {kept}"] = end
    return tuple(
        TrainedWeights(label=label, folder=folder, is_lora=is_lora)
        for label, folder in found.items()
        # A run under way deletes its old ones meanwhile.
        if (is_lora := holds_lora(folder)) or (folder / "transformer").is_dir()
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawRequest:
    """Draw this by the base and, if there are some, with these weights."""

    example: Example
    seed: int
    trained: TrainedWeights | None
    strength: float


def read_request(
    picture: Path | None,
    prompt: str,
    seed: object,
    trained: TrainedWeights | None = None,
    strength: object = 1.0,
    subject: str = "",
) -> DrawRequest:
    """What someone has filled in, with the picture's pixels.

    Raises:
        DataError: if picture or prompt cannot be used.
        ConfigError: if a number cannot.
    """
    pixels = check_picture(picture).load()
    prompt = _check_prompt(prompt)
    digest = hashlib.sha256(f"{prompt}\n{subject}\n{tuple(pixels.shape)}\n".encode())
    digest.update(pixels.numpy().tobytes())
    example = Example(
        id=digest.hexdigest(), prompt=prompt, references=(pixels,), subject=subject.strip()
    )
    if not isinstance(strength, int | float) or not math.isfinite(strength):
        raise ConfigError(f"LoRA strength: must be a number, 1 is as trained, got {strength}")
    return DrawRequest(
        example=example, seed=_check_seed(seed), trained=trained, strength=float(strength)
    )


def check_picture(path: Path | None) -> Picture:
    """A picture that can be read to its end; messages name the file, not its folder.

    Raises:
        DataError: if it cannot, or there is none.
    """
    if path is None:
        raise DataError(f"{_WHERE}: must be given, got none; upload one or take an example")
    try:
        return check_pictures({(path, "RGB"): _WHERE})[path, "RGB"]
    except DataError as error:
        raise DataError(str(error).replace(str(path), path.name)) from error


def describe_picture(path: Path) -> str:
    """Size of a checked picture, and what is done to it."""
    picture = check_picture(path)
    with opened(path, _WHERE) as image:
        notes = [f"{image.width} x {image.height} px"]
        if getattr(image, "is_animated", False):
            notes.append("it is animated: only the first frame is used")
        if image.has_transparency_data:
            notes.append("transparent parts become white")
    if picture.height * picture.width < image.width * image.height:
        notes.append(f"reduced to {picture.width} x {picture.height} ({KEPT_PIXELS:,} px are used)")
    return f"{path.name}: {'; '.join(notes)}"


def _check_prompt(prompt: str) -> str:
    prompt = prompt.strip()
    if not prompt or not is_clean(prompt):
        raise DataError("prompt: must say what to show, got nothing; for example 'on the beach'")
    if len(prompt) > MOST_LETTERS:
        raise DataError(
            f"prompt: must have at most {MOST_LETTERS} characters, got {len(prompt)}; shorten it"
        )
    return prompt


def _check_seed(seed: object) -> int:
    if isinstance(seed, float) and seed.is_integer():  # browsers know no others
        seed = int(seed)
    if not isinstance(seed, int) or not 0 <= seed < MOST_SEEDS:
        raise ConfigError(f"seed: must be a whole number from 0 to 2^32 - 1, got {seed}")
    return seed


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """A picture and what the reward models say of it."""

    image: Image.Image
    """In 8 bits, as ``cgrpo generate`` writes it."""
    scores: Mapping[str, float]
    """Reward -> score; NaN = could not be scored."""
    errors: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The answer to a request."""

    request: DrawRequest
    base: Drawn
    tuned: Drawn | None = None
    change: Mapping[str, float] = field(default_factory=dict)
    """Objective -> tuned - base, the mean of its rewards' by their weights; may be NaN."""
    spread: Mapping[str, float] = field(default_factory=dict)
    """Objective -> how much the pictures of a rollout differ in it; {}: not known."""

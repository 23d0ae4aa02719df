"""What is asked of the playground, checked before it waits in the queue; and what comes out."""

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
from customized_grpo.generators.lora import LORA_FILE
from customized_grpo.runs.checkpoint import WEIGHTS, checkpoint_folders
from customized_grpo.tools.generate import Model
from customized_grpo.types import Example

MOST_SEEDS = 2**32
MOST_STRENGTH = 2.0
MOST_LETTERS = 2000
_WHERE = "reference picture"


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """Weights that a run has written."""

    label: str
    """Says when."""
    folder: Path
    is_lora: bool
    """Whether its strength can be chosen; known also when a run under way has deleted it."""
    stamp: tuple[tuple[int, int], ...]
    """When each file was last written, and its size: other weights have another one."""


def list_trained(target: Path, model: Model) -> tuple[Trained, ...]:
    """All weights of a run, the last are its end's; or those that came with a config, or none.

    The checkpoint of a run's last update is left out: it is the end.
    """
    if not target.is_dir():
        found = {} if model.weights is None else {"trained": model.weights}
    else:
        found = {f"after update {int(f.name)}": f / WEIGHTS for f in checkpoint_folders(target)}
        if (end := target / WEIGHTS).is_dir():
            found.pop(f"after update {model.config.train.num_updates}", None)
            found["at the end of training"] = end
    listed = (_listed(label, folder) for label, folder in found.items())
    return tuple(trained for trained in listed if trained is not None)


def _listed(label: str, folder: Path) -> Trained | None:
    """None where there are no weights, or no more: a run under way deletes its old ones."""
    lora = folder / LORA_FILE
    is_lora = lora.exists()
    files = [lora] if is_lora else sorted((folder / "transformer").glob("*.safetensors"))
    try:
        stamp = tuple((found.st_mtime_ns, found.st_size) for found in map(Path.stat, files))
    except FileNotFoundError:
        return None
    return Trained(label=label, folder=folder, is_lora=is_lora, stamp=stamp) if stamp else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Draw this by the base and, if there are some, with these weights."""

    example: Example
    seed: int
    trained: Trained | None
    strength: float


def read_request(
    picture: Path | None,
    prompt: str,
    seed: object,
    trained: Trained | None = None,
    strength: object = 1.0,
    subject: str = "",
) -> Request:
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
    return Request(
        example=example,
        seed=_check_seed(seed),
        trained=trained,
        strength=_check_strength(strength),
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
        notes = [f"{image.width} x {image.height} px", *_changes(image)]
    if picture.height * picture.width < image.width * image.height:
        notes.append(f"reduced to {picture.width} x {picture.height} ({KEPT_PIXELS:,} px are used)")
    return f"{path.name}: {'; '.join(notes)}"


def _changes(image: Image.Image) -> list[str]:
    notes = []
    if getattr(image, "is_animated", False):
        notes.append("it is animated: only the first frame is used")
    if image.has_transparency_data:
        notes.append("transparent parts become white")
    return notes


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


def _check_strength(strength: object) -> float:
    if not isinstance(strength, int | float) or not math.isfinite(strength):
        raise ConfigError(f"LoRA strength: must be a number, 1 is as trained, got {strength}")
    return float(strength)


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """A picture and what the reward models say of it."""

    image: Image.Image
    """In 8 bits, as ``cgrpo generate`` writes it."""
    scores: Mapping[str, float]
    """Reward -> score; NaN = could not be scored."""
    errors: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The answer to a request."""

    request: Request
    base: Drawn
    tuned: Drawn | None = None
    change: Mapping[str, float] = field(default_factory=dict)
    """Objective -> tuned - base, the mean of its rewards' by their weights; may be NaN."""

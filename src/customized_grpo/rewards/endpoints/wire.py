"""The body of ``POST /score``: pictures and texts as one safetensors file.

docs/remote_rewards.md describes the protocol for servers written by others. Every picture of an
example is sent once, however many images of the batch belong to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from customized_grpo.config.plugs import adapter
from customized_grpo.rewards.base import distinct
from customized_grpo.types import Example

VERSION = 1
CONTENT_TYPE = "application/x-safetensors"

Pixels = Literal["float32", "uint8"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a server takes; part of ``GET /rewards``."""

    max_images: int = 64
    """Images of one request, and of one call of the reward."""
    max_side: int = 4096
    """Pixels of the longest side of any picture."""
    max_bytes: int = 512 * 2**20
    """Length of a request's body."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WireExample:
    """An example without its pictures."""

    id: str
    prompt: str
    subject: str
    num_references: Annotated[int, Field(ge=1)]
    has_masks: bool
    reference_subjects: list[str] | None = None
    """Words for the subject of each reference; left out where all show ``subject``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """The JSON of a request."""

    version: int
    reward: str
    examples: list[WireExample]
    example_of: list[Annotated[int, Field(ge=0)]]
    """For each image the place of its example."""


class BadRequest(Exception):
    """A body that is not a valid request; the text says what is wrong, ``status`` how."""

    def __init__(self, text: str, status: int = 422) -> None:
        super().__init__(text)
        self.status = status


def encode_request(
    reward: str, images: Tensor, examples: Sequence[Example], pixels: Pixels = "float32"
) -> bytes:
    """Body for images ``[B, 3, H, W]`` in [0, 1] and their examples."""
    unique, place = distinct(examples)
    tensors = {"images": images}
    for number, example in enumerate(unique):
        masks = example.reference_masks or ()
        for kind, pictures in (("reference", example.references), ("mask", masks)):
            tensors |= {f"{kind}.{number}.{i}": picture for i, picture in enumerate(pictures)}
    header = {
        "version": VERSION,
        "reward": reward,
        "examples": [
            {
                "id": example.id,
                "prompt": example.prompt,
                "subject": example.subject,
                "num_references": len(example.references),
                "has_masks": example.reference_masks is not None,
                **_subjects(example),
            }
            for example in unique
        ],
        "example_of": place.tolist(),
    }
    packed = {name: _pack(picture, pixels) for name, picture in tensors.items()}
    return safetensors.torch.save(packed, {"request": json.dumps(header)})


def _subjects(example: Example) -> dict[str, list[str]]:
    several = list(example.reference_subjects)
    return {"reference_subjects": several} if several else {}


def _pack(picture: Tensor, pixels: Pixels) -> Tensor:
    picture = picture.detach().to("cpu", torch.float32)
    if pixels == "uint8":
        return (picture * 255).round().clamp(0, 255).byte().contiguous()
    # A copy: safetensors refuses pictures that share memory, such as one photo of two examples.
    return picture.clone(memory_format=torch.contiguous_format)


def decode_request(body: bytes, limits: Limits) -> tuple[str, Tensor, list[Example]]:
    """Name of the reward, images ``[B, 3, H, W]`` float32 in [0, 1] and their examples.

    An example's id is the client's and a digest of its content: clients that use one id for
    different things do not meet in a reward's cache.

    Raises:
        BadRequest: with the first thing that is wrong.
    """
    header = read_header(body)
    try:
        tensors = safetensors.torch.load(body)
    except (SafetensorError, KeyError) as error:
        raise BadRequest(f"body: must be a safetensors file, got: {error}", 400) from error
    images = _take(tensors, "images", 4, 3, limits)
    if len(images) > limits.max_images:
        raise BadRequest(
            f"images: at most {limits.max_images} in a request, got {len(images)}", 413
        )
    if len(header.example_of) != len(images):
        raise BadRequest(
            f"example_of: must have one entry per image, {len(images)}, got "
            f"{len(header.example_of)}"
        )
    if max(header.example_of) >= len(header.examples):
        raise BadRequest(
            f"example_of: must be below the number of examples, {len(header.examples)}, got "
            f"{max(header.example_of)}"
        )
    examples = [_example(tensors, i, listed, limits) for i, listed in enumerate(header.examples)]
    if tensors:
        raise BadRequest(f"tensors: {min(tensors)!r} belongs to no example")
    return header.reward, images, [examples[place] for place in header.example_of]


def read_header(body: bytes) -> Header:
    """The JSON in a safetensors file's metadata, checked.

    Raises:
        BadRequest: if there is none, or of another version of the protocol.
    """
    length = int.from_bytes(body[:8], "little")
    try:
        raw = json.loads(json.loads(body[8 : 8 + length])["__metadata__"]["request"])
        version = raw["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadRequest(
            "body: must be a safetensors file with the JSON of the request, and its version, in "
            "its metadata under 'request'",
            400,
        ) from error
    if version != VERSION:
        raise BadRequest(f"version: this server speaks {VERSION}, got {version!r}", 400)
    try:
        return adapter(Header).validate_json(json.dumps([raw]))[0]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        raise BadRequest(f"{where}: {first['msg']}") from error


def _example(
    tensors: dict[str, Tensor], number: int, listed: WireExample, limits: Limits
) -> Example:
    places = range(listed.num_references)
    references = [_take(tensors, f"reference.{number}.{i}", 3, 3, limits) for i in places]
    masks = None
    if listed.has_masks:
        masks = [_take(tensors, f"mask.{number}.{i}", 3, 1, limits) for i in places]
        for i in places:
            if masks[i].shape[1:] != references[i].shape[1:]:
                raise BadRequest(f"mask.{number}.{i}: must have the size of its reference")
    several = listed.reference_subjects or []
    if len(several) not in (0, len(references)):
        raise BadRequest(
            f"examples.{number}.reference_subjects: must have one entry per reference, "
            f"{len(references)}, got {len(several)}"
        )
    digest = hashlib.sha256(json.dumps([listed.prompt, listed.subject, *several]).encode())
    for picture in (*references, *(masks or ())):
        digest.update(f"{tuple(picture.shape)}".encode())
        digest.update(picture.numpy().tobytes())
    return Example(
        id=f"{listed.id}@{digest.hexdigest()[:16]}",
        prompt=listed.prompt,
        subject=listed.subject,
        reference_subjects=tuple(several),
        references=tuple(references),
        reference_masks=None if masks is None else tuple(masks),
    )


def _take(
    tensors: dict[str, Tensor], name: str, num_axes: int, channels: int, limits: Limits
) -> Tensor:
    """Removes a picture (or a batch of them) from the tensors; float32 in [0, 1]."""
    picture = tensors.pop(name, None)
    if picture is None:
        raise BadRequest(f"{name}: must be among the tensors, it is not")
    shape = "[B, 3, H, W]" if num_axes == 4 else f"[{channels}, H, W]"
    if picture.ndim != num_axes or picture.shape[-3] != channels or not picture.numel():
        raise BadRequest(f"{name}: must have the shape {shape}, got {list(picture.shape)}")
    if max(picture.shape[-2:]) > limits.max_side:
        height, width = picture.shape[-2:]
        raise BadRequest(
            f"{name}: sides must be at most {limits.max_side} px, got {width} x {height}", 413
        )
    if picture.dtype == torch.uint8:
        return picture.float() / 255
    if picture.dtype != torch.float32:
        raise BadRequest(f"{name}: must be float32 or uint8, got {picture.dtype}")
    if not ((picture >= 0) & (picture <= 1)).all():
        raise BadRequest(f"{name}: values must be in [0, 1]")
    return picture


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a server said of the images of one request, in their order."""

    scores: list[float | None]
    errors: list[str | None]


def read_outcome(reply: Any, count: int) -> Outcome:
    """Checks the answer to a request with ``count`` images.

    Raises:
        ValueError: if it is not one.
    """
    if not isinstance(reply, Mapping) or reply.get("version") != VERSION:
        raise ValueError(f"the answer must be of version {VERSION} of the protocol")
    scores: Any = reply.get("scores")
    errors: Any = reply.get("errors")
    for name, column in (("scores", scores), ("errors", errors)):
        if not isinstance(column, list) or len(column) != count:
            raise ValueError(f"the answer must have {count} {name}, one per image")
    if not all(value is None or type(value) in (int, float) for value in scores):
        raise ValueError("the answer's scores must be numbers or null")
    if not all(text is None or isinstance(text, str) for text in errors):
        raise ValueError("the answer's errors must be texts or null")
    try:
        return Outcome(scores=[None if v is None else float(v) for v in scores], errors=errors)
    except OverflowError as error:  # JSON knows integers of any size
        raise ValueError("the answer's scores must fit a float") from error

"""Base classes of plugs, the sections whose `type` chooses a class, and what a plug says of itself.

Commands that have to know what a run needs ask the methods of ``Plug`` and know no plug by name.
"""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from types import GenericAlias
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args, get_type_hints
from urllib.parse import urlsplit

from pydantic import ConfigDict, PlainValidator, PositiveFloat, TypeAdapter
from pydantic_core import PydanticCustomError

from customized_grpo import registry
from customized_grpo.assets import is_there, path_revision
from customized_grpo.config.text_limits import TextLimit
from customized_grpo.errors import ConfigError
from customized_grpo.files import read_variable

if TYPE_CHECKING:
    from customized_grpo.types import PairLosses

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

CheckpointKind = Literal["pipeline", "model", "lora", "texts", "any"]
"""A diffusers pipeline, a transformers model, a LoRA, config and tokenizer without weights, or
anything else that is loaded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Weights, or another file or folder, on which the results of a plug depend."""

    field: str
    """The field that names it."""
    path: str
    """File, folder, hub id or 'embedded:NAME'."""
    kind: CheckpointKind = "any"
    """What it should hold."""
    file: str | None = None
    """Name of the weights in it, where that is not the usual one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """A server that a plug talks to."""

    url: str
    token_env: str | None = None
    """The environment variable with its token; None = it needs none."""

    @property
    def name(self) -> str:
        """Host and port, without a password that the URL may hold."""
        return urlsplit(self.url).netloc.rpartition("@")[2]


class Plug:
    """What every plug says of itself; the defaults are right for most."""

    __slots__ = ()

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Files, folders and hub ids that the plug loads.

        `cgrpo doctor` looks at them, and their content is in the key of everything that is cached.
        By default: what a field of type `str` names, if it is there (see `find_checkpoints`).
        """
        return find_checkpoints(self)

    def check(self) -> None:
        """Finds what is wrong as far as that can be known without loading weights.

        It may ask `hosts()`. What is only worth a look is logged as a warning. By default: whether
        the variables with their tokens are set.

        Raises:
            ConfigError: one line that names the field, the requirement, the value and the fix.
        """
        for host in self.hosts():
            if host.token_env is not None and not read_variable(host.token_env):
                raise ConfigError(
                    f"the environment variable {host.token_env!r} must hold the token of "
                    f"{host.name}, got nothing; export it"
                )

    def hosts(self) -> tuple[Host, ...]:
        """Servers that get pictures, prompts or numbers; by default none."""
        return ()

    def text_limit(self) -> TextLimit | None:
        """How much of a prompt it reads, by the tokenizer alone; by default that is not known."""
        return None


def find_checkpoints(
    plug: Any,
    kinds: Mapping[str, CheckpointKind | None] | None = None,
    files: Mapping[str, str] | None = None,
) -> tuple[Checkpoint, ...]:
    """Checkpoints that the fields of a plug name.

    Args:
        plug: a config dataclass.
        kinds: what fields hold that always name a checkpoint; None: the field never names one. Of
            all others, those count whose text is an existing file or folder, an embedded
            checkpoint, or a hub id that has been downloaded.
        files: names of the weights in a field's folder, where they are not the usual ones.
    """
    known, names = kinds or {}, files or {}
    base = next(cls for cls in type(plug).__mro__ if Plug in cls.__bases__)
    own, hints = {f.name for f in fields(base)}, get_type_hints(type(plug))
    found = []
    for name in (f.name for f in fields(plug)):
        if name in own or not _holds_text(hints[name]):
            continue
        kind = known.get(name, "any")
        for place, path in _texts(name, getattr(plug, name)):
            if kind is not None and (name in known or is_there(path)):
                file = names.get(name)
                found.append(Checkpoint(field=place, path=path, kind=kind, file=file))
    return tuple(found)


def _holds_text(hint: Any) -> bool:
    """Whether a field is of text or of several texts; the words of a `Literal` are options."""
    return hint is str or any(_holds_text(part) for part in get_args(hint))


def _texts(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """A field's texts with their places; the items of a tuple are NAME.0, NAME.1, ..."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, (tuple, list)):
        for number, item in enumerate(value):
            yield from _texts(f"{name}.{number}", item)


def revisions(plug: Plug) -> dict[str, str]:
    """Field -> content of the checkpoint it names, for the key of everything that is cached.

    The content is a digest, or the commit of a hub id. What is not there yet is left out.
    """
    found = {c.field: path_revision(c.path) for c in plug.checkpoints()}
    return {field: revision for field, revision in found.items() if revision is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorConfig(Plug, ABC):
    """Base of every generator's config: subclass it once, give `type` a default, add fields."""

    group: ClassVar[str] = registry.GENERATORS

    type: str
    """Which generator: a declared type, or an import path `package.module:Class`."""

    @abstractmethod
    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Loads the generator; heavy imports belong inside. Arguments: see `generators`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig(Plug, ABC):
    """Base of every reward's config, also of the evaluators, which are not trained on."""

    group: ClassVar[str] = registry.REWARDS

    type: str
    """Which reward: a declared type, or an import path `package.module:Class`."""

    name: str | None = None
    """Name in logs and tables, unique in the run; null = the type."""

    objective: str
    """Objective it measures: `identity`, `prompt`, or one of your own."""

    weight: PositiveFloat = 1.0
    """Share among the rewards of one objective; they are mixed after normalisation."""

    @property
    def label(self) -> str:
        """The name in logs and tables."""
        return self.name or self.type

    @property
    def is_groupwise(self) -> bool:
        """Whether it scores the pictures of a group relative to each other: see `GroupReward`."""
        return False

    @abstractmethod
    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Loads the reward model; heavy imports belong inside. Arguments: see `rewards`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig(Plug, ABC):
    """Base of every data source's config."""

    group: ClassVar[str] = registry.DATA

    type: str
    """Which data source: a declared type, or an import path `package.module:Class`."""

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """None: examples are known by their content, wherever they lie."""
        return ()

    @abstractmethod
    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Opens the data source; heavy imports belong inside. Arguments: see `data`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkConfig(Plug, ABC):
    """Base of the config of every sink, which gets the log of a run besides the run folder."""

    group: ClassVar[str] = registry.SINKS

    type: str
    """Which sink: a declared type, or an import path `package.module:Class`."""

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """None: a sink writes."""
        return ()

    def starts_over(self) -> bool:
        """Whether a run that is resumed has to send everything again, as a new whole."""
        return False

    def replaces(self) -> bool:
        """Whether it drops, when a resumed run opens it, what it got from `RunInfo.first` on."""
        return False

    def place(self) -> str:
        """What decides where things go, as text; another place gets the whole run."""
        return repr(self)

    @abstractmethod
    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Opens the sink, on a thread of its own: it may take its time. Arguments: see `sinks`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlgorithmConfig(Plug, ABC):
    """Base of every algorithm's config; derive from one of its two kinds, ``GrpoAlgorithm`` and
    ``ForwardAlgorithm``, which say what ``losses`` gets."""

    group: ClassVar[str] = registry.ALGORITHMS

    is_affine: ClassVar[bool] = False
    """Whether the losses are affine in the advantage, at the model that sampled: only then the
    objectives' gradients add up, as `advantage.balance` needs. To be said with `losses`."""

    type: str
    """Which algorithm: a declared type, or an import path `package.module:Class`."""

    @abstractmethod
    def losses(self, terms: Any, /) -> PairLosses:
        """Losses ``[m]`` of m pairs of a sample and a step, or their sum, and numbers for the log:
        name -> a mean over the pairs, without a gradient.

        m may be 0. A pair of advantage 0 may have a gradient only where an older policy samples:
        else it is left out.
        """

    def __init_subclass__(cls, **options: Any) -> None:
        super(AlgorithmConfig, cls).__init_subclass__(**options)
        if "losses" in vars(cls) and "is_affine" not in vars(cls):
            cls.is_affine = False  # what a base says is of its own losses


def _decode_plug(base: Any, raw: Any) -> Any:
    """Decodes a plug section by its `type`; errors keep their place in the file."""
    if not isinstance(raw, dict):
        raise _plug_error(f" must be a mapping, got {json.dumps(raw)}; write {{type: ..., ...}}")
    try:
        cls = load_plug(base, raw.get("type"))
    except ConfigError as error:
        raise _plug_error(f".{error}") from error
    payload = {key: value for key, value in raw.items() if key != "type"}
    return adapter(cls).validate_json(json.dumps([payload]))[0]


@cache
def adapter(cls: type) -> TypeAdapter[Any]:
    """Decodes a list of one ``cls``: pydantic takes no config for a bare dataclass."""
    in_tuple: Any = GenericAlias(tuple, (cls,))
    return TypeAdapter(in_tuple, config=STRICT)


def _plug_error(text: str) -> PydanticCustomError:
    return PydanticCustomError("plug", "{text}", {"text": text})


def load_plug(base: Any, type_: Any) -> Any:
    """Returns the config class of a `type`, which must be a plug of the kind `base`.

    Raises:
        ConfigError: if there is none, or it is no such plug.
    """
    cls = registry.load_plug(base.group, type_)
    if not (inspect.isclass(cls) and issubclass(cls, base) and is_dataclass(cls)):
        raise ConfigError(
            f"type must name a dataclass derived from {base.__name__}, got {type_!r} = {cls!r}; "
            "derive it, or correct the path"
        )
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(getattr(cls, "__abstractmethods__")))  # noqa: B009
        raise ConfigError(f"type must name a whole class, got {cls!r} without {missing}; add that")
    if all(f.name != "type" or f.default is MISSING for f in fields(cls)):
        raise ConfigError(
            f"type must have a default in {cls.__name__}, got none; write `type: Literal[X] = X`"
        )
    return cls


def _plug_of(base: type) -> PlainValidator:
    return PlainValidator(lambda raw: _decode_plug(base, raw))


GeneratorPlug = Annotated[GeneratorConfig, _plug_of(GeneratorConfig)]
RewardPlug = Annotated[RewardConfig, _plug_of(RewardConfig)]
DataPlug = Annotated[DataConfig, _plug_of(DataConfig)]
AlgorithmPlug = Annotated[AlgorithmConfig, _plug_of(AlgorithmConfig)]
SinkPlug = Annotated[SinkConfig, _plug_of(SinkConfig)]

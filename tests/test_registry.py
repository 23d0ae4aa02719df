"""Plugs: found by entry point or import path, built-in or a stranger's, in the same way."""

import inspect
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
from tiny_plugs import TinyAlgorithm, TinyReward

from customized_grpo import registry
from customized_grpo.cli.fields import field_lines
from customized_grpo.config import (
    AlgorithmConfig,
    DataConfig,
    GeneratorConfig,
    RewardConfig,
    RunConfig,
    SinkConfig,
    load_config,
)
from customized_grpo.errors import ConfigError

CONFIG = Path(__file__).parents[1] / "configs" / "emoji.yaml"
BASES = {
    registry.GENERATORS: GeneratorConfig,
    registry.REWARDS: RewardConfig,
    registry.ALGORITHMS: AlgorithmConfig,
    registry.DATA: DataConfig,
    registry.SINKS: SinkConfig,
}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs a package that declares entry points, for one test."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(package: str, group: str, **types: str) -> None:
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = [f"[{group}]", *(f"{name} = {target}" for name, target in types.items())]
        (info / "entry_points.txt").write_text("\n".join(lines))
        registry.plug_types.cache_clear()

    yield install
    registry.plug_types.cache_clear()


def test_a_stranger_declares_a_type_by_entry_point(install):
    install("stranger", registry.REWARDS, tiny="tiny_plugs:TinyReward")
    assert registry.load_plug(registry.REWARDS, "tiny") is TinyReward
    assert registry.type_of(registry.REWARDS, TinyReward) == "tiny"


def test_an_import_path_is_a_type_too():
    assert registry.load_plug(registry.REWARDS, "tiny_plugs:TinyReward") is TinyReward
    assert registry.type_of(registry.REWARDS, TinyReward) == "tiny_plugs:TinyReward"


def test_a_type_declared_twice_is_refused(install):
    install("one", registry.REWARDS, same="tiny_plugs:TinyReward")
    install("two", registry.REWARDS, same="tiny_plugs:NoPlug")
    with pytest.raises(ConfigError, match=r"'same' .* declared once, got .* and .*; uninstall one"):
        registry.plug_types(registry.REWARDS)


@pytest.mark.parametrize(
    ("type_", "expected"),
    [
        ("clip-txt", "did you mean 'clip-text'?"),
        ("zzz", ", or an import path package.module:Class, got 'zzz'"),
        (None, "got nothing"),
        (["dinov2"], "must be one of clip-"),
        ("no_such_module:X", "type must be importable, got 'no_such_module:X'"),
        ("tiny_plugs:TinyRewart", "did you mean 'TinyReward'?"),
        (":X", "must be an import path"),
        ("tiny_plugs:", "must be an import path"),
        (".tiny_plugs:X", "must be an import path"),
    ],
)
def test_an_unknown_type_gets_one_line(type_, expected):
    with pytest.raises(ConfigError) as caught:
        registry.load_plug(registry.REWARDS, type_)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("group", "type_"),
    [(group, type_) for group in BASES for type_ in registry.plug_types(group)],
)
def test_a_built_in_plug_keeps_the_contract(group, type_):
    cls = registry.load_plug(group, type_)
    assert is_dataclass(cls)
    assert issubclass(cls, BASES[group])
    assert not inspect.isabstract(cls)
    assert cls.__dataclass_params__.frozen
    assert next(f.default for f in fields(cls) if f.name == "type") == type_


def test_help_shows_the_algorithms_that_are_whole(install):
    """Another package's may be broken; one of its own is beside ours, not in place of them."""
    install("stranger", registry.ALGORITHMS, lost="no_such_module:X")
    for value in (RunConfig, replace(load_config(CONFIG), algorithm=TinyAlgorithm())):
        text = "\n".join(field_lines(value))
        assert "Types: awm, grpo, lost, nft." in text
        shown = {name for name in ("awm", "grpo", "nft") if f'or {{"type": "{name}"' in text}
        assert shown == {"awm", "nft"} | ({"grpo"} if value is not RunConfig else set())


def test_the_declared_plugs_are_the_project_s():
    import tomllib

    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    declared = tomllib.loads(text)["project"]["entry-points"]
    assert set(declared) == set(BASES)
    for group, types in declared.items():
        assert types.items() <= registry.plug_types(group).items()


def test_listing_types_imports_neither_torch_nor_a_plug():
    code = (
        "import sys; from customized_grpo import registry; registry.plug_types(registry.DATA);"
        "assert not {'torch', 'pydantic', 'customized_grpo.data'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

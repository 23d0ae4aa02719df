"""Configs: a YAML text and overrides give a config that dumps and loads, or one line says why."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import break_bytes, examples, refused_or
from helpers import ROOT
from hypothesis import example, given
from hypothesis import strategies as st

from customized_grpo.config import (
    RunConfig,
    dump_config,
    explain_batch,
    list_fields,
    load_config,
    load_study,
    read_mapping,
)
from customized_grpo.errors import ConfigError
from customized_grpo.tools.serve.config import ServeConfig, read_serve_config

RUNS = sorted((ROOT / "configs").glob("*.yaml"))
SERVER = "rewards: [{type: clip-text, path: 'embedded:reward-clip'}]\nport: 8100\nmax_images: 8\n"
STUDY = f"""\
name: small
config: {ROOT}/configs/emoji.yaml
overrides: {{train.num_updates: 2}}
num_seeds: 2
main: a
methods:
  - {{name: a, label: A}}
  - {{name: b, label: B, overrides: {{advantage.gamma: 0.1, train.inner_updates: 2}}, num_seeds: 1}}
"""
FLAGS = sorted({f"--{info.path}" for path in RUNS for info in list_fields(load_config(path))})

DEEP = "[" * 5000
LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)
VALUES = [
    "null", "true", "[]", "{}", "''", "-1", "0", "1e400", ".nan", ".inf", "-.inf", "nan", "1e-400",
    "1000000000", "1" + "0" * 30, "9" * 5000, "-" + "9" * 400, "0.5", "'12'", "[1, 2, 3]", "x: y",
    "{type: tdw, high: .nan}", "{type: 3}", "{type: 'os:system'}", "{type: 'nowhere:X'}",
    "{type: ':'}", "{type: '.a:b'}", "{type: 'sys:exit'}", "{type: emoji, type: emoji}",
    '"a\\0b"', '"\\ud800"', '"\\udcff"', "\"\\u2028\"", "../../etc/passwd", "/etc/passwd", "~/x",
    "~nobody-here/x", "embedded:../generator", "embedded:", "a" * 5000, DEEP, "{a: " * 2000,
    "!!python/object/apply:os.system ['true']", "!!binary aGk=", "!!bool x", "!!timestamp x",
    "!!int ''", "!!set {a}", "!x y", "&a [*a]", "*unknown", "&a x", "? [a]", "<<: {a: 1}", "|",
    ">", "- 1", "%YAML 9.9", "---", "...", "\t", "@", "`", "\x00", "\x85", "\ufeff", "\U0001f600",
    "[{type: clip-text, path: x, objective: prompt}]", "{rank: 0}", "http://u:p@h:1", "#",
]  # fmt: skip

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from(VALUES)
)  # fmt: skip
KEYS = sorted({part for flag in FLAGS for part in flag.removeprefix("--").split(".")})
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), inner, max_size=5)
    ),
    max_leaves=12,
)


@st.composite
def changed_texts(draw: st.DrawFn, originals: list[str]) -> bytes:
    """A config with lines dropped, doubled or changed; some have broken bytes."""
    lines = draw(st.sampled_from(originals)).split("\n")
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(lines) - 1))
        head, colon, _ = lines[place].partition(":")
        match draw(
            st.sampled_from(["value", "value", "value", "drop", "double", "insert", "dent"])
        ):
            case "value" if colon:
                lines[place] = f"{head}: {draw(st.sampled_from(VALUES))}"
            case "drop" if len(lines) > 1:
                del lines[place]
            case "double":
                lines.insert(place, lines[place])
            case "dent":
                lines[place] = " " * draw(st.integers(0, 4)) + lines[place]
            case _:
                lines.insert(place, draw(st.sampled_from(VALUES)))
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    return break_bytes(draw, content) if draw(st.integers(0, 3)) == 0 else content


@st.composite
def made_up_texts(draw: st.DrawFn) -> bytes:
    tree: Any = draw(st.dictionaries(st.sampled_from(KEYS), trees, max_size=8) | trees)
    if draw(st.booleans()):
        tree = yaml.safe_load(RUNS[0].read_text(encoding="utf-8")) | (
            tree if isinstance(tree, dict) else {}
        )
    write = draw(st.sampled_from([json.dumps, yaml.safe_dump]))
    return write(tree).encode("utf-8", "surrogatepass")


def overrides() -> st.SearchStrategy[list[str]]:
    flags = st.sampled_from(FLAGS) | st.text(max_size=6).map("--".__add__) | st.just("--seed=")
    words = st.sampled_from(VALUES) | st.text(max_size=8) | st.integers().map(str)
    changes = st.tuples(flags, st.lists(words, max_size=2)).map(lambda pair: [pair[0], *pair[1]])
    return st.lists(changes, max_size=2).map(lambda lists: [w for words in lists for w in words])


def read_run(path: Path, flags: list[str]) -> RunConfig:
    config = load_config(path, flags)
    assert explain_batch(config)
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    return config


def read_server(path: Path) -> ServeConfig:
    return read_serve_config(read_mapping(str(path), "CONFIG"), str(path))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configs") / "run.yaml"


def texts(paths: list[Path]) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in paths]


@given(content=changed_texts(texts(RUNS)) | made_up_texts())
@examples(full=3500, fast=120)
def test_files(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    refused_or("configs", lambda: read_run(file, []))
    assert os.listdir(file.parent) == [file.name]


@given(flags=overrides(), path=st.sampled_from(RUNS))
@example(flags=["--\n"], path=RUNS[0])
@examples(full=1200, fast=40)
def test_overrides(file: Path, flags: list[str], path: Path) -> None:
    file.write_bytes(path.read_bytes())
    refused_or("configs", lambda: read_run(file, flags))


@given(content=changed_texts([SERVER]))
@examples(full=300, fast=20)
def test_servers(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    refused_or("configs", lambda: read_server(file))


@given(content=changed_texts([STUDY]))
@examples(full=300, fast=20)
def test_studies(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    refused_or("configs", lambda: load_study(file))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (b"name: \x00", "line 1 holds a nul byte"),
        (b'name: "a\\0b"', "name must be text without nul bytes"),
        (b'output_dir: "\\ud800"', "output_dir must be text without nul bytes and lone surrogates"),
        (b'{"a\\ud800": 1}', "the key"),
        (DEEP.encode(), "must be nested less deeply"),
        (b"a: " + b"[" * 60 + b"]" * 60, "a must be nested at most 50 deep"),
        (LAUGHS.encode(), "at most 100,000 values"),
        (b"name: !!python/object/apply:os.system ['true']", "line 1 must be valid YAML: a tag"),
        (b"name: !!bool x", "a tag"),
        (b"seed: " + b"9" * 5000, "the text must be valid YAML"),
        (b"# " + b"x" * 1_000_000, "longer than 1,000,000 bytes"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_findings(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.yaml") as caught:
        load_config(file)
    assert expected in str(caught.value)
    assert os.listdir(tmp_path) == ["run.yaml"]


@pytest.mark.parametrize(
    ("flag", "value", "limit"),
    [
        ("rollout.group_size", 10**9, "65536"),
        ("rollout.num_steps", 10**9, "1000"),
        ("train.num_updates", 10**30, "1000000000"),
        ("generator.height", 10**9, "16384"),
        ("lora.rank", 10**9, "16384"),
        ("seed", 10**30, "4294967295"),
    ],
)
def test_a_count_that_cannot_work_is_refused_with_its_limit(
    flag: str, value: int, limit: str
) -> None:
    path = ROOT / "configs/emoji.yaml"
    with pytest.raises(ConfigError, match=rf"{flag} must be less than or equal to {limit}, got"):
        load_config(path, [f"--{flag}", str(value)])


def test_a_rollout_must_fit_into_memory() -> None:
    flags = ["--rollout.group_size", "60000", "--rollout.prompts_per_rollout", "60000"]
    with pytest.raises(ConfigError, match=r"rollout.group_size must be at most 65,536 / prompts"):
        load_config(ROOT / "configs/emoji.yaml", flags)


@pytest.mark.parametrize("read", [load_config, load_study])
def test_a_path_that_is_no_file_is_refused(tmp_path: Path, read: Callable[[str], Any]) -> None:
    for path in ("a\0b", str(tmp_path), "x" * 5000, "/dev/zero"):
        with pytest.raises(ConfigError, match="must be a readable YAML file"):
            read(path)


def test_a_module_that_breaks_while_it_is_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_plug.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"data.type must be importable.*division by zero"):
        load_config(ROOT / "configs/emoji.yaml", ["--data", "{type: 'broken_plug:X'}"])

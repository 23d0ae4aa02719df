"""Every text, file name and variable that users bring, in the encodings, line ends, cases and
lengths that editors and operating systems make.

The readers are found in the source: one that is not fed here, or that opens a file on its own,
fails `test_every_reader_is_fed` or `test_nothing_else_reads`.
"""

from __future__ import annotations

import ast
import codecs
import json
import tempfile
import unicodedata
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import ROOT
from PIL import Image

from customized_grpo.cli.serve_reward import read_config
from customized_grpo.cli.shared import alone
from customized_grpo.config import (
    DreamBenchSet,
    JsonlSet,
    added_method,
    load_benchmark,
    load_config,
    load_study,
)
from customized_grpo.data.dreambench import read_subjects
from customized_grpo.data.folder import FolderConfig
from customized_grpo.data.hf import HfConfig
from customized_grpo.data.jsonl import read_entries
from customized_grpo.data.listed import ListedSource
from customized_grpo.data.syncd import SynCDConfig
from customized_grpo.data.templates import read_templates
from customized_grpo.errors import CustomizedGRPOError, DataError
from customized_grpo.evaluation.manifest import MANIFEST, read_outputs
from customized_grpo.evaluation.sets import build_set
from customized_grpo.generators.lora_files import _peft_config
from customized_grpo.rewards.ballots import Ballots, read_asked, read_votes
from customized_grpo.rewards.endpoints.http_client import read_secret
from customized_grpo.rewards.endpoints.rubrics import load_rubric
from customized_grpo.rewards.hpsv3 import read_instruction
from customized_grpo.tools.init.prompts import read_prompts
from customized_grpo.tools.watch import facts

SOURCE = ROOT / "src" / "customized_grpo"
WAYS_IN = {"load_text", "read_text", "read_objects", "read_mapping"}
FIVE = [f"{n} {{subject}}" for n in range(5)]


def photo(path: Path, size: tuple[int, int] = (48, 40), shade: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB" if shade is None else "L", size, shade or 0).save(path, "PNG")
    return path


@dataclass(frozen=True)
class TextInput:
    """A kind of text file."""

    reader: str
    """Who reads it, as module:function."""
    file: str
    write: Callable[[Path, str], str]
    """Text of the file with a word in it; may write what belongs to it into the folder."""
    read: Callable[[Path], Any]
    """Everything that comes of the file."""
    grows: bool = False
    """Whether it begins empty."""


RUN = yaml.safe_load((ROOT / "configs" / "emoji.yaml").read_text("utf-8"))


def rubric(folder: Path, word: str) -> str:
    question = {"answer": "points", "user": f"{word}: {{output}}"}
    return yaml.safe_dump({"questions": [question]}, allow_unicode=True)


def run_config(folder: Path, word: str) -> str:
    rewards = [RUN["rewards"][0] | {"name": word}, *RUN["rewards"][1:]]
    return yaml.safe_dump(RUN | {"rewards": rewards}, allow_unicode=True)


def benchmark_config(folder: Path, word: str) -> str:
    raw = yaml.safe_load((ROOT / "configs" / "benchmarks" / "emoji.yaml").read_text("utf-8"))
    return yaml.safe_dump(raw | {"output_dir": word}, allow_unicode=True)


def study(folder: Path, word: str) -> str:
    (folder / "emoji.yaml").write_text(yaml.safe_dump(RUN), encoding="utf-8")
    methods = [{"name": "one", "label": word}]
    raw = {"name": "s", "config": "emoji.yaml", "main": "one", "methods": methods}
    return yaml.safe_dump(raw, allow_unicode=True)


def method(folder: Path, word: str) -> str:
    return yaml.safe_dump({"data.path": word}, allow_unicode=True)


def serve_config(folder: Path, word: str) -> str:
    reward = {"type": "clip-text", "path": "embedded:reward-clip", "name": word}
    return yaml.safe_dump({"rewards": [reward]}, allow_unicode=True)


def jsonl(folder: Path, word: str) -> str:
    photo(folder / "rex.png")
    rows = [{"id": str(n), "prompt": f"{word} {n}", "references": ["rex.png"]} for n in range(3)]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def syncd(folder: Path, word: str) -> str:
    for n in (1, 2, 3):
        photo(folder / str(n) / "0.png")
    rows = [{"ref_img": f"{n}/0.png", "text": f"{word} {n}"} for n in (1, 2, 3)]
    return json.dumps(rows, ensure_ascii=False, indent=1)


def read_syncd(file: Path) -> Any:
    return everything(SynCDConfig(path=str(file), held_out=0.3).build(0))


def everything(source: ListedSource) -> set[tuple[str, str]]:
    splits = source.splits
    entries = (*splits.training, *splits.held_out, *splits.validation)
    return {(entry.prompt, entry.subject) for entry in entries}


def adapter(folder: Path, word: str) -> str:
    raw = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": word}
    return json.dumps(raw, ensure_ascii=False, indent=1)


def metadata(folder: Path, word: str) -> str:
    rows = [f"{photo(folder / f'{n}.png').name},{word} {n}\n" for n in range(3)]
    return "".join(["file_name,caption\n", *rows])


def read_metadata(file: Path) -> Any:
    datasets = pytest.importorskip("datasets", reason="needs the extra [datasets]")
    with tempfile.TemporaryDirectory() as cache, pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        source = HfConfig(path=str(file.parent), held_out=0.3).build(0)
        assert isinstance(source, ListedSource)
        return everything(source)


def templates(folder: Path, word: str) -> str:
    return f"a {{subject}} in {word}\n{{subject}} there\n"


def read_own_templates(file: Path) -> Any:
    return read_templates(str(file))


def subject(folder: Path, word: str) -> str:
    photo(folder / "0.png")
    return f"{word} dog\n"


def caption(folder: Path, word: str) -> str:
    for n in range(2):
        photo(folder / f"{n}.png")
    return f"[trigger] in {word}\nrex there\n"


def read_folder(file: Path) -> Any:
    return everything(FolderConfig(path=str(file.parent)).build(0))


def dreambench(folder: Path, word: str) -> str:
    photo(folder / "robot" / "00.jpg")
    call = ".format(unique_token, class_token)"
    lines = ["Classes", "", "subject_name,class", f"robot,{word}", ""]
    for heading in ("Object", "Live Subject"):
        lines += ["Prompts", "", f"{heading} Prompts", "", "prompt_list = ["]
        lines += [f"'a {{0}} {{1}} in {word}'{call}", "]", ""]
    return "\n".join(lines)


def benchmark_jsonl(folder: Path, word: str) -> str:
    photo(folder / "rex.png")
    row = {"subject": word, "prompt": f"a {word}", "references": ["rex.png"]}
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_benchmark(file: Path) -> Any:
    return [(i.subject, i.prompt) for i in build_set(JsonlSet(path=str(file)), 1).items]


def manifest(folder: Path, word: str) -> str:
    (folder / "set.jsonl").write_text(benchmark_jsonl(folder, word), encoding="utf-8")
    photo(folder / "out.png")
    row = {"subject": word, "prompt_index": 0, "prompt": f"a {word}", "reference": "rex.png"}
    row |= {"index": 0, "file": "out.png"}
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_manifest(file: Path) -> Any:
    wanted = build_set(JsonlSet(path=str(file.with_name("set.jsonl"))), 1)
    return [(i.subject, i.prompt) for i in read_outputs(file.parent, wanted).items]


def prompts(folder: Path, word: str) -> str:
    return "".join(f"a {{class}} in {word} {n}\n" for n in range(12))


def ballot(folder: Path, word: str) -> str:
    group = Ballots(folder).group("?", "a dog", [], [torch.zeros(3, 2, 2)], False, 1)
    row = {"group": group.id, "prompt": group.prompt, "pictures": group.pictures, "best": None}
    row |= {"worst": None, "voter": word, "time": ""}
    return json.dumps(row, ensure_ascii=False) + "\n"


def asked(folder: Path, word: str) -> str:
    group = Ballots(folder).group("?", word, [], [torch.zeros(3, 2, 2)], False, 1)
    return json.dumps({"groups": [asdict(group)]}, ensure_ascii=False) + "\n"


def instruction(folder: Path, word: str) -> str:
    return f"{word}\n{{text_prompt}} <|Reward|>\n"


def read_serve(file: Path) -> Any:
    flags = dict.fromkeys(("reward", "host", "port", "device", "token_env"))
    return read_config(Namespace(config=file, **flags)).rewards[0].label


def read_watched(file: Path) -> Any:
    return facts._Plan.read(file).objectives


def read_method(file: Path) -> Any:
    return added_method(f"mine={file}").overrides


def read_study(file: Path) -> Any:
    return load_study(file)[0].methods[0].label


INPUTS = (
    TextInput("config:load_config", "a.yaml", run_config, lambda f: load_config(f).rewards[0].name),
    TextInput(
        "config:load_benchmark", "a.yaml", benchmark_config, lambda f: load_benchmark(f).output_dir
    ),
    TextInput("config:load_study", "a.yaml", study, read_study),
    TextInput("config:added_method", "a.yaml", method, read_method),
    TextInput(
        "cli.serve_reward:read_config",
        "a.yaml",
        serve_config,
        read_serve,
    ),
    TextInput("tools.watch.facts:read", "config.yaml", run_config, read_watched),
    TextInput("data.jsonl:read_entries", "a.jsonl", jsonl, lambda f: {
        (e.id, e.prompt) for e in read_entries(f)
    }),
    TextInput("data.syncd:_read", "a.json", syncd, read_syncd),
    TextInput("generators.lora_files:_peft_config", "adapter_config.json", adapter, lambda f: (
        _peft_config(f).base_model_name_or_path
    )),
    TextInput("data.hub:_check_texts", "metadata.csv", metadata, read_metadata),
    TextInput("data.templates:read_templates", "a.txt", templates, read_own_templates),
    TextInput("data.folder:_words", "subject.txt", subject, read_folder),
    TextInput("data.sidecars:read_captions", "0.txt", caption, read_folder),
    TextInput(
        "data.dreambench:read_subjects",
        "prompts_and_classes.txt",
        dreambench,
        lambda f: [(s.name, s.words, s.templates) for s in read_subjects(str(f.parent))],
    ),
    TextInput("evaluation.sets:_jsonl", "a.jsonl", benchmark_jsonl, read_benchmark),
    TextInput("evaluation.manifest:_read_files", MANIFEST, manifest, read_manifest),
    TextInput("tools.init.prompts:read_prompts", "a.txt", prompts, lambda f: {
        p.text for p in read_prompts(f, "dog").training
    }),
    TextInput("rewards.endpoints.rubrics:_read", "a.yaml", rubric, lambda f: (
        load_rubric(str(f)).questions[0].user
    )),
    TextInput("rewards.ballots:read_asked", "a.json", asked, lambda f: {
        group.prompt for group in read_asked(f)
    }),
    TextInput("rewards.ballots:read_votes", "a.jsonl", ballot, lambda f: {
        vote.voter for vote in read_votes(f)
    }, grows=True),
    TextInput(
        "rewards.hpsv3:read_instruction",
        "a.txt",
        instruction,
        lambda f: read_instruction(str(f)).strip(),
    ),
)  # fmt: skip
OWN = {"tools.init.project:_shipped"}
"""Readers of files that are part of the package."""

every_input = pytest.mark.parametrize("kind", INPUTS, ids=lambda kind: kind.reader)

RIGHT: dict[str, Callable[[str], bytes]] = {
    "byte order mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "CRLF": lambda text: text.replace("\n", "\r\n").encode(),
    "CRLF and byte order mark": lambda text: codecs.BOM_UTF8 + text.replace("\n", "\r\n").encode(),
    "CR": lambda text: text.replace("\n", "\r").encode(),
    "no last line end": lambda text: text.rstrip("\n").encode(),
    "empty lines at the end": lambda text: f"{text}\n\n".encode(),
}
WRONG = {
    "cp1252": "café\u2019s",
    "latin-1": "süß",
    "mac_roman": "süß",
    "shift_jis": "犬",
    "gb18030": "中文",
    "utf-16": "dog",
    "utf-16-le": "dog",
    "utf-16-be": "dog",
    "utf-32": "dog",
}
LENGTHS = (1, 300, 50_000)


@every_input
@pytest.mark.parametrize("form", RIGHT)
def test_what_editors_do_to_utf8_changes_nothing(
    tmp_path: Path, kind: TextInput, form: str
) -> None:
    text, file = kind.write(tmp_path, "süßes犬"), tmp_path / kind.file
    file.write_bytes(text.encode())
    expected = kind.read(file)
    assert "süßes犬" in str(expected)
    file.write_bytes(RIGHT[form](text))
    assert kind.read(file) == expected


@every_input
@pytest.mark.parametrize("encoding", WRONG)
def test_another_encoding_is_named_with_the_line_and_the_fix(
    tmp_path: Path, kind: TextInput, encoding: str
) -> None:
    text, file = kind.write(tmp_path, WRONG[encoding]), tmp_path / kind.file
    file.write_bytes(text.encode(encoding))
    with pytest.raises(CustomizedGRPOError) as caught:
        kind.read(file)
    message = str(caught.value)
    assert str(file) in message
    assert "UTF-8" in message
    assert "save the file as UTF-8" in message
    number = 1 + text[: text.index(WRONG[encoding])].count("\n")
    if encoding in ("cp1252", "latin-1", "mac_roman", "shift_jis", "gb18030"):
        assert f"line {number} " in message


@every_input
@pytest.mark.parametrize("length", LENGTHS)
def test_a_long_word_is_whole_or_refused_in_a_line(
    tmp_path: Path, kind: TextInput, length: int
) -> None:
    text, file = kind.write(tmp_path, "x" * length), tmp_path / kind.file
    file.write_text(text)
    found, refused = "", ""
    try:
        found = str(kind.read(file))
    except CustomizedGRPOError as error:
        refused = str(error)
    assert "x" * length in found or (length > 1 and 0 < len(refused) < 1000)
    assert "\n" not in refused


@every_input
def test_what_is_no_text_file_is_refused(tmp_path: Path, kind: TextInput) -> None:
    text, file = kind.write(tmp_path, "word"), tmp_path / kind.file
    for content in (b"", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", text.encode() + b"\0"):
        file.write_bytes(content)
        if kind.grows and not content:
            assert not kind.read(file)
            continue
        with pytest.raises(CustomizedGRPOError) as caught:
            kind.read(file)
        assert "\n" not in str(caught.value)
    file.unlink()
    file.mkdir()
    with pytest.raises(CustomizedGRPOError, match=r"folder|directory"):
        kind.read(file)


# Names of files: what has to be found wherever its name was written in another way.


def masked(folder: Path) -> ListedSource:
    return FolderConfig(path=str(folder), templates=tuple(FIVE)).build(0)


def has_masks(source: ListedSource) -> bool:
    return all(e.masks for e in (*source.splits.training, *source.splits.held_out))


def folder_mask(folder: Path, name: Callable[[str], str]) -> Any:
    photo(folder / "é.JPG")
    photo(folder / name("é.mask.png"), shade=255)
    source = masked(folder)
    return has_masks(source), len(source.splits.training)


def mask_of_one_trainer(folder: Path, name: Callable[[str], str]) -> Any:
    photo(folder / "é.JPG")
    photo(folder / name("é-masklabel.png"), shade=255)
    return has_masks(masked(folder))


def mask_in_a_folder(folder: Path, name: Callable[[str], str]) -> Any:
    photo(folder / "photos" / "é.JPG")
    photo(folder / name("masks") / name("é.png"), shade=255)
    path, masks = str(folder / "photos"), str(folder / name("masks"))
    return has_masks(FolderConfig(path=path, mask_path=masks, templates=tuple(FIVE)).build(0))


def folder_caption(folder: Path, name: Callable[[str], str]) -> Any:
    for n in "éa":
        photo(folder / f"{n}.JPG")
    (folder / name("é.txt")).write_text("a rex in space")
    (folder / name("é.caption")).write_text("a rex on Mars")
    return "a rex on Mars" in {prompt for prompt, _ in everything(masked(folder))}


def folder_subject(folder: Path, name: Callable[[str], str]) -> Any:
    photo(folder / "a.png")
    (folder / name("subject.txt")).write_text("a corgi")
    return everything(masked(folder))


def listed_reference(folder: Path, name: Callable[[str], str]) -> Any:
    photo(folder / name("é") / name("rex.png"))
    (folder / "a.jsonl").write_text('{"prompt": "dog", "references": ["é/rex.png"]}\n', "utf-8")
    return [(e.prompt, len(e.references)) for e in read_entries(folder / "a.jsonl")]


def listed_reference_of_windows(folder: Path, name: Callable[[str], str]) -> Any:
    photo(folder / name("é") / name("rex.png"))
    row = {"prompt": "dog", "references": ["é\\rex.png"]}
    (folder / "a.jsonl").write_text(json.dumps(row))
    return [(e.prompt, len(e.references)) for e in read_entries(folder / "a.jsonl")]


def syncd_cut_out(folder: Path, name: Callable[[str], str]) -> Any:
    (folder / "a.json").write_text(syncd(folder, "dog"))
    for n in (1, 2, 3):
        photo(folder / str(n) / name("0_seg.png"))
    return has_masks(SynCDConfig(path=str(folder / "a.json"), held_out=0.3).build(0))


def syncd_mask(folder: Path, name: Callable[[str], str]) -> Any:
    rows = []
    for n in range(3):
        names = [f"{n}_{i}.jpg" for i in range(2)]
        rows.append({"filenames": names, "prompts": ["a", "b"], "objaverse_id": str(n)})
        for file in names:
            photo(folder / file)
            photo(folder / name("masks") / name(file), shade=255)
    (folder / "a.json").write_text(json.dumps(rows))
    return has_masks(SynCDConfig(path=str(folder / "a.json"), held_out=0.3).build(0))


def dreambench_files(folder: Path, name: Callable[[str], str]) -> Any:
    text = dreambench(folder, "toy")
    (folder / "robot").rename(folder / name("robot"))
    photo(folder / name("robot") / name("00.mask.png"), shade=255)
    (folder / name("prompts_and_classes.txt")).write_text(text)
    found = build_set(DreamBenchSet(path=str(folder)), 1)
    (subject,) = found.subjects.values()
    return len(found.items), [p.mask is not None for p in subject.photos]


def live_class(folder: Path, name: Callable[[str], str]) -> Any:
    file = folder / "prompts_and_classes.txt"
    file.write_text(dreambench(folder, name("dog")).replace("in dog", "runs"))
    found = build_set(DreamBenchSet(path=str(folder)), 1)
    return [subject.kind for subject in found.subjects.values()]


def syncd_metadata(folder: Path, name: Callable[[str], str]) -> Any:
    for part in ("a", "b"):
        text = syncd(folder, part)
        (folder / name(f"{part}_metadata.json")).write_text(text)
    return everything(SynCDConfig(path=str(folder), held_out=0.3).build(0))


def manifest_files(folder: Path, name: Callable[[str], str]) -> Any:
    (folder / name(MANIFEST)).write_text(manifest(folder, "dog"))
    if name("out.png") != "out.png":
        (folder / "out.png").rename(folder / name("out.png"))
    wanted = build_set(JsonlSet(path=str(folder / "set.jsonl")), 1)
    return len(read_outputs(folder, wanted).items)


NAMED = (
    folder_mask,
    mask_of_one_trainer,
    mask_in_a_folder,
    folder_caption,
    folder_subject,
    listed_reference,
    listed_reference_of_windows,
    syncd_cut_out,
    syncd_mask,
    syncd_metadata,
    dreambench_files,
    live_class,
    manifest_files,
)
CASES: dict[str, Callable[[str], str]] = {
    "upper": lambda name: name.upper(),
    "title": lambda name: name[0].upper() + name[1:],
    "upper ending": lambda name: Path(name).stem + Path(name).suffix.upper(),
    "decomposed accents": lambda name: unicodedata.normalize("NFD", name),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("named", NAMED, ids=lambda named: named.__name__)
def test_files_are_found_whatever_the_case(
    tmp_path: Path, named: Callable[[Path, Callable[[str], str]], Any], case: str
) -> None:
    for folder in ("as written", "otherwise"):
        (tmp_path / folder).mkdir()
    expected = named(tmp_path / "as written", lambda name: name)
    assert named(tmp_path / "otherwise", CASES[case]) == expected


def test_two_files_of_one_name_are_not_chosen_between(tmp_path: Path) -> None:
    photo(tmp_path / "front.JPG")
    for name in ("FRONT.MASK.PNG", "Front.mask.png"):
        photo(tmp_path / name, shade=255)
    with pytest.raises(DataError, match=r"got FRONT\.MASK\.PNG and Front\.mask\.png"):
        masked(tmp_path)
    photo(tmp_path / "front.mask.png", shade=255)  # the very name
    assert has_masks(masked(tmp_path))


def test_backslashes_do_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    photo(tmp_path / "outside.png")
    (tmp_path / "in").mkdir()
    row = {"prompt": "dog", "references": ["..\\outside.png"]}
    (tmp_path / "in" / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match="must stay in the folder"):
        read_entries(tmp_path / "in" / "a.jsonl")


@pytest.mark.parametrize(
    "name", ["front-masklabel.jpg", "front_mask.JPG", "FRONT-Mask.webp", "front.mask.jpg"]
)
def test_what_looks_like_a_mask_is_not_trained_on(tmp_path: Path, name: str) -> None:
    photo(tmp_path / "front.JPG")
    photo(tmp_path / name)
    with pytest.raises(DataError, match=r"looks like a mask of front\.JPG.*front\.mask\.png"):
        masked(tmp_path)
    (tmp_path / "front.JPG").rename(tmp_path / "back.JPG")  # then it is a photo of a mask
    assert len(masked(tmp_path).splits.training) > 0


def test_a_folder_of_masks_is_no_subject(tmp_path: Path) -> None:
    for folder in ("rex", "mug", "Rex_masks"):
        photo(tmp_path / folder / "0.png")
    with pytest.raises(DataError, match="Rex_masks: looks like masks"):
        masked(tmp_path)


# Variables


@pytest.mark.parametrize("around", ["{}", "{}\r", "{}\r\n", " {} ", "\ufeff{}", "\ufeff{}\r\n"])
def test_variables_without_what_files_leave_around_them(
    monkeypatch: pytest.MonkeyPatch, around: str
) -> None:
    monkeypatch.setenv("MY_KEY", around.format("t0ken"))
    assert read_secret("token_env", "MY_KEY") == "t0ken"
    monkeypatch.setenv("WORLD_SIZE", around.format("1"))
    alone("cgrpo data")


@pytest.mark.parametrize("value", ["two", "1.0", "-1", "²", "\u0661"])
def test_a_variable_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(CustomizedGRPOError, match="variable WORLD_SIZE must be a whole number"):
        alone("cgrpo data")


@pytest.mark.parametrize("value", ["", " ", "schlüssel", "a\nb", "\udcff"])
def test_a_secret_that_is_none_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(CustomizedGRPOError, match="MY_KEY") as caught:
        read_secret("token_env", "MY_KEY")
    assert not value.strip() or value not in str(caught.value)


# What the source says


def functions(source: Path) -> Iterator[tuple[str, ast.AST]]:
    """Every function as module:name, the innermost one for what lies in several."""
    for file in sorted(source.rglob("*.py")):
        parts = file.relative_to(source).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        tree = ast.parse(file.read_text("utf-8"))
        inside = {
            id(child): outer
            for outer in ast.walk(tree)
            if isinstance(outer, ast.FunctionDef)
            for child in ast.walk(outer)
            if child is not outer
        }
        for node in ast.walk(tree):
            owner = inside.get(id(node))
            yield f"{module}:{owner.name if owner else ''}", node


def test_every_reader_is_fed() -> None:
    found = {
        place
        for place, node in functions(SOURCE)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in WAYS_IN
        and place.split(":")[1] not in WAYS_IN
    }
    assert found == {kind.reader for kind in INPUTS} | OWN


READS = {"read_text", "read_bytes"}
ALLOWED = {
    "assets": "configs of checkpoints, written by libraries",
    "tools.doctor.folders": "configs of checkpoints",
    "tools.estimate": "configs of checkpoints, and what cgrpo has measured",
    "tools.export": "configs of checkpoints and of a run",
    "rewards.preprocess": "configs of checkpoints",
    "tools.rehearse": "what a run has written",
    "runs": "what a run has written, and the machine's own files",
    "training.nonfinite": "what a run has written",
    "evaluation.sampling": "what an evaluation has written",
    "evaluation.study": "what a study has written",
    "evaluation.results": "what a study has written",
    "evaluation.outcome": "what an evaluation has written",
    "evaluation.sets:digest_of_files": "bytes of pictures",
    "rewards.efficientnet_lite:_load": "a part of a package",
    "data.images:_kind": "bytes of pictures",
    "devices:group_numbers": "the machine's own files",
    "tools.playground.page": "a part of the package",
    "config.text_limits:unknown_words": "a part of the package",
    "cli.main": "output",
    "files": "the one reader; and syncs what it writes",
}


def test_nothing_else_reads() -> None:
    def reads(node: ast.AST) -> bool:
        if not isinstance(node, ast.Call):
            return False
        if isinstance(node.func, ast.Name):
            return node.func.id == "open"
        if not isinstance(node.func, ast.Attribute):
            return False
        of = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
        opens = node.func.attr == "open" and of not in ("Image", "Run")
        return node.func.attr in READS or opens

    def allowed(place: str) -> bool:
        return any(place.startswith((f"{a}:", f"{a}.")) or place == a for a in ALLOWED)

    strangers = {p for p, node in functions(SOURCE) if reads(node) and not allowed(p)}
    assert not strangers, "read it by customized_grpo.files, and feed it in this file"


def test_names_are_looked_up_by_one_class() -> None:
    """In the data sources a file is there or not as `Names` finds it."""
    allowed = {
        "data.folder:_folder": "the folder that the config names",
        "data.images:opened": "a file that has been found",
        "data.photos:is_subject": "a folder that has been found",
        "data.sidecars:is_sidecar": "in lower case",
        "data.photos:photos_in": "a folder is no photo",
        "data.photos:photos_of": "a folder that has been found",
        "data.photos:left_out": "a folder that has been found",
        "data.dreambench:_unnamed": "a folder that has been found",
        "data.hub:_check_texts": "the path that the config names",
        "data.syncd:_metadata": "the path that the config names",
        "data.subjects200k:hosts": "the path that the config names",
        "data.hf:hosts": "the path that the config names",
    }
    found = {
        place
        for place, node in functions(SOURCE)
        if isinstance(node, ast.Attribute)
        and node.attr in ("exists", "is_file", "is_dir", "endswith")
        and place.startswith(("data.", "evaluation.sets:", "evaluation.manifest:"))
        and not place.startswith("data.emoji.")
    }
    assert found == set(allowed)


def test_variables_are_read_in_one_place() -> None:
    """But for those that are only looked at for a library, which reads them itself."""
    allowed = {"runs.sinks", "evaluation.study", "devices", "cli.main", "cli.playground"}
    allowed |= {"tools.doctor.machine", "tools.playground.page", "files"}
    found = {
        place
        for place, node in functions(SOURCE)
        if isinstance(node, ast.Attribute)
        and node.attr in ("environ", "getenv")
        and not any(place.startswith((f"{a}:", f"{a}.")) for a in allowed)
    }
    assert not found

"""The examples in docs/data.md are read by the sources that they describe."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from helpers import ROOT
from pictures import DREAMBENCH, on_the_dataset, paint

from customized_grpo.buckets import NAMES, RATIOS
from customized_grpo.config import RunConfig, load_config
from customized_grpo.data.images import KEPT_PIXELS, MAX_PIXELS, MIN_SIDE
from customized_grpo.data.listed import ListedSource
from customized_grpo.data.photos import SHARE
from customized_grpo.data.streamed import BLOCK

TEXT = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+) (\S+)\n(.*?)```", TEXT, re.S)
PLUGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
    "customized_grpo.data"
]


def configs(type_: str, folder: Path) -> list[RunConfig]:
    """Configs with the ``data`` of the document; types by import path, as declared."""
    base = yaml.safe_load((ROOT / "configs" / "emoji.yaml").read_text())
    base["data"] = {"type": PLUGS["emoji"]}
    found = []
    for _, _, text in (b for b in BLOCKS if b[:2] == ("yaml", type_)):
        data = yaml.safe_load(text)["data"]
        assert data["type"] == type_
        file = folder / "config.yaml"
        file.write_text(yaml.safe_dump(base | {"data": data | {"type": PLUGS[type_]}}))
        found.append(load_config(file))
    return found


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files of the document, and the pictures that they name."""
    monkeypatch.chdir(tmp_path)
    for language, name, text in BLOCKS:
        if name == "files":
            for line in text.split():
                if line.endswith(".txt"):
                    Path(line).write_text("a corgi\n")
                else:
                    paint(Path(line))
        elif language in ("json", "jsonl"):
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).write_text(text)
            for picture in re.findall(r'"([^"]+\.(?:jpg|png))"', text):
                folder = Path("pairs/pictures") if name.startswith("pairs") else Path(name).parent
                paint(folder / picture, color=255 if "mask" in picture else "red")
    return tmp_path


@pytest.mark.parametrize(
    ("type_", "sizes"),
    [("folder", [(40, 50, 10)]), ("jsonl", [(2, 1, 0)]), ("syncd", [(3, 2, 0), (1, 1, 0)])],
)
def test_examples_are_read(written: Path, type_: str, sizes: list[tuple[int, int, int]]) -> None:
    found = [config.data.build(config.seed) for config in configs(type_, written)]
    assert len(found) == len(sizes)
    for source, (training, held_out, validation) in zip(found, sizes, strict=True):
        assert isinstance(source, ListedSource)
        splits = source.splits
        assert {len(splits.training), len(splits.held_out)} == {training, held_out}
        assert len(splits.validation) == validation
        assert len(source.training(0, 2)) == 2


def test_the_subject_of_the_folder_is_called_by_its_file(written: Path) -> None:
    (config,) = configs("folder", written)
    assert all("a corgi" in e.prompt for e in config.data.build(0).training(0, 4))


@on_the_dataset
def test_dreambench_where_it_lies(tmp_path: Path) -> None:
    (config,) = configs("dreambench", tmp_path)
    assert (ROOT / config.data.path).name == DREAMBENCH.name  # pyright: ignore
    held_out = config.data.held_out  # pyright: ignore
    assert all(f"`{name}`" in TEXT for name in held_out)


def test_subjects200k_is_decoded(tmp_path: Path) -> None:
    (config,) = configs("subjects200k", tmp_path)
    assert config.data.min_quality == 5  # pyright: ignore
    assert "`min_quality: 5`, the default" in TEXT


def test_a_dataset_of_the_hub_is_decoded(tmp_path: Path) -> None:
    (config,) = configs("hf", tmp_path)
    assert config.data.references == ("image",)  # pyright: ignore
    assert "`references` (`[image]`)" in TEXT
    assert f"blocks of {BLOCK}" in TEXT


def test_every_type_has_a_section() -> None:
    documented = set(re.findall(r"^\| \[?`(\w+)`", TEXT, re.M))
    assert documented == set(PLUGS)
    anchors = {h.lower().replace(" ", "-") for h in re.findall(r"^## (.*)$", TEXT, re.M)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", TEXT)) <= anchors


def test_numbers_are_those_of_the_code() -> None:
    text = " ".join(TEXT.split())
    assert f"below {MIN_SIDE} px on a side or above {MAX_PIXELS:,} pixels" in text
    assert KEPT_PIXELS == 1024 * 1024
    assert SHARE == 5
    assert "nearest of nine" in text
    assert f"{', '.join(NAMES[:5])} and upright" in text
    assert len(RATIOS) == 9

"""What photo features say of an album: twins that a hash misses, photos of something else."""

import shutil
from pathlib import Path
from statistics import mean, median

import pytest
import torch
from data.pictures import DREAMBENCH, on_the_dataset
from made_photos import take

from customized_grpo.cli.main import main
from customized_grpo.config import load_config
from customized_grpo.tools.init.features import ODD, odd_ones
from customized_grpo.tools.init.photos import read_album
from customized_grpo.tools.init.plan import Order, plan_project


def test_odd_ones_are_the_formula() -> None:
    random = torch.Generator().manual_seed(0)
    features = torch.randn(1, 8, generator=random) + 0.9 * torch.randn(9, 8, generator=random)
    features = torch.nn.functional.normalize(features, dim=1)
    features[4] = -features[3]
    expected = []
    for i in range(9):
        rest = [j for j in range(9) if j != i]
        own = mean(float(features[i] @ features[j]) for j in rest)
        among = [mean(float(features[j] @ features[k]) for k in rest if k != j) for j in rest]
        expected += [i] if own < median(among) - ODD else []
    assert 4 in expected
    assert 0 < len(expected) < 9
    assert odd_ones(features[:4]) == []
    assert odd_ones(features) == expected


@on_the_dataset
@pytest.mark.usefixtures("photo_features")
def test_a_mirrored_twin_and_another_subject_are_named(tmp_path: Path) -> None:
    """dog5 has a photo and its mirror image; the sneaker is not it."""
    folder = tmp_path / "photos"
    shutil.copytree(DREAMBENCH / "dog5", folder)
    shutil.copy(DREAMBENCH / "shiny_sneaker" / "00.jpg", folder / "sneaker.jpg")
    remarks = {(r.photo, r.kind): r.text for r in read_album(folder, 512).remarks}
    twins = [photo for photo, kind in remarks if kind == "duplicate"]
    assert len(twins) == 1
    assert [photo for photo, kind in remarks if kind == "odd"] == ["sneaker.jpg"]
    order = Order(folder=tmp_path / "project", photos=folder, words="dog", live=True, seed=0)
    project = plan_project(order)
    one, other = (p for p in project.album.photos if p.path.name in remarks[twins[0], "duplicate"]
                  or p.path.name == twins[0])  # fmt: skip
    assert not {one.path, other.path} & project.aside


@pytest.mark.usefixtures("photo_features")
def test_the_embedded_model_is_judged_by_photo_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    take(tmp_path / "photos", 2, (96, 96))
    monkeypatch.chdir(tmp_path)
    words = ["--photos", "photos", "--class", "dog", "--model"]
    assert main(["init", "small", *words, "embedded"]) == 0
    assert "identity is judged by photo features" in capsys.readouterr().out
    config = load_config("small/config.yaml")
    assert [(r.type, r.objective) for r in config.rewards] == [
        ("pickscore", "prompt"), ("efficientnet-lite", "identity"),
    ]  # fmt: skip
    assert [getattr(e, "variant", "") for e in config.evaluators] == ["", "lite2"]
    assert main(["init", "large", *words, "flux2-klein"]) == 0
    assert "efficientnet" not in Path("large/config.yaml").read_text()


def test_without_the_extra_init_says_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    take(tmp_path / "photos", 2, (96, 96))
    monkeypatch.chdir(tmp_path)
    assert main(["init", "p", "--photos", "photos", "--class", "dog", "--model", "embedded"]) == 0
    assert "pip install 'customized-grpo[photo]'" in capsys.readouterr().out
    assert load_config("p/config.yaml").rewards[1].type == "dinov2"

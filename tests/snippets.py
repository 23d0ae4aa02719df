"""Blocks of the documents, which tests execute."""

from __future__ import annotations

import re
import shlex

from helpers import ROOT


def blocks(page: str, language: str) -> list[str]:
    """The blocks ```LANGUAGE of a page, such as ``docs/using.md``."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def snippets(page: str, language: str) -> dict[str, str]:
    """Name -> text of the blocks ```LANGUAGE NAME, which name a file or a part."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return dict(re.findall(rf"^```{language} (\S+)\n(.*?)^```", text, re.M | re.S))


def commands(page: str) -> list[list[str]]:
    """The words of every line of the bash blocks of a page."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]

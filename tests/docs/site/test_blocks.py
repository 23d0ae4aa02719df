"""No example in the documents goes untested: each is executed, or excused here by name."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from helpers import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(python|bash|yaml)\b[^\n]*\n(.*?)^```$", re.M | re.S)

# (page, language) -> the test that takes every such block of the page.
EXECUTED = {
    ("README.md", "bash"): "docs/test_readme.py",
    ("README.md", "python"): "docs/test_readme.py",
    ("docs/choosing.md", "python"): "docs/test_docs_method.py",
    ("docs/data.md", "yaml"): "data/test_data_docs.py",
    ("docs/evaluation.md", "bash"): "docs/test_docs_evaluation.py",
    ("docs/evaluation.md", "yaml"): "docs/test_docs_evaluation.py",
    ("docs/extending.md", "bash"): "docs/test_docs_extending.py",
    ("docs/extending.md", "python"): "docs/test_docs_extending.py",
    ("docs/extending.md", "yaml"): "docs/test_docs_extending.py",
    ("docs/in_your_trainer.md", "python"): "docs/test_docs_method.py",
    ("docs/index.md", "bash"): "docs/site/test_tutorial.py",
    ("docs/own_subject.md", "bash"): "docs/test_own_subject.py",
    ("docs/playground.md", "bash"): "tools/playground/test_playground_command.py",
    ("docs/reference/config.md", "bash"): "docs/site/test_tutorial.py",
    ("docs/reliability.md", "bash"): "docs/site/test_tutorial.py",
    ("docs/rented_gpu.md", "bash"): "docs/test_quickstart.py",
    ("docs/remote_rewards.md", "bash"): "docs/test_docs_remote.py",
    ("docs/remote_rewards.md", "python"): "docs/test_docs_remote.py",
    ("docs/remote_rewards.md", "yaml"): "docs/test_docs_remote.py",
    ("docs/rewards.md", "yaml"): "rewards/test_rewards_doc.py",
    ("docs/tutorial.md", "bash"): "docs/site/test_tutorial.py",
    ("docs/tutorial.md", "python"): "docs/site/test_tutorial.py",
    ("docs/using.md", "bash"): "docs/test_using.py",
    ("docs/using.md", "python"): "docs/test_using.py",
    ("docs/watching.md", "bash"): "tools/watch/test_watching_doc.py",
    ("docs/watching.md", "python"): "tools/watch/test_watching_doc.py",
    ("docs/watching.md", "yaml"): "tools/watch/test_watching_doc.py",
}
# Tests that pick blocks by what is in them: a further one would pass them by.
PICKED = {
    ("docs/data.md", "yaml"): 7,
    ("docs/extending.md", "python"): 6,
    ("docs/extending.md", "yaml"): 6,
    ("docs/in_your_trainer.md", "python"): 3,
}

# (page, how the block begins) -> why it is not executed.
EXCUSED = {
    ("docs/distributed.md", "torchrun --standalone"): "eight GPUs, four machines; the same by two "
    "processes on a CPU: tests/runs/test_distributed.py",
    ("docs/evaluation.md", "torchrun --standalone"): "eight processes and DreamBench; the same by "
    "two and three: tests/evaluation/test_processes.py",
    ("docs/performance.md", "cgrpo estimate"): "measures for minutes; tests/test_benchmarks.py and "
    "tests/tools/estimate run these programs on less",
    ("docs/reliability.md", "#SBATCH"): "a cluster; exit codes and stopped.json: test_resume.py",
    ("docs/watching.md", "while"): "needs jq; what it reads: tools/watch/test_watch_command.py",
}


def blocks(page: Path) -> list[tuple[str, str]]:
    return FENCE.findall(page.read_text(encoding="utf-8"))


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def is_excused(page: str, text: str) -> bool:
    return any(page == where and text.startswith(start) for where, start in EXCUSED)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_is_executed_or_excused(page: Path) -> None:
    name = name_of(page)
    left = [language for language, text in blocks(page) if not is_excused(name, text)]
    unknown = {language for language in left if (name, language) not in EXECUTED}
    assert not unknown, f"execute these blocks of {name} in a test, and say so in EXECUTED"
    counts = Counter(left)
    picked = {lang: count for (where, lang), count in PICKED.items() if where == name}
    assert {language: counts[language] for language in picked} == picked


@pytest.mark.parametrize(("where", "test"), EXECUTED.items(), ids=lambda v: str(v))
def test_the_named_test_reads_the_page(where: tuple[str, str], test: str) -> None:
    page, language = where
    assert any(language == found for found, _ in blocks(ROOT / page)), "no such block any more"
    source = (ROOT / "tests" / test).read_text(encoding="utf-8")
    assert Path(page).stem in source
    assert (
        language in source or "BLOCKS" in source or (language == "bash" and "commands(" in source)
    )


def test_excuses_are_needed() -> None:
    for page, start in EXCUSED:
        assert any(text.startswith(start) for _, text in blocks(ROOT / page)), (page, start)

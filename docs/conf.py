"""The site: Markdown of this folder, which reads on GitHub too, and pages generated from the code.

`make docs` builds it into build/docs. What Markdown cannot say is added while a page is read: the
navigation, from the links of index.md, and the reference, from the code itself.
"""

from __future__ import annotations

import os
import re
import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from pygments.lexers.data import JsonLexer
from sphinx.application import Sphinx

_HERE = Path(__file__).parent
sys.path.insert(0, str(_HERE))
import _reference  # noqa: E402

os.environ["COLUMNS"] = "80"  # argparse wraps at the width of the terminal

project = "Customized-GRPO"
author = "the authors of Customized-GRPO"
release = installed_version("customized-grpo")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["results/*/*.md"]
default_role = "code"  # docstrings write code as Markdown does
smartquotes = False  # text of docstrings is often code
highlight_language = "text"  # of blocks that name none: formulas

myst_heading_anchors = 4  # the same anchors as on GitHub

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "Customized-GRPO"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
toc_object_entries_show_parents = "hide"


def navigation(index: str) -> str:
    """A hidden toctree for every heading of index.md that has links to pages below it."""
    trees = []
    for part in re.split(r"^## ", index, flags=re.M)[1:]:
        caption, _, body = part.partition("\n")
        links = re.findall(r"^\* \[([^\]]*)\]\(([\w/]+)\.md\)", body, re.M)
        pages = "\n".join(f"{title} <{page}>" for title, page in links)
        options = f":hidden:\n:caption: {caption}\n"
        trees += [f"```{{toctree}}\n{options}\n{pages}\n```\n"] if pages else []
    return "\n" + "\n".join(trees)


def offer(page: str, text: str) -> str:
    """Links to Markdown that is no page of the site become downloads."""

    def replaced(link: re.Match[str]) -> str:
        target = (_HERE / page).parent.joinpath(link[2]).resolve()
        is_page = _HERE in target.parents and _HERE / "results" not in target.parents
        return link[0] if is_page else f"{{download}}`{link[1]} <{link[2]}>`"

    return re.sub(r"\[([^\]]*)\]\(((?:\.\.|results)/[\w/.]+\.md)\)", replaced, text)


def complete(app: Sphinx, page: str, content: list[str]) -> None:
    """Adds to a page that is read what is generated for it."""
    content[0] = offer(page, content[0])
    if page == "index":
        content[0] += navigation(content[0])
    elif page in _reference.PAGES:
        content[0] += "\n" + _reference.PAGES[page]()


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("source-read", complete)
    app.add_lexer("jsonl", JsonLexer)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

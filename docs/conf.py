"""Sphinx configuration of the documentation site; `make docs` builds it and treats every warning as an error.

The pages are Markdown, read by MyST; code hosts render them too. For a link to a repository file outside the pages
(`../recipes/x.yaml`), the build checks that the file exists and shows the link text only.
"""

import re
from pathlib import Path
from typing import Any

from exporter.distribution import VERSION

ROOT = Path(__file__).parent.parent

project = "mmq"
author = "the mmq authors"
release = version = VERSION
extensions = ["myst_parser"]
exclude_patterns = ["_build", "__pycache__"]
html_theme = "furo"
html_title = f"mmq {release}"
html_copy_source = False
html_show_copyright = False
myst_heading_anchors = 4
myst_enable_extensions = ["attrs_inline"]
nitpicky = True


def check_repository_links(app: Any, name: str, source: list[str]) -> None:
    """Replace a link to a file outside the pages by its text if the file exists; otherwise the link fails the build."""
    pages = ROOT / "docs"

    def checked(link: re.Match[str]) -> str:
        target = ((pages / name).parent / link[2].partition("#")[0]).resolve()
        outside = target.is_relative_to(ROOT) and not target.is_relative_to(pages)
        return link[1] if outside and target.exists() else link[0]

    source[0] = re.sub(r"\[([^\]]+)\]\((\.\./[^)\s]+)\)", checked, source[0])


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", check_repository_links)

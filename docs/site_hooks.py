"""Hooks for the build of the site, called by mkdocs.

- The reference is read from a copy of the package whose links are followed.
- The page of public names is filled in.
- Links out of `docs/`, to files of the source, become plain text.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

_OUTSIDE = re.compile(
    r"\[([^\]]+)\]\((?:\.\./)+(?!docs/)([^)#\s]+)(?:#[^)\s]*)?\)"
)
_copies: list[str] = []


@event_priority(100)  # before mkdocstrings looks where to read
def on_config(config: Any) -> Any:
    """Copy the package, and have it read there."""
    root = Path(config.config_file_path).parent
    directory = tempfile.mkdtemp(prefix="foldlog-site-")
    _copies.append(directory)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(
        root / "foldlog", Path(directory) / "foldlog", ignore=ignore
    )
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [
        directory
    ]
    return config


def on_post_build(config: Any) -> None:
    """Remove the copy."""
    while _copies:
        shutil.rmtree(_copies.pop(), ignore_errors=True)


def without_links_outside(markdown: str, depth: int) -> str:
    """`markdown`, with links to the source written out. Its page is `depth` directories below
    `docs/`."""

    def plain(match: re.Match[str]) -> str:
        if match.group(0).count("../") != depth + 1:
            return match.group(0)
        text, target = match.group(1), match.group(2)
        return (
            text if target.rstrip("/") in text else f"{text} (`{target}`)"
        )

    return _OUTSIDE.sub(plain, markdown)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the page of public names, and write links to the source out."""
    if page.file.src_uri == "api.md":
        docs = Path(page.file.abs_src_path).parent
        sys.path.insert(0, str(docs))
        from public_names import filled_in

        markdown = filled_in(markdown, docs)
    return without_links_outside(markdown, page.file.src_uri.count("/"))

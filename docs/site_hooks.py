"""For the build of the site, called by mkdocs.

The reference is read from the source, whose packages lie side by side in a checkout: a copy of them is put together as the
installed package has them. And links that lead out of `docs/`, to a file of the source, become plain text.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?!docs/)([^)#\s]+)(?:#[^)\s]*)?\)")
_copies: list[str] = []


@event_priority(100)  # before mkdocstrings looks where to read
def on_config(config: Any) -> Any:
    """Put the package together, and have it read there."""
    root = Path(config.config_file_path).parent
    folder = tempfile.mkdtemp(prefix="foldlog-site-")
    _copies.append(folder)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(root / "foldlog", Path(folder) / "foldlog", ignore=ignore)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [folder]
    return config


def on_post_build(config: Any) -> None:
    """Remove the copy."""
    while _copies:
        shutil.rmtree(_copies.pop(), ignore_errors=True)


def without_links_outside(markdown: str, depth: int) -> str:
    """`markdown` of a page that lies `depth` folders below `docs/`, with the targets of links to the source written out."""

    def plain(match: re.Match[str]) -> str:
        if match.group(0).count("../") != depth + 1:
            return match.group(0)
        text, target = match.group(1), match.group(2)
        return text if target.rstrip("/") in text else f"{text} (`{target}`)"

    return _OUTSIDE.sub(plain, markdown)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Write links out of `docs/` out."""
    return without_links_outside(markdown, page.file.src_uri.count("/"))

"""For the build of the site: links that lead out of `docs/`, to a file of the source, become plain text there."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+(?!docs/)([^)#\s]+)(?:#[^)\s]*)?\)")


def without_links_outside(markdown: str, depth: int) -> str:
    """`markdown` of a page that lies `depth` folders below `docs/`, with the targets of links to the source written out."""

    def plain(match: re.Match[str]) -> str:
        if match.group(0).count("../") != depth + 1:
            return match.group(0)
        text, target = match.group(1), match.group(2)
        return text if target.rstrip("/") in text else f"{text} (`{target}`)"

    return _OUTSIDE.sub(plain, markdown)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs for each page."""
    return without_links_outside(markdown, page.file.src_uri.count("/"))

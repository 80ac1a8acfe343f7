"""For the build of the site: the page of all public names, from `foldlog.__all__` and docstrings.

Each name is listed under the reference page that documents it, with a link to its entry there.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import foldlog

MARK = "<!-- the list of names: docs/public_names.py -->"
"""In docs/api.md: where the list goes."""
UNDOCUMENTED = {
    "Event": "The type of everything a watch yields.",
    "Update": "The type `Put | Delete | Purge`.",
    "__version__": "The version of the library, as text.",
    "upstreams": "What can be mirrored: `NatsKv`, `Etcd` and `LogFile`, imported when used.",
}
"""Names without an entry in the reference: aliases, a module and a constant."""
_ENTRY = re.compile(r"^::: (foldlog\.(?:\w+\.)*(\w+))$", flags=re.MULTILINE)
_TITLE = re.compile(r"^# (.+)$", flags=re.MULTILINE)


def summary(name: str) -> str:
    """The first sentence of a name's docstring, on one line."""
    if name in UNDOCUMENTED:
        return UNDOCUMENTED[name]
    paragraph = " ".join(
        (inspect.getdoc(getattr(foldlog, name)) or "")
        .split("\n\n")[0]
        .split()
    )
    return re.split(r"(?<=\.) (?=[A-Z])", paragraph, maxsplit=1)[0]


def entries(page: Path) -> dict[str, str]:
    """The public names that a page of the reference documents, with their full names."""
    found = {
        match[2]: match[1]
        for match in _ENTRY.finditer(page.read_text(encoding="utf-8"))
    }
    return {
        name: full
        for name, full in found.items()
        if name in foldlog.__all__
    }


def lines(docs: Path) -> Iterator[str]:
    """The list, as Markdown."""
    for page in sorted((docs / "reference").glob("*.md")):
        documented = entries(page)
        if documented:
            title = _TITLE.search(page.read_text(encoding="utf-8"))
            yield f"\n## {title[1] if title else page.stem}\n"
            for name in sorted(documented):
                link = f"reference/{page.name}#{documented[name]}"
                yield f"- [`{name}`]({link}): {summary(name)}"
    yield "\n## Others\n"
    for name in sorted(UNDOCUMENTED):
        yield f"- `{name}`: {summary(name)}"


def filled_in(markdown: str, docs: Path) -> str:
    """The text of docs/api.md with the list in place of its mark."""
    return markdown.replace(MARK, "\n".join(lines(docs)))

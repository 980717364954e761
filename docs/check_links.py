"""Does every link within the built site lead somewhere? ``python docs/check_links.py SITE`` exits with 1 if not."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """What a page offers to link to, and what it links to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        for key, value in attrs:
            if key in ("id", "name") and value:
                self.ids.add(value)
            elif key in ("href", "src") and value and tag not in ("use", "g"):
                self.links.add(value)


def dead_links(site: Path) -> list[str]:
    """One line for each."""
    # asv's pages have places that a script makes
    ours = [path for path in sorted(site.rglob("*.html")) if not {"_static", "asv"} & set(path.relative_to(site).parts)]
    pages = {path: Page(path) for path in ours}
    dead = []
    for path, page in pages.items():
        for link in sorted(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
            if not target.exists():
                dead.append(f"{path.relative_to(site)}: {link} does not exist")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids:
                dead.append(f"{path.relative_to(site)}: {link} names no place in that page")
    return dead


if __name__ == "__main__":
    found = dead_links(Path(sys.argv[1]).resolve())
    sys.stdout.write("".join(line + "\n" for line in found))
    sys.exit(1 if found else 0)

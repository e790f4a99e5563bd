"""What the documentation site adds to the pages in docs/: called by mkdocs (`make docs`).

`python scripts/docs_hooks.py` writes docs/reference/keys.md from the schema; a test holds that it is current. The pages of
policies (`scripts/policy_pages.py`) are made when the site is built.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
for place in (ROOT, ROOT / "scripts"):
    if str(place) not in sys.path:
        sys.path.insert(0, str(place))
import policy_pages  # noqa: E402  # mkdocs takes the folder from the path again after this import

KEYS = ROOT / "docs" / "reference" / "keys.md"
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)(?:#[^)]*)?\)")
"""A link to a file by a path that goes up."""
ROW = re.compile(r"^\| `(\w+)`", re.MULTILINE)
"""The beginning of a policy's row in docs/policies.md."""


def on_config(config: Any) -> Any:
    """Add the pages of policies to the navigation, after the page that lists them."""
    from a2sf.policies.find import built_in

    pages = [{built_in()[name].label: f"{policy_pages.FOLDER}/{name}.md"} for name in policy_pages.names()]
    for section in config.nav:
        for entries in section.values():
            at = next((i for i, e in enumerate(entries) if e == {"Policies": "policies.md"}), None)
            if isinstance(entries, list) and at is not None:
                entries.insert(at + 1, {"Each policy": pages})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of policies."""
    from mkdocs.structure.files import File

    for name in policy_pages.names():
        path = f"{policy_pages.FOLDER}/{name}.md"
        files.append(File.generated(config, path, content=policy_pages.policy_page(name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files of the repository that are no pages become the files' names; names of policies become links."""

    def named(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), link[2]))
        if path.startswith("docs/"):
            return link[0]
        assert (ROOT / path).exists(), f"{page.file.src_uri} links to {path}, which is not there"
        return link[1] if link[1].strip("`") == path else f"{link[1]} (`{path}`)"

    if page.file.src_uri == "policies.md":
        markdown = ROW.sub(r"| [`\1`](policies/\1.md)", markdown)
    return LINK.sub(named, markdown)


def keys_page() -> str:
    """The reference of configuration keys, in Markdown, from the dataclasses of `a2sf.sweep.config.schema`."""
    from a2sf.commands.run import key_table

    head = """# Keys

<!-- written by scripts/docs_hooks.py from a2sf/sweep/config/schema.py; do not edit -->
Every key can be set (`key=value`) and swept (`-m key=a,b,c`). Unknown keys and values that are not allowed are refused
before anything is loaded. `a2sf run --help` prints the same, with the files that each group has: `model`
(default `smollm2-135m`), `policy` (`a2sf`), `data` (`hub`), `schedule` (none) and `tracker` (none) are set to the
name of a file in `conf/`.

| key | default | meaning |
|---|---|---|
"""
    rows = (
        f"| `{key}` | {f'`{default}`' if default else ''} | {about.replace('|', chr(92) + '|')} |"
        for key, default, about in key_table(full=True)
    )
    return head + "\n".join(rows) + "\n"


if __name__ == "__main__":
    KEYS.write_text(keys_page(), encoding="utf-8")

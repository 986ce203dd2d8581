"""What the package's page on an index shows: README with links that work there, and the project's addresses.

All of it follows from one address, that of the repository: ``repository`` of ``[tool.hatch.metadata.hooks.custom]`` in
`pyproject.toml`, in whose place the environment variable ``RECOLLECT_REPOSITORY`` is taken if it is set, as the release
workflow does. Where neither is known, relative links become their text and pictures are left out: a page has no dead
link.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_BLOCK = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^()\s]+)\)")
_ABSOLUTE = re.compile(r"[a-z][a-z+.-]*:|#")


class PackagePage(MetadataHookInterface):
    """The hook that hatchling calls for the fields that `pyproject.toml` calls dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set ``readme``, and ``urls`` if the repository's address is known."""
        repository = (os.environ.get("RECOLLECT_REPOSITORY") or self.config.get("repository", "")).rstrip("/")
        tag = f"v{metadata['version']}"
        readme = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": page(readme, repository, tag)}
        metadata["urls"] = urls(repository, tag)


def page(text: str, repository: str, tag: str) -> str:
    """Make a page's relative links absolute, to the files of a tag; or text, if there is no repository.

    Blocks of code stay as they are. Pictures are addressed as files, everything else as pages.
    """

    def absolute(link: re.Match[str]) -> str:
        picture, label, target = link.groups()
        if _ABSOLUTE.match(target):
            return link[0]
        if not repository:
            return "" if picture else label
        return f"{picture}[{label}]({repository}/{'raw' if picture else 'blob'}/{tag}/{target})"

    parts = _BLOCK.split(text)  # every second one is a block of code
    parts[::2] = [_LINK.sub(absolute, part) for part in parts[::2]]
    return "".join(parts)


def urls(repository: str, tag: str) -> dict[str, str]:
    """The project's addresses, none if there is no repository."""
    if not repository:
        return {}
    return {
        "Repository": repository,
        "Documentation": f"{repository}/tree/{tag}/docs",
        "Changelog": f"{repository}/blob/{tag}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }

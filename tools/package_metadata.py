"""Hook of hatchling: the long description on PyPI, and the links to the repository.

SAMEKIT_REPOSITORY is the address of the repository, in the form of GitHub. Links in the README lead to files of the
repository, which PyPI does not have. So they get this address, or become plain text if there is none.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


class PackageMetadata(MetadataHookInterface):
    """Set `readme` and `urls`, unless they come from the PKG-INFO of an sdist."""

    def update(self, metadata: dict[str, Any]) -> None:
        repository = os.environ.get("SAMEKIT_REPOSITORY", "").rstrip("/")
        tag = f"v{metadata['version']}"
        if "readme" in metadata["dynamic"]:
            text = Path(self.root, "README.md").read_text(encoding="utf-8")
            metadata["readme"] = {"content-type": "text/markdown", "text": long_description(text, repository, tag)}
        if "urls" in metadata["dynamic"] and repository:
            metadata["urls"] = {
                "Homepage": repository,
                "Documentation": f"{repository}/blob/{tag}/docs/README.md",
                "Changelog": f"{repository}/blob/{tag}/CHANGELOG.md",
                "Issues": f"{repository}/issues",
            }


def long_description(readme: str, repository: str, tag: str) -> str:
    """Return the README with absolute links and pictures; without a repository, with their texts in their place."""

    def replaced(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        if not repository:
            return text
        # PyPI gives headings no anchors.
        file = f"README.md{target}" if target.startswith("#") else target
        return f"{mark}[{text}]({repository}/{'raw' if mark else 'blob'}/{tag}/{file})"

    return re.sub(r"(!?)\[([^]]*)\]\((?!https?:)([^)]*)\)", replaced, readme)

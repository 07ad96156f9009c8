"""Write the documents and the API reference as a site to build/docs; a broken link is an error."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import reference

ROOT = Path(__file__).parents[1]
SITE = ROOT / "tools" / "site"
FOLDER = Path("build", "docs")
SOURCES = Path("build", "documents")
# They keep their paths, so that their links work in the repository and in the site.
DOCUMENTS = ("*.md", "docs/*", "benchmarks/*.md", "export/samekit_export/same-tiny/*.md")


def main() -> None:
    """Gather the documents, write the reference beside them, and make a site of both."""
    shutil.rmtree(SOURCES, ignore_errors=True)
    for path in (path for pattern in DOCUMENTS for path in ROOT.glob(pattern)):
        target = SOURCES / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    shutil.copy(SITE / "iframe-worker.js", SOURCES)
    reference.write(SOURCES / "reference")
    # MkDocs reads paths relative to this file.
    settings = shutil.copy(SITE / "mkdocs.yml", SOURCES.parent)
    build = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--config-file", settings]
    # Material recommends its successor in every build.
    done = subprocess.run(build, check=False, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    if done.returncode:
        sys.exit(done.returncode)
    sys.stdout.write(f"{FOLDER / 'index.html'}\n")


if __name__ == "__main__":
    main()

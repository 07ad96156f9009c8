"""Export `same-tiny`, encode and decode a piece of music with every backend, and write a report.

Writes `demo/piece.flac`, `engines/same-tiny` and `demo/report.html`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from samekit.backends.base import has_driver
from samekit.demo import MODEL, write_piece
from samekit.engine.folder import ENGINES_FOLDER
from samekit.engine.spec import PRECISIONS
from samekit_export.checkpoint import load
from samekit_export.cli import progress_on_stdout
from samekit_export.export import export
from samekit_export.report import write_report
from samekit_export.to_tensorrt import AUTO, add_engines
from samekit_export.verify import FLOOR_DB

FOLDER = Path("demo")


def main() -> None:
    """Run the demo; exit with an error if an engine differs from PyTorch."""
    piece, page = FOLDER / "piece.flac", FOLDER / "report.html"
    FOLDER.mkdir(exist_ok=True)
    write_piece(piece)
    with progress_on_stdout():
        engine = export(load(MODEL), Path(ENGINES_FOLDER), PRECISIONS)
        # Without a GPU, TensorRT does not concern the user, and one line would say that it is left out.
        if has_driver():
            add_engines(engine, PRECISIONS, AUTO)
        report = write_report(piece, engine, page)
    print(f"\n{piece} through {MODEL}:\n\n{report.table()}\n\nListen and look: {page.resolve().as_uri()}")
    worst = min(row.audio_db for row in report.rows if row.precision == "fp32")
    if worst < FLOOR_DB["fp32"]:
        sys.exit(f"an engine does not equal PyTorch: {worst:.1f} dB")


if __name__ == "__main__":
    main()

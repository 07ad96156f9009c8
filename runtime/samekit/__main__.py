"""Run the `samekit` command by `python -m samekit`."""

from __future__ import annotations

from samekit.cli.main import main

if __name__ == "__main__":
    main(prog_name="samekit")

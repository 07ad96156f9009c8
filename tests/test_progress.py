"""Progress bars: invalid settings of tqdm never stop the work, and valid ones are used."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

PROGRAM = """
import time
from samekit.dataset.report import Progress
from samekit.dataset.progress import Display, bar

with bar(total=3, unit="frame") as shown:
    for _ in range(3):
        time.sleep(0.15)
        shown.update(1)
with Display() as display:
    for done in range(1, 4):
        time.sleep(0.15)
        display(Progress(done, 3, 0, 1.0, 1.0))
print("the work is done")
"""


def shown_on_a_terminal(environment):
    """Return the standard output of the program, and what it wrote to its terminal."""
    terminal, side = pty.openpty()
    try:
        # 24 rows of 80 columns; a new terminal has none, and tqdm draws nothing there.
        fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdout=subprocess.PIPE,
            stderr=side,
            env=os.environ | environment,
            text=True,
        )
        output, _ = process.communicate(timeout=60)
        os.write(side, b"END")
        seen = b""
        while not seen.endswith(b"END"):
            seen += os.read(terminal, 4096)
    finally:
        os.close(terminal)
        os.close(side)
    assert process.returncode == 0, seen
    return output, seen.removesuffix(b"END").decode()


@pytest.mark.parametrize(
    "environment",
    [{"TQDM_ASCII": "x"}, {"TQDM_BAR_FORMAT": "{nothing}"}, {"TQDM_DELAY": "-1", "TQDM_NCOLS": "x"}],
    ids=str,
)
def test_bar_that_cannot_be_drawn_stops_no_work(environment):
    output, seen = shown_on_a_terminal(environment)
    assert output == "the work is done\n"
    assert "Traceback" not in seen


def test_bar_that_is_switched_off_is_off():
    assert shown_on_a_terminal({"TQDM_DISABLE": "1"}) == ("the work is done\n", "")


def test_progress_is_not_printed_to_standard_output():
    """A shell closes standard error with `2>&-`, and then Python has none."""
    closed = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", PROGRAM]
    done = subprocess.run(closed, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "the work is done\n"


def test_bar_is_shown_on_a_terminal():
    output, seen = shown_on_a_terminal({})
    assert output == "the work is done\n"
    assert "3/3" in seen
    assert "s of audio/s" in seen

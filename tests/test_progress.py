"""Progress bars: invalid settings of tqdm never stop the work, and valid ones are used."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from samekit.dataset.progress import AudioDisplay
from samekit.dataset.report import Progress
from samekit_export.progress import logged

PROGRAM = """
import time
from samekit.dataset.report import Progress
from samekit.dataset.progress import AudioDisplay, Display

with AudioDisplay("encoding song.wav", 3.0) as shown:
    for _ in range(3):
        time.sleep(0.15)
        shown.advance(1.0)
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
    assert "encoding song.wav: |" in seen
    assert re.search(r"3 of 3 s of audio \[00:00, \d\.\d x real time\]", seen)
    assert "3/3" in seen
    assert "1.0 x real time, 0 bad" in seen


def test_lines_in_a_log():
    """Without a terminal, there is a line at the start and one every ten seconds."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60)
    first, second, third = done.stderr.splitlines()
    assert first == "encoding song.wav: 3 s of audio"
    assert second.startswith("1 of 3 clips, 1 s of audio at 1.0 x real time, ")
    assert third.startswith("3 of 3 clips")


def test_lines_come_every_ten_seconds(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("samekit.dataset.progress.time.monotonic", lambda: now[0])
    with AudioDisplay("decoding a.npy", 100.0) as known, AudioDisplay("encoding b.mp3", None) as unknown:
        for _ in range(5):
            now[0] += 5.0
            known.advance(20.0)
            unknown.advance(20.0)
    assert capsys.readouterr().err.splitlines() == [
        "decoding a.npy: 100 s of audio",
        "encoding b.mp3",
        "decoding a.npy: 40 of 100 s of audio, 4.0 x real time",
        "encoding b.mp3: 40 s of audio, 4.0 x real time",
        "decoding a.npy: 80 of 100 s of audio, 4.0 x real time",
        "encoding b.mp3: 80 s of audio, 4.0 x real time",
    ]


def test_progress_after_an_earlier_run():
    progress = Progress(done=70, total=100, bad=0, audio_seconds=100.0, elapsed=10.0, earlier=60)
    assert progress.describe() == "70 of 100 clips, 100 s of audio at 10.0 x real time, 0:00:30 left, 0 bad"


def test_long_loops_log_how_far_they_are(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr("samekit_export.progress.time.monotonic", lambda: now[0])
    caplog.set_level("INFO")
    for _ in logged(["a", "b", "c"], "rounding"):
        now[0] += 4.0
    assert caplog.messages == ["rounding: 2 of 3 done"]

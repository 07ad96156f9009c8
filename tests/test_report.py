"""The report page: its figures, that it is one file, and how a browser shows and plays it."""

from __future__ import annotations

import dataclasses
import html.parser

import numpy as np
import pytest
import soundfile as sf
from click.testing import CliRunner
from helpers import HOP, RATE, assert_one_line, noise

from samekit.backends.selection import BACKENDS
from samekit.cli.main import main
from samekit.errors import InputError, OutputError
from samekit_export.report import COLUMNS, measure, page_of, write_report

FILE_NAME = 'a "song" <b> & more.wav'
SECONDS = 1.0


class Page(html.parser.HTMLParser):
    """The elements and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def attributes(self, tag, name):
        return [attributes.get(name) for found, attributes in self.elements if found == tag]


@pytest.fixture(scope="module")
def song(tmp_path_factory):
    path = tmp_path_factory.mktemp("audio") / FILE_NAME
    sf.write(path, noise((int(2 * SECONDS * 22_050), 2), level=0.1), 22_050, "PCM_16")
    return path


@pytest.fixture(scope="module")
def measured(engine_of, song):
    return measure(song, engine_of("tiny-s"), seconds=SECONDS, threads=1)


@pytest.fixture(scope="module")
def page(measured, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page_of(measured), encoding="utf-8")
    return path


def test_every_backend_is_measured_or_named(measured):
    rows = {(row.backend, row.precision): row for row in measured.rows}
    missing = {tuple(reason.split(":")[0].split()[:2]) for reason in measured.left_out}
    assert set(rows) | missing == {(name, "fp32") for name in BACKENDS if name != "auto"}
    assert not set(rows) & missing
    eager, engine = rows["torch", "fp32"], rows["onnxruntime", "fp32"]
    assert np.isposinf([eager.latents_db, eager.audio_db]).all()
    assert 90 < engine.latents_db < 200
    assert 90 < engine.audio_db < 200
    # Random weights reproduce nothing of their input.
    assert engine.round_trip_db < 3
    assert eager.loss_db == 0
    assert engine.loss_db == eager.round_trip_db - engine.round_trip_db
    assert min(engine.encode_speed, engine.decode_speed) > 0


def test_it_takes_as_much_as_it_was_told(measured):
    assert measured.original.shape == measured.decoded.shape == (2, RATE * SECONDS)
    assert measured.latents.shape == (32, -(-RATE // HOP))


def test_terminal_and_page_show_the_same(measured, page):
    shown = Page(page.read_text(encoding="utf-8")).text
    table = measured.table()
    assert all(name in shown for name in COLUMNS)
    for row in measured.rows:
        for cell in row.cells():
            assert cell in shown
            assert cell in table
    for reason in measured.left_out:
        assert f"Not run: {reason}" in shown
        assert f"not run: {reason}" in table


@pytest.mark.parametrize(
    ("speed", "shown"), [(0.04, "0.0"), (0.94, "0.9"), (9.94, "9.9"), (10.4, "10"), (123.6, "124")]
)
def test_slow_speeds_have_a_decimal(measured, speed, shown):
    row = dataclasses.replace(measured.rows[0], encode_speed=speed, decode_speed=1)
    assert row.cells()[-2:] == (f"{shown} x real time", "1.0 x real time")


@pytest.mark.parametrize(
    ("loss", "shown"), [(0.0, "0.00 dB"), (-0.001, "0.00 dB"), (0.234, "0.23 dB"), (-0.2, "-0.20 dB"), (np.nan, "-")]
)
def test_loss_of_the_round_trip(measured, loss, shown):
    cell = dataclasses.replace(measured.rows[0], loss_db=loss).cells()[6]
    assert (COLUMNS[6], cell) == ("round trip, loss against eager fp32", shown)


@pytest.mark.parametrize("name", ["song.wav", "page"])
def test_no_audio_is_overwritten_by_a_page(bundled_engine, tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(InputError, match=r"choose a name that ends in \.html") as caught:
        write_report(tmp_path / name, bundled_engine, tmp_path / name)
    assert_one_line(caught.value)
    assert (tmp_path / name).read_bytes() == b"mine"


def test_page_is_one_file(page):
    text = page.read_text(encoding="utf-8")
    found = Page(text)
    links = [value for tag in ("audio", "img") for value in found.attributes(tag, "src")]
    assert [link.split(";")[0] for link in links] == ["data:audio/flac"] * 2 + ["data:image/png"] * 3
    assert {tag for tag, _ in found.elements} & {"script", "link", "iframe", "object", "embed"} == set()
    assert "default-src 'none'" in text
    assert "//" not in "".join(part.split('"')[0] for part in text.split("base64,")[1:] if "http" in part)


def test_names_are_shown_as_they_are(page):
    found = Page(page.read_text(encoding="utf-8"))
    assert FILE_NAME in found.text
    assert "b" not in {tag for tag, _ in found.elements}


def test_without_a_float32_graph(engine_of, song):
    engine = engine_of("tiny-s")
    engine = dataclasses.replace(engine, spec=dataclasses.replace(engine.spec, graphs={}))
    (row,) = measure(song, engine, seconds=0.1, threads=1).rows
    assert row.cells()[:3] == ("torch", "fp32", "-")


def test_full_disk(engine_of, song, measured, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("samekit_export.report.measure", lambda *_, **__: measured)
    monkeypatch.setattr("pathlib.Path.write_text", full)
    with pytest.raises(OutputError, match="No space left"):
        write_report(song, engine_of("tiny-s"), tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_silence_can_be_shown(engine_of, tmp_path):
    sf.write(tmp_path / "silence.wav", np.zeros((100, 1)), RATE)
    page = page_of(measure(tmp_path / "silence.wav", engine_of("tiny-s"), threads=1))
    assert "-inf dB" in Page(page).text


def test_system_without_a_load(measured, monkeypatch):
    """Windows does not report the load."""
    monkeypatch.delattr("os.getloadavg")
    text = Page(page_of(measured)).text
    assert " cores;" in text
    assert "load" not in text


def test_more_seconds_than_any_file_has(bundled_engine, tmp_path):
    sf.write(tmp_path / "short.wav", noise((100, 1)), RATE)
    measured = measure(tmp_path / "short.wav", bundled_engine, seconds=1e308, threads=1)
    assert measured.original.shape[1] == 100


def test_command(engine_of, song, tmp_path):
    out = tmp_path / "page.html"
    arguments = [song, "--model", engine_of("tiny-s").folder, "--out", out, "--seconds", 0.2, "--threads", 1]
    result = CliRunner().invoke(main, ["report", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert "onnxruntime" in result.stdout
    assert out.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"audio": "nowhere.wav"}, "nowhere.wav"),
        ({"--model": "same-x"}, "same-x"),
        ({"--out": "no/such/folder.html"}, "folder.html"),
        ({"--seconds": "-1"}, "seconds"),
        ({"--seconds": "nan"}, "seconds"),
    ],
    ids=str,
)
def test_refusals(engine_of, song, tmp_path, monkeypatch, changes, cause):
    monkeypatch.chdir(tmp_path)
    options = {"--model": engine_of("tiny-s").folder, "--out": "page.html", "--seconds": 0.1, "--threads": 1}
    audio = changes.pop("audio", song)
    options |= changes
    flat = [str(part) for option in options.items() for part in option]
    result = CliRunner().invoke(main, ["report", str(audio), *flat])
    assert result.exit_code == 2, repr(result.exception)
    assert cause in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_browser_plays_and_shows_it(browser, page):
    requests, complaints = [], []
    tab = browser.new_page()
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: complaints.append(message.text))
    tab.goto(page.as_uri())
    tab.wait_for_function("[...document.querySelectorAll('audio')].every(a => a.readyState == 4)", timeout=30_000)
    players = tab.evaluate("[...document.querySelectorAll('audio')].map(a => a.duration)")
    widths = tab.evaluate("[...document.images].map(i => i.naturalWidth)")
    # The audio is played, not only loaded. It is muted, because browsers block sound before a click.
    played = tab.evaluate(
        "Promise.all([...document.querySelectorAll('audio')].map(async a => "
        "{ a.muted = true; await a.play(); await new Promise(r => a.onended = r); return a.currentTime }))"
    )
    tab.close()
    assert players == pytest.approx([SECONDS, SECONDS], abs=0.01)
    assert played == pytest.approx([SECONDS, SECONDS], abs=0.05)
    assert len(widths) == 3
    assert min(widths) > 500
    assert [url for url in requests if not url.startswith("data:")] == [page.as_uri()]
    assert complaints == []

"""The page at `/` of `samekit serve`, in a browser, and the example client."""

from __future__ import annotations

from importlib import resources

import numpy as np
import pytest
import serve_client
import soundfile as sf
from helpers import FakeBackend, noise
from load_server import Server
from test_report import Page

PAGE = resources.files("samekit.serving") / "page.html"
RATE = 22_050
SECONDS = 1.5
TOKEN = "a secret of the tests"


@pytest.fixture(scope="module")
def song(tmp_path_factory):
    path = tmp_path_factory.mktemp("audio") / "a <b> & song.wav"
    sf.write(path, noise((int(SECONDS * RATE), 2), level=0.1), RATE, "PCM_16")
    return path


def test_page_is_one_small_file():
    text = PAGE.read_text(encoding="utf-8")
    page = Page(text)
    assert len(text) < 10_000
    assert not {"script", "img", "iframe"} & {tag for tag, found in page.elements if "src" in found}
    assert page.attributes("link", "href") == ["data:,"]
    assert "//" not in text.replace("// ", "")
    labels = page.attributes("label", "for")
    assert "token" in labels


@pytest.fixture(scope="module")
def serve(small_engine, tmp_path_factory):
    """Return a function that starts a server with further environment variables: name=value -> Server."""
    servers = []

    def start(**environment):
        servers.append(Server(small_engine, tmp_path_factory.mktemp("server"), environment=environment))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def server(serve):
    return serve()


@pytest.fixture
def tab(browser, server):
    tab = browser.new_page()
    tab.requests, tab.complaints = [], []
    tab.on("request", lambda request: tab.requests.append(request.url))
    tab.on("console", lambda message: tab.complaints.append(message.text))
    tab.on("pageerror", lambda error: tab.complaints.append(str(error)))
    tab.goto(server.url)
    yield tab
    tab.close()


def texts(tab):
    return {name: tab.text_content(f"#{name}") for name in ("name", "duration", "latents", "time", "status")}


def wait(tab, status):
    tab.wait_for_function("status => document.getElementById('status').textContent.includes(status)", arg=status)


@pytest.mark.slow
def test_file_is_encoded_decoded_and_played(tab, server, song):
    tab.set_input_files("#file", song)
    wait(tab, "Done.")
    spec = FakeBackend().spec
    latents = spec.latents(round(SECONDS * spec.sample_rate))
    shown = texts(tab)
    assert shown["name"] == song.name
    assert shown["duration"] == "1.50 s"
    assert shown["latents"] == f"{spec.latent_width} \N{MULTIPLICATION SIGN} {latents}"
    assert shown["time"].count(" s to ") == 2
    durations = tab.evaluate("[...document.querySelectorAll('audio')].map(a => a.duration)")
    assert durations == pytest.approx([SECONDS, latents * spec.hop / spec.sample_rate], abs=0.01)
    # Both recordings are played, not only loaded, and the button continues at the same position.
    positions = tab.evaluate(
        "(async () => { const [a, b] = document.querySelectorAll('audio'); a.muted = b.muted = true; await a.play();"
        " await new Promise(r => setTimeout(r, 500)); document.getElementById('switch').click();"
        " const at = a.currentTime; await new Promise(r => b.onended = r); return [at, b.currentTime, a.paused] })()"
    )
    assert positions[0] > 0.2
    assert positions[1] == pytest.approx(durations[1], abs=0.05)
    assert positions[2]
    local = (server.url, "blob:", "data:")
    assert [url for url in tab.requests if not url.startswith(local)] == []
    assert tab.complaints == []


@pytest.mark.slow
def test_file_that_is_dropped_beside_the_field(tab, song):
    transfer = tab.evaluate_handle(
        "bytes => { const t = new DataTransfer(); t.items.add(new File([new Uint8Array(bytes)], 'x.wav')); return t }",
        list(song.read_bytes()),
    )
    tab.dispatch_event("h1", "drop", {"dataTransfer": transfer})
    wait(tab, "Done.")
    assert texts(tab)["name"] == "x.wav"


@pytest.mark.slow
def test_error_is_the_line_of_the_server(tab, song, tmp_path):
    damaged = tmp_path / "damaged.wav"
    damaged.write_bytes(song.read_bytes()[:30])
    tab.set_input_files("#file", damaged)
    tab.wait_for_selector("#status.error")
    line = texts(tab)["status"]
    assert "; " in line
    assert str(tmp_path) not in line
    assert tab.is_hidden("#result")
    tab.set_input_files("#file", song)
    wait(tab, "Done.")
    assert tab.is_visible("#result")


@pytest.mark.slow
def test_field_for_a_token_appears_where_the_server_asks_for_one(browser, serve, song):
    tab = browser.new_page()
    tab.goto(serve(SAMEKIT_TOKEN=TOKEN).url)
    wait(tab, "This server needs an access token.")
    tab.get_by_label("Access token").fill(TOKEN)
    tab.get_by_label("Access token").blur()
    tab.wait_for_selector("#model:has-text('with fake')")
    tab.set_input_files("#file", song)
    wait(tab, "Done.")
    assert np.isfinite(tab.evaluate("document.getElementById('decoded').duration"))
    tab.close()


@pytest.mark.slow
def test_no_field_for_a_token_where_none_is_asked_for(tab):
    tab.wait_for_selector("#model:has-text('with fake')")
    assert tab.is_hidden("#token")


@pytest.mark.slow
def test_example_client(server, song):
    serve_client.main(str(song), server.url)
    latents = np.load(f"{song}.npy")
    assert sf.info(f"{song}.decoded.wav").frames == latents.shape[1] * FakeBackend().spec.hop

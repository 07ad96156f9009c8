"""The steps of the Dockerfile, run without a container engine."""

from __future__ import annotations

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_package import build

ROOT = Path(__file__).parents[1]
# The instructions, each with its continued lines in one.
INSTRUCTIONS = [
    line.split(maxsplit=1)
    for line in re.sub(r"\\\n *", "", (ROOT / "Dockerfile").read_text(encoding="utf-8")).splitlines()
    if line and not line.startswith("#")
]
VARIABLES = dict(
    argument.split("=", 1)
    for name, arguments in INSTRUCTIONS
    if name in ("ARG", "ENV")
    for argument in arguments.split()
)


def only(name):
    (arguments,) = [arguments for each, arguments in INSTRUCTIONS if each == name]
    return arguments


def copy_context(folder):
    """Copy the files that `.dockerignore` leaves; it excludes everything but the names that it lists."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in lines
    for name in (line[1:] for line in lines if line.startswith("!")):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (folder / name).parent.mkdir(exist_ok=True)
        copy(ROOT / name, folder / name)


def run_health_check(cmdline, port, tmp_path):
    """Run the health check as if the first process of the container had these arguments."""
    (tmp_path / "cmdline").write_bytes(b"\0".join(map(str.encode, cmdline)) + b"\0")
    command = json.loads(only("HEALTHCHECK").split("CMD ")[1])
    command[-1] = command[-1].replace("/proc/1/cmdline", str(tmp_path / "cmdline")).replace(":8000/", f":{port}/")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, env=environment, capture_output=True, check=False, timeout=60).returncode


@contextmanager
def server(status):
    """Answer GET /healthz with a status, and yield the port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield listening.server_port
        listening.shutdown()


@pytest.mark.parametrize("status", [200, 503])
def test_health_of_a_server_is_its_answer(status, tmp_path):
    with server(status) as port:
        healthy = run_health_check(["python", "samekit", "serve", "same-s"], port, tmp_path) == 0
    assert healthy == (status == 200)


def test_health_of_a_server_that_does_not_listen(tmp_path):
    with server(200) as port:
        pass
    assert run_health_check(["docker-init", "--", "samekit", "serve", "same-s"], port, tmp_path) != 0
    # Other commands have no server.
    assert run_health_check(["python", "samekit", "encode", "serve.wav", "a.npy"], port, tmp_path) == 0


def test_commands_run_as_a_user_who_may_write_only_to_tmp():
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", only("USER"))
    assert VARIABLES["HOME"] == "/tmp"
    assert json.loads(only("ENTRYPOINT")) == ["samekit"]


def test_context_holds_what_a_wheel_is_built_from(tmp_path):
    (tmp_path / "src").mkdir()
    copy_context(tmp_path / "src")
    (wheel,) = build(tmp_path / "src", tmp_path / "dist", "--wheel").iterdir()
    with zipfile.ZipFile(wheel) as file:
        assert {"samekit/serving/page.html", "samekit_export/cli.py"} <= set(file.namelist())


@pytest.mark.slow
def test_installation_in_an_empty_environment(tmp_path, engine_of):
    """Run the installation with the same paths below another folder, then the program on a mounted engine."""
    context, prefix = tmp_path / "src", tmp_path / "samekit"
    context.mkdir()
    copy_context(context)
    # The pip of this user may have settings that this machine needs, such as another index.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    step = only("RUN").replace("python -m venv", f"{sys.executable} -m venv").replace("/opt/samekit", str(prefix))
    done = subprocess.run(
        ["sh", "-c", step],
        cwd=context,
        env=environment | {"EXTRAS": VARIABLES["EXTRAS"]},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert "does not provide the extra" not in done.stdout + done.stderr
    engine = engine_of("tiny-s").folder
    for arguments in (["--help"], ["info", str(engine)], ["doctor"]):
        done = subprocess.run(
            [prefix / "bin" / "samekit", *arguments], cwd=tmp_path, env=environment, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert not list(prefix.rglob("site-packages/torch"))

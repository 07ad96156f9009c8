"""What samekit's tests have not run on a GPU says so, once in a process."""

from __future__ import annotations

import logging
from contextlib import suppress

import pytest

from samekit.backends.experimental import RAY, SERVE, TRITON, warn_experimental
from samekit.dataset.ray import RayExecutor, RayOptions
from samekit.engine.folder import Engine
from samekit.errors import EngineNotFoundError
from samekit.serving.options import ServeOptions
from samekit.serving.server import run
from samekit.serving.triton import TritonOptions, write_repository


def ray(engine, folder, *, gpu):
    RayExecutor(engine, RayOptions(gpus_per_actor=int(gpu)))


def triton(engine, folder, *, gpu):
    write_repository(Engine.load(engine), folder, TritonOptions(kind="gpu" if gpu else "cpu"))


def serve(engine, folder, *, gpu):
    # It says so before anything is started.
    options = ServeOptions(model=str(folder / "no engine"), gpus_per_replica=int(gpu))
    with suppress(EngineNotFoundError), run(options, port=0):
        pytest.fail("a model that does not exist was served")


# The TensorRT backend is in `test_tensorrt.py`.
@pytest.mark.parametrize(("path", "open_"), [(RAY, ray), (TRITON, triton), (SERVE, serve)])
def test_the_notice(small_engine, tmp_path, monkeypatch, caplog, path, open_):
    monkeypatch.setattr("samekit.serving.server.count_gpus", lambda: 1)
    caplog.set_level(logging.WARNING, "samekit")
    warn_experimental.cache_clear()
    open_(small_engine, tmp_path / "cpu", gpu=False)
    assert "experimental" not in caplog.text
    open_(small_engine, tmp_path / "first", gpu=True)
    open_(small_engine, tmp_path / "second", gpu=True)
    notices = [message for message in caplog.messages if "is experimental" in message]
    assert len(notices) == 1
    assert notices[0].startswith(path)
    assert "run `make gpu-check`" in notices[0]

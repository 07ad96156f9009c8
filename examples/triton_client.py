"""Encode and decode files on a Triton Inference Server, with a samekit backend that sends requests to the server.

The client reads, resamples and cuts the audio. The server gets windows of one size, and can batch those of all clients.

    pip install 'samekit[triton]'
    python examples/triton_client.py encode song.flac song.npy --model same-l --url localhost:8001
    python examples/triton_client.py decode song.npy song.wav --model same-l --url localhost:8001
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import click
import numpy as np
import tritonclient.grpc as triton

from samekit import AutoencoderModel
from samekit.backends.base import Backend
from samekit.cli.group import Command
from samekit.engine.spec import ENCODER, INPUT_NAMES, Direction, EngineSpec, opposite
from samekit.errors import BackendError
from samekit.serving.triton import facts_of, model_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from samekit.arrays import Array


class TritonBackend(Backend):
    """Run the encoder and the decoder of a model on a server that serves a repository of `samekit triton`.

    Args:
        url: HOST:PORT of the server's gRPC service.
        model: the name of the model, such as `same-l`.

    Raises:
        BackendError: the server does not answer, or has no such model.
        InputError: the model was not written by `samekit triton`.
    """

    name: ClassVar[str] = "triton"

    def __init__(self, url: str, model: str) -> None:
        self._url = url
        self._client = triton.InferenceServerClient(url)
        config = self._call(self._client.get_model_config, model_name(model, ENCODER)).config
        facts = facts_of(config)
        precision = facts.pop("precision")
        self.longest_window = facts.pop("longest_window")
        super().__init__(EngineSpec(**facts, source={"kind": "triton", "url": url}), precision)
        self._most = config.max_batch_size

    def _run(self, direction: Direction, array: Array) -> Array:
        rows = range(0, len(array), self._most)
        return np.concatenate([self._infer(direction, array[row : row + self._most]) for row in rows])

    def _infer(self, direction: Direction, array: Array) -> Array:
        """Return the server's answer to one request."""
        values = triton.InferInput(INPUT_NAMES[direction], list(array.shape), "FP32")
        values.set_data_from_numpy(np.ascontiguousarray(array))
        answer = self._call(self._client.infer, model_name(self.spec.name, direction), [values])
        result: Array = answer.as_numpy(INPUT_NAMES[opposite(direction)])
        return result

    def _call(self, method: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return method(*arguments)
        except triton.InferenceServerException as error:
            raise BackendError(f"{self._url}: {error.message()}; check the server and its log") from None

    def close(self) -> None:
        """Close the connection."""
        super().close()
        self._client.close()


@click.command(cls=Command)
@click.argument("task", type=click.Choice(["encode", "decode"]))
@click.argument("source", type=click.Path())
@click.argument("target", type=click.Path())
@click.option("--model", required=True, help="Name of the model, such as same-l.")
@click.option("--url", default="localhost:8001", show_default=True, help="HOST:PORT of the server's gRPC service.")
def main(task: str, source: str, target: str, model: str, url: str) -> None:
    """Encode audio SOURCE to latents TARGET, or decode them."""
    with AutoencoderModel(TritonBackend(url, model)) as opened:
        (opened.encode_file if task == "encode" else opened.decode_file)(source, target)


if __name__ == "__main__":
    main()

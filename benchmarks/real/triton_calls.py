"""Call two V2 servers with tritonclient and print each result as a line of JSON.

Usage: triton_calls.py KEY MLSERVER BINARY, where MLSERVER and BINARY are host:port[/base path].
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np  # type: ignore[import-not-found]
import tritonclient.http as triton  # type: ignore[import-not-found]

ROWS = np.arange(40, dtype=np.float32).reshape(10, 4)
MANY = np.random.default_rng(7).standard_normal((500, 1000), dtype=np.float32)


def tensor(name: str, values: Any, kind: str, binary: bool) -> Any:
    """Return an input tensor."""
    made = triton.InferInput(name, values.shape, kind)
    made.set_data_from_numpy(values, binary_data=binary)
    return made


def linear(client: Any, binary: bool, **options: Any) -> Any:
    """Run mlserver's model."""
    outputs = [triton.InferRequestedOutput("y", binary_data=False)]
    result = client.infer("linear", [tensor("x", ROWS, "FP32", binary)], outputs=outputs, **options)
    assert np.allclose(result.as_numpy("y"), ROWS @ (np.arange(12, dtype=np.float32).reshape(4, 3) / 4))
    return result.as_numpy("y").tolist()


def texts(client: Any, **options: Any) -> Any:
    """Send texts, which V2 calls BYTES."""
    values = np.array([["Łódź".encode()], [b"abc"]], dtype=object)
    outputs = [triton.InferRequestedOutput("reversed", binary_data=False)]
    result = client.infer("linear", [tensor("s", values, "BYTES", False)], outputs=outputs, **options)
    return [str(text) for text in result.as_numpy("reversed").ravel()]


def double(client: Any, binary: bool, binary_output: bool, values: Any = ROWS, **options: Any) -> Any:
    """Run the binary server's model."""
    outputs = [triton.InferRequestedOutput("x2", binary_data=binary_output)]
    result = client.infer("double", [tensor("x", values, "FP32", binary)], outputs=outputs, **options)
    assert np.array_equal(result.as_numpy("x2"), values * 2)
    return float(result.as_numpy("x2").sum())


def options(key: str, compression: str = "") -> dict[str, Any]:
    """Return what every call is given; new each time, because tritonclient writes into the headers."""
    given: dict[str, Any] = {"headers": {"X-API-Key": key}}
    if compression:
        given |= {"request_compression_algorithm": compression, "response_compression_algorithm": compression}
    return given


def calls(mlserver: Any, other: Any, key: str) -> dict[str, Callable[[], Any]]:
    """Return every call to be made, by what it shows."""
    return {
        "mlserver: live": lambda: mlserver.is_server_live(**options(key)),
        "mlserver: ready": lambda: mlserver.is_server_ready(**options(key)),
        "mlserver: model ready": lambda: mlserver.is_model_ready("linear", **options(key)),
        "mlserver: server metadata": lambda: mlserver.get_server_metadata(**options(key)),
        "mlserver: model metadata": lambda: mlserver.get_model_metadata("linear", **options(key)),
        "mlserver: unknown version": lambda: mlserver.get_model_metadata("linear", "9", **options(key)),
        "mlserver: JSON tensors": lambda: linear(mlserver, False, **options(key)),
        "mlserver: JSON tensors, id": lambda: linear(mlserver, False, request_id="mine", **options(key)),
        "mlserver: JSON tensors, gzip": lambda: linear(mlserver, False, **options(key, "gzip")),
        "mlserver: texts": lambda: texts(mlserver, **options(key)),
        "mlserver: binary tensors, not served": lambda: linear(mlserver, True, **options(key)),
        "binary server: JSON tensors": lambda: double(other, False, False, **options(key)),
        "binary server: binary in": lambda: double(other, True, False, **options(key)),
        "binary server: binary out": lambda: double(other, False, True, **options(key)),
        "binary server: binary both ways": lambda: double(other, True, True, **options(key)),
        "binary server: 2 MB binary": lambda: double(other, True, True, MANY, **options(key)),
        "binary server: binary, gzip": lambda: double(other, True, True, MANY, **options(key, "gzip")),
        "binary server: binary, deflate": lambda: double(other, True, True, MANY, **options(key, "deflate")),
    }


def main() -> None:
    """Make the calls, each on a fresh line of output; a refusal is a result like any other."""
    key, first, second = sys.argv[1:]
    clients = [triton.InferenceServerClient(url) for url in (first, second)]
    for name, call in calls(clients[0], clients[1], key).items():
        try:
            result = call()
        except triton.InferenceServerException as error:
            result = f"{error.status()}: {error.message()}"
        print(json.dumps([name, result]), flush=True)


if __name__ == "__main__":
    main()

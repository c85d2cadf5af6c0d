"""A real Open Inference (V2) server through the gateway: mlserver, called with tritonclient.

One command: ``python benchmarks/real/mlserver_v2.py``. It makes a virtual environment with mlserver and
tritonclient, serves a small model, and makes every call twice, directly and through the gateway's ``/v2/…``.
"""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from harness import environment_python, free_port, gateway, server

REQUIREMENTS = ("mlserver==1.7.1", "tritonclient[http]>=2.60,<3", "aiohttp>=3.11,<4")
HERE = Path(__file__).parent


def model_directory(place: Path) -> int:
    """Write what mlserver wants to find in `place`; return the port it will listen on."""
    port = free_port()
    settings = {"host": "127.0.0.1", "http_port": port, "grpc_port": free_port(), "metrics_port": free_port()}
    settings |= {"parallel_workers": 0, "debug": False}
    model = {"name": "linear", "implementation": "mlserver_model.Linear"}
    (place / "settings.json").write_text(json.dumps(settings))
    (place / "model-settings.json").write_text(json.dumps(model))
    return port


def results(python: Path, key: str, mlserver: str, binary: str) -> dict[str, Any]:
    """Make all calls and return their results by name."""
    command: list[str | Path] = [python, HERE / "triton_calls.py", key, mlserver, binary]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(line) for line in done.stdout.splitlines())


def main() -> None:
    """Run everything; any difference ends it with an error."""
    python = environment_python("mlserver", REQUIREMENTS)
    with tempfile.TemporaryDirectory() as place:
        port, other = model_directory(Path(place)), free_port()
        urls = {"linear": f"http://127.0.0.1:{port}", "double": f"http://127.0.0.1:{other}"}
        upstreams = {name: {"protocol": "openinference", "urls": [url], "models": [name]} for name, url in urls.items()}
        with (
            server(
                [python.parent / "mlserver", "start", place],
                f"{urls['linear']}/v2/health/ready",
                {"PYTHONPATH": str(HERE)},
            ),
            server([python, HERE / "binary_server.py", str(other)], f"{urls['double']}/v2/health/ready"),
            gateway(upstreams) as proxy,
        ):
            direct = results(python, "none", f"127.0.0.1:{port}", f"127.0.0.1:{other}")
            base = f"{proxy.url.removeprefix('http://')}/api/v1/gpu/proxy"
            through = results(python, proxy.key, base, base)
    different = 0
    for name, result in direct.items():
        is_equal = through[name] == result
        different += not is_equal
        print(f"{'ok  ' if is_equal else 'DIFF'} {name}: {str(result)[:70]}")
        if not is_equal:
            print(f"     through the gateway: {str(through[name])[:300]}")
    if different:
        raise SystemExit(f"{different} of {len(direct)} calls differ")
    print(f"ok: {len(direct)} calls, the same results directly and through the gateway")


if __name__ == "__main__":
    main()

"""Registered models in the hands of people who have MLflow and torch, and nothing of ours."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from local_cluster import free_ports
from processes import kill, wait_for

from ivegan import checkpoint
from ivegan.config import override, preset
from ivegan.step import create_state
from pipelines.models.register import register

NAMES = ("ivegan-digits-encoder", "ivegan-digits-generator")


@pytest.fixture
def pair(home: Path, store: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Register an untrained pair; return by name what to ask it and what it must answer."""
    state = create_state(override(preset("digits"), {"model.width": 0.25}))
    metadata = {"preset": "digits", "run_id": "a"}
    uri = checkpoint.save(state, str(home / "a"), metadata)
    register(uri)
    _, encoder, generator, _ = checkpoint.load_networks(uri)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (3, 1, 16, 16), dtype=np.uint8)
    latent = random.uniform(-1, 1, (3, 20)).astype(np.float32)
    with torch.no_grad():
        z = encoder(torch.from_numpy(images).float() / 255).numpy()
        g = generator(torch.from_numpy(latent[:, 16:]), torch.from_numpy(latent[:, :16])).numpy()
    return dict(zip(NAMES, ((images, z), (latent, g)), strict=True))


@pytest.mark.slow
def test_mlflow_serves_a_registered_model_over_http(pair, home, store):
    """``mlflow models serve`` in a process of its own, asked as any client would ask it."""
    url, log = f"http://127.0.0.1:{free_ports()[0]}", home / "log"
    programs = Path(sys.executable).parent
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"  # as activated: it looks for uvicorn
    words = [programs / "mlflow", "models", "serve", "--env-manager", "local"]
    words += ["-m", f"models:/{NAMES[0]}@staging", "--port", url.rpartition(":")[2]]
    environment = os.environ | {"MLFLOW_TRACKING_URI": store, "PATH": path}
    with log.open("w") as out:
        server = subprocess.Popen(words, stdout=out, stderr=out, cwd=home, env=environment)

    def answers() -> bool:
        with contextlib.suppress(requests.ConnectionError):
            return requests.get(f"{url}/ping", timeout=5).ok
        return False

    try:
        wait_for(answers, server, log)
        given, expected = pair[NAMES[0]]
        for size in (1, 3):
            inputs = {"inputs": given[:size].tolist()}
            answer = requests.post(f"{url}/invocations", json=inputs, timeout=60).json()
            np.testing.assert_allclose(answer["predictions"], expected[:size], atol=1e-5)
    finally:
        kill(server)


# Of what is installed here, and not there.
OURS = ["ivegan", "pipelines", "data_prep"]
OTHERS = ["ray", "webdataset", "metaflow", "safetensors", "boto3", "tyro", "pytest"]
STRANGER = """
import sys
sys.modules |= dict.fromkeys(sys.argv[4:])
import mlflow, numpy as np
mlflow.set_tracking_uri(sys.argv[1])
given = np.load(sys.argv[2])
out = {}
for name in given:
    for how in ("@staging", "/Staging"):
        model = mlflow.pyfunc.load_model("models:/" + name + how)
        out[name + how.strip("@/")] = np.asarray(model.predict(given[name]))
np.savez(sys.argv[3], **out)
"""


@pytest.mark.slow
def test_an_environment_with_only_mlflow_and_torch_loads_by_alias_and_by_stage(pair, home, store):
    """It encodes and generates what the checkpoint does, with no project code to import."""
    np.savez(home / "given.npz", **{name: given for name, (given, _) in pair.items()})
    places = [store, str(home / "given.npz"), str(home / "out.npz")]
    words = [sys.executable, "-I", "-c", STRANGER, *places, *OURS, *OTHERS]
    done = subprocess.run(words, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = np.load(home / "out.npz")
    for name, (_, expected) in pair.items():
        for how in ("staging", "Staging"):
            np.testing.assert_allclose(found[name + how], expected, atol=1e-5)

"""Data flow one way, and so do imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOREIGN = {"ray", "mlflow", "metaflow"}
LAZY = ["webdataset", "boto3", "botocore", "pyarrow", "matplotlib", "sklearn", "tyro", "jaxtyping"]


def imports(path: Path) -> set[str]:
    """Return the first names of every module that a file imports, at any depth."""
    out: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out |= {a.name.partition(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: say the full name"
            out.add((node.module or "").partition(".")[0])
    return out


@pytest.mark.parametrize("path", sorted((ROOT / "ivegan").rglob("*.py")), ids=lambda p: p.name)
def test_the_library_knows_nothing_of_what_stands_around_it(path):
    assert not imports(path) & (FOREIGN | {"pipelines", "data_prep"})


@pytest.mark.parametrize("path", sorted((ROOT / "data_prep").glob("*.py")), ids=lambda p: p.name)
def test_data_preparation_knows_nothing_of_tracking(path):
    assert not imports(path) & {"mlflow", "metaflow"}


def test_mlflow_is_imported_in_three_places_only():
    users = {
        p.relative_to(ROOT / "pipelines").as_posix()
        for p in (ROOT / "pipelines").rglob("*.py")
        if "mlflow" in imports(p)
    }
    assert users == {"tracking/client.py", "registry.py", "models/package.py"}


def test_a_training_worker_does_not_import_mlflow():
    """It takes seconds on each of a node's workers, and only the driver talks to MLflow."""
    code = "import sys, pipelines.train; print('mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_training_needs_nothing_but_torch_numpy_pillow_and_safetensors():
    """Run in a process where everything else cannot be imported."""
    code = f"""
import sys
sys.modules |= dict.fromkeys({LAZY + sorted(FOREIGN)!r})
import itertools, importlib, pathlib
for path in sorted(pathlib.Path({str(ROOT / "ivegan")!r}).glob("*.py")):
    importlib.import_module("ivegan." + path.stem)
import numpy as np
from ivegan.config import override, preset
from ivegan.data.batches import Split, batches
from ivegan.step import create_state, train
config = override(preset("digits"), {{"batch_size": 8, "total_images": 16, "model.width": 0.1}})
images = np.random.default_rng(0).integers(0, 256, (20, 1, 16, 16), dtype=np.uint8)
split = Split(images=images, labels=np.zeros(20, np.int64), keys=[], dataset_hash="")
state = create_state(config)
done = list(train(state, batches(config, split, 0, 0, 1, state.device), 8))
print(done[-1].images_seen)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "16"


@pytest.mark.parametrize("package", ["ivegan", "data_prep", "pipelines"])
def test_importing_a_package_does_nothing(package, tmp_path):
    code = f"import {package}, os; print(sorted(os.listdir()))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "[]"

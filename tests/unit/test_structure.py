"""Imports go one way, files stay small, and words are those of the glossary."""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("ivegan", "data_prep", "pipelines")
LAZY = {"webdataset", "boto3", "botocore", "pyarrow", "matplotlib", "sklearn", "tyro", "pydantic"}
# A folder may import these of ours, itself, and any module at the top of its own package.
ALLOWED = {
    "ivegan": {"ivegan"},
    "data_prep": {"ivegan", "data_prep", "pipelines.options", "pipelines.cluster"},
    "pipelines": {"ivegan", "data_prep", "pipelines"},
}
FOREIGN = {
    "ivegan": {"ray", "mlflow", "metaflow"},
    "data_prep": {"mlflow", "metaflow"},
    "pipelines": set(),
}
LARGEST, LARGEST_COMMAND, LARGEST_TOP = 400, 200, 1600  # lines


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path, depth: int = 99) -> Iterator[str]:
    """Yield the names that a file imports: all, or with ``depth=0`` those at its top level."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if depth else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the absolute name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(name: str) -> str:
    """Return the folder, or the module at a package's top, that a dotted name belongs to."""
    return ".".join(name.split(".")[:2])


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_a_module_imports_only_what_its_package_may(path: Path) -> None:
    package = name_of(path).partition(".")[0]
    for name in imports(path):
        root = name.partition(".")[0]
        assert root not in FOREIGN[package], name
        if root in PACKAGES:
            assert root in ALLOWED[package] or room(name) in ALLOWED[package], name
    if package == "ivegan" and name_of(path) != "ivegan.storage.arrow":  # itself imported lazily
        assert not LAZY & {name.partition(".")[0] for name in imports(path, depth=0)}


def test_rooms_form_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in sources():
        here = room(name_of(path))
        there = {room(name) for name in imports(path) if name.partition(".")[0] in PACKAGES}
        graph.setdefault(here, set()).update(there - {here})
    graphlib.TopologicalSorter(graph).prepare()


def test_training_builds_no_data_and_mlflow_has_two_rooms() -> None:
    for path in (ROOT / "pipelines").rglob("*.py"):
        where = room(name_of(path))
        roots = {name.partition(".")[0] for name in imports(path)}
        assert where != "pipelines.training" or "data_prep" not in roots, path
        assert where in ("pipelines.tracking", "pipelines.models") or "mlflow" not in roots, path


def test_class_names_are_unique() -> None:
    classes: dict[str, str] = {}
    for path in sources():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                assert node.name not in classes, f"{name_of(path)}, {classes[node.name]}"
                classes[node.name] = name_of(path)


def test_files_are_small() -> None:
    python = [
        p for f in (*PACKAGES, "benchmarks", "infra", "tests") for p in (ROOT / f).rglob("*.py")
    ]
    lines = {p: len(p.read_text().splitlines()) for p in python}
    assert not [f"{p.relative_to(ROOT)}: {n}" for p, n in lines.items() if n > LARGEST]
    commands = {p for p in (ROOT / "pipelines").glob("*.py") if "__main__" in p.read_text()}
    assert not [f"{p.name}: {lines[p]}" for p in commands if lines[p] > LARGEST_COMMAND]
    assert sum(n for p, n in lines.items() if p.parent == ROOT / "ivegan") <= LARGEST_TOP


def test_words_are_those_of_the_glossary() -> None:
    rows = (Path(__file__).parent / "old_words.txt").read_text().splitlines()
    rows = [row for row in rows if not row.startswith("#")]

    def pattern(some: list[str]) -> re.Pattern[str]:
        return re.compile(rf"(?<![a-z])({'|'.join(some)})(?![a-z])", re.IGNORECASE)

    names = pattern([row.split()[1] for row in rows if row.startswith("identifier ")])
    words = pattern([row for row in rows if not row.startswith("identifier ")])
    words = re.compile(rf"{words.pattern}|ray\.[\w.]*_internal", re.IGNORECASE)
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    hits = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if (
            name == "docs/glossary.md"
            or path.suffix not in (".py", ".md", ".yaml", ".toml", ".sh", "")
            or not path.is_file()
        ):
            continue
        text = path.read_text()
        hits += [
            f"{name}:{text[: hit.start()].count(chr(10)) + 1}: {hit[0]}"
            for hit in words.finditer(text)
        ]
        for node in ast.walk(ast.parse(text)) if path.suffix == ".py" else ():
            for field in ("id", "attr", "arg", "name"):
                word = getattr(node, field, None)
                if isinstance(word, str) and names.search(word):
                    hits.append(f"{name}:{getattr(node, 'lineno', '')}: {word}")
    assert not hits, "\n".join(hits)


def test_a_training_worker_does_not_import_mlflow_and_imports_write_nothing(tmp_path: Path) -> None:
    """Its import takes seconds on each worker of a node, and only the driver sends to MLflow."""
    names = "data_prep.build, pipelines.training.worker"
    code = f"import os, sys, {names}; print('mlflow' in sys.modules, os.listdir())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "False []"


def test_training_needs_only_torch_numpy_pillow_and_safetensors() -> None:
    """Run in a process in which nothing else can be imported."""
    missing = sorted(LAZY | FOREIGN["ivegan"] | {"jaxtyping"})
    code = f"""
import sys
sys.modules |= dict.fromkeys({missing!r})
import importlib, pathlib
for path in sorted(pathlib.Path({str(ROOT / "ivegan")!r}).glob("*.py")):
    importlib.import_module("ivegan." + path.stem)
import numpy as np
from ivegan.data.batches import batches
from ivegan.data.cache import Split
from ivegan.config import override, preset
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

"""What is handed to Kubernetes is valid, fits together and has no more rights than it needs."""

import importlib
import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import manifests
import pytest
import yaml
from manifests import FOLDERS, JOBS, KUBERNETES, ROOT, containers, loose, problems, render

VERSION = "1.32"  # the oldest that docs/kubernetes.md names
ALL = [*FOLDERS, "secrets.example.yaml"]


def documents_of(folder: str) -> list[dict[str, Any]]:
    return manifests.secrets() if folder.endswith(".yaml") else render(folder)


def whole(folder: str) -> list[dict[str, Any]]:
    """Return the documents of a folder with what stands beside them in a cluster."""
    beside = "overlays/self-contained" if folder.startswith("jobs") else "jobs/train"
    return [*render(folder), *render(beside), *manifests.secrets()]


@pytest.fixture(scope="module")
def kuberay() -> Callable[[str], jsonschema.Draft7Validator]:
    folder, data = os.environ.get("IVEGAN_KUBERAY_SCHEMAS"), os.environ.get("IVEGAN_TEST_DATA")
    where = Path(folder or (Path(data).parent / "schemas" if data else "none"))

    def validator(kind: str) -> jsonschema.Draft7Validator:
        path = where / f"ray.io_{kind.lower()}s_v1.json"
        if not path.is_file():
            pytest.skip(f"KubeRay's schema of {kind} is not here; set IVEGAN_KUBERAY_SCHEMAS")
        return jsonschema.Draft7Validator(strict(json.loads(path.read_text())))

    return validator


def strict(node: Any) -> Any:
    """Return the schema with unknown fields refused, as the API server would drop them silently."""
    if isinstance(node, list):
        return [strict(n) for n in node]
    if not isinstance(node, dict):
        return node
    out = {k: strict(v) for k, v in node.items()}
    if out.pop("x-kubernetes-int-or-string", False):
        out["type"] = ["integer", "string"]
        out.pop("anyOf", None)
    if isinstance(out.get("properties"), dict) and "type" in out:
        out.setdefault("additionalProperties", False)
        if "metadata" in out["properties"]:
            out["properties"]["metadata"] = {"type": "object"}
    return out


@pytest.mark.parametrize("folder", ALL)
def test_documents_fit_the_schemas_of_kubernetes(folder):
    own = [d for d in documents_of(folder) if not d["apiVersion"].startswith("ray.io/")]
    for document in own:
        kubernetes_validate.validate(document, VERSION, strict=True)
    assert own or folder.startswith("jobs")


@pytest.mark.parametrize("folder", FOLDERS)
def test_documents_fit_the_schemas_of_kuberay(folder, kuberay):
    rays = [d for d in render(folder) if d["apiVersion"].startswith("ray.io/")]
    assert len(rays) == 1
    kuberay(rays[0]["kind"]).validate(rays[0])


def test_ray_cluster_yaml_is_rendered_from_the_base():
    (cluster,) = [d for d in render("base") if d["kind"] == "RayCluster"]
    text = (ROOT / "ray_cluster.yaml").read_text()
    assert yaml.safe_load(text) == cluster, "run `make ray_cluster.yaml`"


@pytest.mark.parametrize("folder", [f for f in FOLDERS if f != "base"])
def test_names_keys_ports_and_ways_exist(folder):
    assert problems(whole(folder)) == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_pod_has_more_rights_than_it_needs(folder):
    assert list(loose(render(folder))) == []


def test_a_changed_name_key_port_or_right_is_found():
    """One of each check, all at once."""
    text = yaml.safe_dump_all(whole("overlays/self-contained"))
    wrong = {
        "key: password": ("key: pass", "no key pass"),
        "name: ivegan-settings\n  namespace": ("name: other\n  namespace", "no ConfigMap"),
        "object-store:8333": ("object-store:9000", "AWS_ENDPOINT_URL"),
        "containerPort: 5000": ("containerPort: 5001", "opens the port 5000"),
        "ivegan/s3/credentials": ("ivegan/s3/keys", "no Secret holds"),
        "targetPort: s3": ("targetPort: http", "no port http"),
        "readOnlyRootFilesystem: true": ("readOnlyRootFilesystem: false", "has the rights"),
        "runAsNonRoot: true": ("runAsNonRoot: false", "may run as root"),
        "image: ivegan:0.2.0-cuda": ("image: ivegan:latest", "ours a version"),
        "ephemeral-storage: 1Gi": ("hugepages-2Mi: 1Gi", "no limit of"),
    }
    for old, (new, _) in wrong.items():
        assert old in text
        text = text.replace(old, new)
    documents = list(yaml.safe_load_all(text))
    found = "\n".join([*problems(documents), *loose(documents)])
    assert [sentence for _, sentence in wrong.values() if sentence not in found] == []


def test_no_secret_has_a_value():
    for document in manifests.secrets():
        for name, value in document["stringData"].items():
            assert not value or re.search(r"^(database_uri|admin_password) =$", value, re.M), name
    for folder in FOLDERS:
        assert not [d for d in render(folder) if d["kind"] == "Secret"]
        for container in containers(render(folder)):
            for variable in container.get("env", []):
                secret = re.search(r"PASSWORD|SECRET|TOKEN|KEY|_URI$", variable["name"])
                public = variable["name"] == "MLFLOW_ARTIFACTS_DESTINATION"
                assert not secret or public or "value" not in variable, variable["name"]


def test_settings_are_variables_that_are_read():
    import mlflow.environment_variables

    source = "".join(p.read_text() for p in (ROOT / "pipelines").rglob("*.py"))
    cli = (Path(mlflow.__file__).parent / "cli" / "__init__.py").read_text()
    known = {*vars(mlflow.environment_variables), *re.findall(r'envvar="(\w+)"', cli)}
    known |= {"AWS_ENDPOINT_URL", "AWS_REGION", "AWS_SHARED_CREDENTIALS_FILE", "HOME"}
    known |= {"METAFLOW_USER", *re.findall(r"\bIVEGAN_\w+", source)}
    (settings,) = [d for d in render("base") if d["kind"] == "ConfigMap"]
    (mlflow_pod,) = [c for c in containers(render("base")) if c["name"] == "mlflow"]
    assert {*settings["data"], *(v["name"] for v in mlflow_pod["env"])} <= known


def entry_points() -> list[tuple[str, str]]:
    """Return the commands of the jobs and of the pages for people, and where each stands."""
    found = []
    for job in JOBS:
        text = (KUBERNETES / "jobs" / job / "job.yaml").read_text()
        spec = yaml.safe_load(text)["spec"]
        found.append((job, spec.get("jobTemplate", spec)["entrypoint"]))
    for page in ("README.md", "docs/kubernetes.md", "infra/compose.yaml"):
        text = (ROOT / page).read_text().replace("\\\n", " ").replace("\\\n#", " ")
        text = re.sub(r" \\\n#? *", " ", text)
        pattern = r"(?:-- |exec ray-head +)(python (?:pipelines|data_prep)/[^\n`&]+)"
        found += [(page, " ".join(one.split())) for one in re.findall(pattern, text)]
    return found


def parse(command: str, monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """Return the exit status of a command that parses its flags and does nothing."""
    python, path, *words = shlex.split(command)
    assert python == "python"
    assert (ROOT / path).is_file(), path
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    for name in [name for name in vars(module) if name.startswith("main")]:
        monkeypatch.setattr(module, name, lambda *_: {})
    monkeypatch.setattr(sys, "argv", [path, *words])
    with pytest.raises(SystemExit) as end:
        module.command()
    return end.value.code


@pytest.mark.parametrize(("place", "command"), entry_points())
def test_entry_points_exist_and_take_these_flags(place, command, monkeypatch):
    assert parse(command, monkeypatch) == 0


def test_every_job_can_be_retried():
    for job in JOBS:
        (document,) = render(f"jobs/{job}")
        spec = document["spec"].get("jobTemplate", document["spec"])
        assert spec["backoffLimit"] > 0
        assert spec["shutdownAfterJobFinishes"]
        assert spec["ttlSecondsAfterFinished"] > 0
        trains = re.search("train|tune", spec["entrypoint"])
        assert not trains or "--resume" in spec["entrypoint"].split()
        computes = "evaluate" in spec["entrypoint"]
        assert not computes or spec["entrypointNumGpus"] == 1


def test_versions_agree():
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    cluster = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    assert cluster["spec"]["rayVersion"] == pinned[1]
    assert pinned[1] in (ROOT / "docs" / "kubernetes.md").read_text()
    compose = yaml.safe_load((ROOT / "infra" / "compose.yaml").read_text())["services"]
    foreign = {c["image"] for c in containers(render("overlays/self-contained"))}
    for name in ("postgres", "object-store"):
        assert compose[name]["image"] in foreign
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version
    assert compose["ray-head"]["image"] == f"ivegan:{version[1]}-cpu"
    assert f"ivegan:{version[1]}-cuda" in foreign


def test_the_image_is_locked_and_not_roots():
    text = (ROOT / "infra" / "Dockerfile").read_text()
    stages = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    assert [s for s in stages if "@sha256:" in s] == stages[:1], "one foreign image, by its digest"
    assert {"base", "${ACCELERATOR}"} >= {*stages[1:]}
    assert "PIP_CONSTRAINT=/opt/ivegan/constraints.txt" in text
    assert text.rstrip().endswith("USER 1000:1000")
    for name in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / one).exists() for one in name.split()), name


def test_messages_of_the_troubleshooting_page_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text().partition("Messages of others")[0]
    paths = [
        p for name in ("ivegan", "pipelines", "data_prep") for p in (ROOT / name).rglob("*.py")
    ]
    # Sentences are f-strings over several lines: compare words outside braces and quotes.
    source = "\n".join(re.sub(r'"\s*\n\s*f?"', "", p.read_text()) for p in paths)
    source = re.sub(r"\{[^{}]*\}", "…", source)
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 10
    for message in messages:
        for part in re.split(r" ?… ?", message):
            assert part in source, f"{message!r}: no longer printed"

"""What is handed to Kubernetes is valid, consistent and modest in its rights."""

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    folder = os.environ.get("IVEGAN_KUBERAY_SCHEMAS")
    data = os.environ.get("IVEGAN_TEST_DATA")
    path = Path(folder or (Path(data).parent / "schemas" if data else "")) / (
        "ray.io_rayclusters_v1.json"
    )
    if not path.is_file():
        pytest.skip("KubeRay's RayCluster schema is not here; set IVEGAN_KUBERAY_SCHEMAS")
    return strict(json.loads(path.read_text()))


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


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    spec = cluster["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_the_cluster_fits_kuberays_schema(cluster, schema):
    jsonschema.Draft7Validator(schema).validate(cluster)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "headGroupSpec", "template", "spec", "container"), []),
        (("spec", "enableInTreeAutoscaling"), "yes"),
        (("spec", "rayversion"), "2.60.0"),
    ],
)
def test_the_check_finds_mistakes(cluster, schema, path, value):
    wrong = copy.deepcopy(cluster)
    inner = wrong
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(schema).validate(wrong)


def test_the_cluster_runs_the_pinned_ray(cluster):
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert cluster["spec"]["rayVersion"] == pinned[1]
    assert f"rayproject/ray:{pinned[1]}-" in (ROOT / "infra" / "Dockerfile").read_text()


def test_no_pod_has_more_rights_than_it_needs(cluster):
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    for pod in pods(cluster):
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            limits, requests = container["resources"]["limits"], container["resources"]["requests"]
            assert limits["memory"] == requests["memory"]
    assert all(not p["automountServiceAccountToken"] for p in pods(cluster)[1:])


def test_no_credential_stands_in_a_file(cluster):
    text = (ROOT / "ray_cluster.yaml").read_text()
    assert not re.search(r"(AKIA|aws_secret|password)\S*\s*[:=]\s*\S", text, re.IGNORECASE)
    for pod in pods(cluster):
        for container in pod["containers"]:
            assert "env" not in container

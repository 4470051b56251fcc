"""The store is the one that botocore finds, for every library and under every account."""

import json
import os
import pickle

import pytest
from fault_proxy import Fault, FaultProxy, Request
from local_cluster import free_ports
from pyarrow import fs

from ivegan import storage
from ivegan.errors import UserError
from ivegan.storage import objects
from ivegan.storage.arrow import ObjectFiles
from ivegan.storage.digest import sha256_hex

FILES = {"weights.bin": b"w" * 100, "config.json": b"{}", "deep/er/x.txt": b"x"}
CONFIG = """
[default]
region = eu-central-1
[profile lab]
region = eu-west-1
services = store
s3 =
    addressing_style = virtual
[services store]
s3 =
    endpoint_url = http://127.0.0.1:3
"""


@pytest.mark.parametrize(
    ("variables", "endpoint", "region"),
    [
        ({}, "https://s3.eu-central-1.amazonaws.com", "eu-central-1"),
        ({"AWS_DEFAULT_REGION": "us-west-2"}, "https://s3.us-west-2.amazonaws.com", "us-west-2"),
        ({"MLFLOW_S3_ENDPOINT_URL": "http://127.0.0.1:1"}, "http://127.0.0.1:1", "eu-central-1"),
        ({"MLFLOW_S3_ENDPOINT_URL": "http://127.0.0.1:1", "AWS_ENDPOINT_URL": "http://x:2"},
         "http://x:2", "eu-central-1"),
        ({"AWS_ENDPOINT_URL": "http://x:2", "AWS_ENDPOINT_URL_S3": "http://x:4"}, "http://x:4",
         "eu-central-1"),
        ({"AWS_PROFILE": "lab"}, "http://127.0.0.1:3", "eu-west-1"),
        ({"AWS_CONFIG_FILE": os.devnull, "AWS_REGION": "eu-north-1", "AWS_ENDPOINT_URL": ""},
         "https://s3.eu-north-1.amazonaws.com", "eu-north-1"),
        ({"AWS_CONFIG_FILE": os.devnull}, "https://s3.amazonaws.com", "us-east-1"),
    ],
)  # fmt: skip
def test_the_store_is_the_one_that_botocore_finds_for_all_libraries(
    variables, endpoint, region, home, monkeypatch
):
    (home / "config").write_text(CONFIG)
    for name in [n for n in os.environ if n.startswith(("AWS_", "MLFLOW_S3"))]:
        monkeypatch.delenv(name)
    for name, value in ({"AWS_CONFIG_FILE": str(home / "config")} | variables).items():
        monkeypatch.setenv(name, value)
    client = storage.s3_client()
    assert (client.meta.endpoint_url, client.meta.region_name) == (endpoint, region)
    handed = storage.environment()
    assert handed["AWS_DEFAULT_REGION"] == region
    style = "virtual" if "AWS_PROFILE" in variables else None
    assert handed.get("MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE") == style
    ends = {v for k, v in handed.items() if "ENDPOINT" in k}
    assert ends == (set() if "amazonaws" in endpoint else {endpoint})
    # Another node, which has no such files and none of the other variables.
    for name in [n for n in os.environ if n.startswith(("AWS_", "MLFLOW_S3"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    for name, value in handed.items():
        monkeypatch.setenv(name, value)
    there = storage.s3_client()
    assert (there.meta.endpoint_url, there.meta.region_name) == (endpoint, region)


def test_keys_of_a_program_are_found_and_travel_with_nothing(s3, tmp_path, monkeypatch):
    key, secret = (os.environ[f"AWS_{n}"] for n in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"))
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{name}")
    answer = {"Version": 1, "AccessKeyId": key, "SecretAccessKey": secret}
    (tmp_path / "answer.json").write_text(json.dumps(answer))
    config = tmp_path / "config"
    config.write_text(f"[default]\ncredential_process = cat {tmp_path}/answer.json")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    storage.write_bytes(f"{s3}/a/b", b"content")
    system, path = storage.filesystem(f"{s3}/a")
    handed = pickle.dumps(system) + repr(storage.environment()).encode()
    assert secret.encode() not in handed
    with pickle.loads(pickle.dumps(system)).open_input_stream(f"{path}/b") as stream:
        assert stream.read() == b"content"


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"AWS_ENDPOINT_URL": "store:9000"}, "Invalid endpoint: store:9000"),
        ({"AWS_PROFILE": "lab"}, r"profile \(lab\) could not be found"),
        ({"AWS_SECRET_ACCESS_KEY": ""}, "missing: AWS_SECRET_ACCESS_KEY"),
        ({"AWS_DEFAULT_REGION": "EU (Frankfurt)"}, "EU"),
    ],
)
def test_settings_that_make_no_client_are_reported_in_a_sentence(
    variables, sentence, s3, monkeypatch
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"The settings of S3 are wrong .*{sentence}"):
        storage.exists("s3://bucket/x")
    storage.environment()  # what needs no S3 works


def test_rays_file_system_is_the_same_store(s3, tmp_path):
    storage.write_bytes(f"{s3}/a/b", b"content")
    system, root = storage.filesystem(s3)
    with system.open_input_stream(f"{root}/a/b") as stream:
        assert stream.read() == b"content"
    source = tmp_path / "source"
    for name, data in FILES.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    fs.copy_files(str(source), f"{root}/copy", destination_filesystem=system)
    assert storage.list_files(f"{s3}/copy") == {name: len(data) for name, data in FILES.items()}
    fs.copy_files(f"{root}/copy", str(tmp_path / "back"), source_filesystem=system)
    assert {n: (tmp_path / "back" / n).read_bytes() for n in FILES} == FILES
    kinds = {i.path: i.type.name for i in system.get_file_info(fs.FileSelector(f"{root}/copy"))}
    found = {"weights.bin": "File", "config.json": "File", "deep": "Directory"}
    assert kinds == {f"{root}/copy/{name}": kind for name, kind in found.items()}
    paths = [f"{root}/copy", f"{root}/copy/deep/er/x.txt", f"{root}/none", root]
    types = [info.type.name for info in system.get_file_info(paths)]
    assert types == ["Directory", "File", "NotFound", "Directory"]
    none = fs.FileSelector(f"{root}/none", allow_not_found=True)
    assert system.get_file_info(none) == []
    with pytest.raises(FileNotFoundError):
        system.get_file_info(fs.FileSelector(f"{root}/none"))
    system.delete_file(f"{root}/a/b")
    system.delete_dir(f"{root}/copy")
    assert storage.list_files(s3) == {}


def test_a_finalizer_sends_nothing(monkeypatch):
    """An upload in a finalizer waited for a lock that the call it interrupted held."""
    sent: list[bytes] = []

    def upload(place: objects.Object, data: bytes) -> None:
        sent.append(data)
        raise ConnectionError("away")

    monkeypatch.setattr(objects, "upload", upload)
    abandoned = ObjectFiles().open_output_stream("bucket/key", None)
    abandoned.write(b"half")
    del abandoned
    assert sent == []
    refused = ObjectFiles().open_output_stream("bucket/key", None)
    refused.write(b"whole")
    with pytest.raises(ConnectionError):
        refused.close()
    del refused
    assert sent == [b"whole"]


def test_a_store_that_refuses_checksum_headers_is_used_without_them(s3, s3_variables, monkeypatch):
    def refuse(request: Request) -> Fault | None:
        names = ("x-amz-checksum-", "x-amz-sdk-checksum", "x-amz-trailer")
        refused = any(name.startswith(names) for name in request.headers)
        return Fault(refuse="NotImplemented") if refused else None

    with FaultProxy(s3_variables["AWS_ENDPOINT_URL"], refuse) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with pytest.raises(UserError, match=r"refuses .*NotImplemented"):
            storage.write_bytes(f"{s3}/a/x", b"old")
        monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        storage.write_bytes(f"{s3}/a/x", b"content")
        assert storage.create_bytes(f"{s3}/a/y", b"new") == b"new"
        head = storage.s3_client().head_object(Bucket=s3[5:], Key="a/x")
        assert head["Metadata"]["sha256"] == sha256_hex(b"content")
        storage.delete_folder(f"{s3}/a")
        assert storage.list_files(s3) == {}


@pytest.mark.parametrize("own", [None, "3"])
def test_a_claimed_run_waits_longer_for_its_store_and_hands_that_on(monkeypatch, own):
    for name in ("AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"):
        monkeypatch.delenv(name, raising=False)
    if own:
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", own)

    def attempts() -> int:
        return storage.s3_client().meta.config.retries["total_max_attempts"]

    usual = attempts()
    with storage.longer_retries():
        assert attempts() == int(storage.environment()["AWS_MAX_ATTEMPTS"]) == int(own or 22)
    assert attempts() == usual == int(own or objects.ATTEMPTS)


def test_all_attempts_are_made_with_few_pauses_though_botocore_would_stop(
    s3_variables, monkeypatch, caplog
):
    """Its quota for all threads of a process ended the waiting for a store within seconds."""
    for name, value in s3_variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("botocore.retries.quota.RetryQuota.acquire", lambda *_: False)  # used up
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports()[0]}")
    with storage.longer_retries(), pytest.raises(UserError, match="does not answer"):
        storage.read_bytes("s3://bucket/key")
    assert len(pauses) == 21
    assert 110 < sum(pauses) < 130
    assert max(pauses) == objects.LONGEST_PAUSE
    assert len(caplog.records) == 22 - objects.ATTEMPTS


def test_ports_that_are_free_are_all_different():
    assert len(set(free_ports(500))) == 500

"""Tracking: an MLflow server that dies stops nothing, and nothing is lost or doubled."""

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from fault_proxy import Fault, FaultProxy, Request
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException, get_error_code
from mlflow_server import MlflowServer

from ivegan import storage
from ivegan.config import PRESETS, flatten, preset
from ivegan.errors import UserError
from pipelines.models.stages import overview
from pipelines.tracking import client as tracking
from pipelines.training import plan as planning

DATASET = ("ring", "abc", "ring")


def started(
    uri: str,
    run_id: str | None = None,
    journal: tracking.Journal | None = None,
    parent: str | None = None,
    name: str = "a",
) -> str:
    return tracking.start_run(
        uri,
        experiment="ivegan-ring",
        run_name=name,
        params={"optim.lr_g": 0.1},
        tags={"preset": "ring"},
        config={"dataset": "ring"},
        dataset=DATASET,
        run_id=run_id,
        journal=journal,
        parent_run_id=parent,
    )


def points(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(p.step, p.value) for p in MlflowClient(uri).get_metric_history(run_id, name)]


@pytest.fixture
def server(tmp_path: Path, empty_store: Path) -> Iterator[MlflowServer]:
    """Return an MLflow server that is not started yet."""
    store = tmp_path / "mlflow.db"
    store.write_bytes(empty_store.read_bytes())
    server = MlflowServer(tmp_path, f"sqlite:///{store}", str(tmp_path / "artifacts"))
    yield server
    server.kill()


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """Return a function: in its with block no MLflow store answers."""

    def no_answer(uri: str) -> MlflowClient:
        raise MlflowException(f"{uri} does not answer")

    @contextmanager
    def block() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(tracking, "client", no_answer)
            yield

    return block


def test_an_outage_holds_nothing_up_and_loses_nothing(server, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "_LAST_CHANCE", 1.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = server.uri
    path = tmp_path / "journal" / "a.jsonl"
    server.start()
    run_id = started(uri)
    journal = tracking.Journal.open(path, uri, run_id)
    tracker = tracking.Tracker(journal)
    for step in range(10):
        tracker.log({"loss": step / 10}, step)
    server.kill()
    for step in range(10, 20):
        tracker.log({"loss": step / 10}, step)
    tracker.figure("samples", b"png", 20)
    tracker.close()
    tracking.end_run(uri, run_id, "FINISHED", journal)
    assert tracking.waiting(path.parent)[run_id] >= 12
    server.start()
    assert MlflowClient(uri).get_run(run_id).info.status == "RUNNING"
    assert tracking.deliver(path.parent)[run_id] >= 12
    assert tracking.deliver(path.parent) == {}
    assert points(uri, run_id, "loss") == [(step, step / 10) for step in range(20)]
    run = MlflowClient(uri).get_run(run_id)
    assert run.info.status == "FINISHED"
    kept = [f.path for f in MlflowClient(uri).list_artifacts(run_id, "figures")]
    assert kept == ["figures/samples-0000000020.png"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_experiment_and_run_says_to_people_what_it_is(name, store):
    config = preset(name)
    run_id = tracking.start_run(
        store,
        experiment=f"ivegan-{config.dataset}",
        run_name="a",
        params=flatten(config),
        tags={},
        config={},
        dataset=DATASET,
    )
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name(f"ivegan-{config.dataset}")
    assert experiment is not None
    note = experiment.tags["mlflow.note.content"]
    assert len(note.split()) > 8
    assert note == tracking.DESCRIPTIONS[config.dataset]
    told = client.get_run(run_id).data.tags["mlflow.note.content"]
    assert told.startswith(f"{config.total_images:,} images, batches of {config.batch_size}, ")


def test_a_resumed_run_repeats_no_point(store, tmp_path):
    run_id = started(store)
    for steps in (range(5), range(3, 8)):  # the second starts from an earlier checkpoint
        tracker = tracking.Tracker(tracking.Journal.open(tmp_path / "a.jsonl", store, run_id))
        for step in steps:
            tracker.log({"loss": float(step)}, step)
        tracker.close()
    assert started(store, run_id) == run_id
    assert points(store, run_id, "loss") == [(step, float(step)) for step in range(8)]


@pytest.mark.parametrize("note", [None, "", "7", '{"run_id": "a"', '{"run_id": "a"}'])
def test_a_point_sent_twice_is_one_point(note, store, tmp_path):
    """The process dies between MLflow's answer and the note that it came, or the note is hurt."""
    run_id = started(store)
    tracker = tracking.Tracker(tracking.Journal.open(tmp_path / "a.jsonl", store, run_id))
    tracker.log({"loss": 1.0}, 1)
    tracker.close()
    (tmp_path / "a.sent").unlink()
    if note is not None:
        (tmp_path / "a.sent").write_text(note)
    assert tracking.deliver(tmp_path) == {run_id: 1}
    assert points(store, run_id, "loss") == [(1, 1.0)]


def test_a_journal_cut_in_the_middle_of_a_line_goes_on(store, tmp_path):
    run_id = started(store)
    journal = tracking.Journal.open(tmp_path / "a.jsonl", store, run_id)
    journal.add_metrics({"loss": 1.0}, 1)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"metrics": {"lo')
    journal = tracking.Journal.open(tmp_path / "a.jsonl", store, run_id)
    journal.add_metrics({"loss": 2.0}, 2)
    assert tracking.deliver(tmp_path) == {run_id: 2}
    assert points(store, run_id, "loss") == [(1, 1.0), (2, 2.0)]


def test_infinite_losses_are_left_out(store, tmp_path):
    run_id = started(store)
    tracker = tracking.Tracker(tracking.Journal.open(tmp_path / "a.jsonl", store, run_id))
    tracker.log({"loss": float("nan"), "other": 1.0}, 1)
    tracker.close()
    assert set(MlflowClient(store).get_run(run_id).data.metrics) == {"other"}


def test_no_password_is_written_down(tmp_path):
    path = tmp_path / "a.jsonl"
    tracking.Journal.open(path, "https://user:secret@mlflow.example/x", "run").add({"file": "f"})
    assert "secret" not in path.read_text()
    assert "https://mlflow.example/x" in path.read_text()


PROGRAMS = Path(__file__).resolve().parents[2] / "pipelines"


def test_no_password_is_shown_when_no_server_answers(home, monkeypatch, caplog, capfd):
    """MLflow's own errors hold the whole URI."""
    uri = "http://user:sesame@127.0.0.1:9/x"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "_LAST_CHANCE", 0.0)
    journal = tracking.Journal.open(home / "journal" / "a.jsonl", uri, "a")
    assert started(uri, journal=journal) == "a"
    tracking.Tracker(journal).close()
    tracking.end_run(uri, "a", "FINISHED", journal)
    calls = (lambda: tracking.check(uri), lambda: tracking.deliver(home / "journal"))
    for call in (*calls, overview):
        with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9/x") as told:
            call()
        assert "sesame" not in str(told.value)
    for words in (["--dry-run", "--json"], ["--total-images", "64"]):
        subprocess.run(
            [sys.executable, str(PROGRAMS / "train.py"), "ring", *words, "--workers", "0"],
            check=False,
        )
    plan = planning.resolve("ring", preset("ring"), planning.Run(workers=0))
    assert plan.tracking_uri == uri
    assert "MLflow does not answer (API request to http://127.0.0.1:9/x/" in caplog.text
    out, err = capfd.readouterr()
    assert '"tracking_uri": "http://127.0.0.1:9/x"' in out
    assert "No MLflow store answers at http://127.0.0.1:9/x" in err
    shown = out + err + caplog.text + repr(plan)
    assert "sesame" not in shown + "".join(p.read_text() for p in home.rglob("*") if p.is_file())


def test_no_password_is_shown_by_a_server_that_answers(server, capfd):
    """MLflow would print where to see a run that ends."""
    server.start()
    uri = server.uri.replace("://", "://user:sesame@")
    tracking.end_run(uri, started(uri), "FINISHED")
    assert MlflowClient(server.uri).search_runs(["1"])[0].info.status == "FINISHED"
    assert "sesame" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:p@ss@host/x@y", "https://host/x@y"),
        ("no http://u:p@a:1/x or s3://k:s@b/y", "no http://a:1/x or s3://b/y"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
    ],
)
def test_what_may_be_shown_of_a_uri(text, shown):
    assert tracking.public(text) == shown


@pytest.fixture
def evaluated(tmp_path: Path) -> Callable[..., bool]:
    """Return a function that puts an evaluation under a run."""
    report = tmp_path / "report"
    report.mkdir()
    (report / "report.html").write_text("<p>")
    (report / "samples.png").write_bytes(b"png")

    def add(uri: str, run_id: str, value: float = 0.5, node: str = "1") -> bool:
        return tracking.add_evaluation(
            uri,
            run_id,
            {"eval/one_nn": value, "eval/none": float("nan")},
            640,
            report,
            journals=tmp_path / node / "journal",
            run_uri=str(tmp_path / "far" / "a"),
        )

    return add


def check_evaluated(uri: str, run_id: str) -> None:
    assert points(uri, run_id, "eval/one_nn") == [(640, 0.5)]
    kept = {f.path for f in MlflowClient(uri).list_artifacts(run_id, "evaluation")}
    assert kept == {"evaluation/report.html", "evaluation/samples.png"}


def test_an_evaluation_goes_under_its_run_and_nowhere_else(store, evaluated):
    run_id = started(store)
    assert evaluated(store, run_id)
    check_evaluated(store, run_id)
    assert not evaluated(store, "0" * 32)


def test_an_evaluation_made_again_adds_no_second_point(store, evaluated):
    """Here, on another node, and with numbers that differ in their last digits."""
    run_id = started(store)
    assert evaluated(store, run_id)
    assert evaluated(store, run_id, 0.5000001)
    assert evaluated(store, run_id, node="2")
    check_evaluated(store, run_id)


def test_an_evaluation_that_was_killed_is_ended_by_the_next(store, evaluated, monkeypatch):
    """Between two of its files, the points being sent; on a node that is gone."""
    run_id = started(store)
    with monkeypatch.context() as patch:

        def die(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(tracking.Journal, "_tell_file", die)
        with pytest.raises(KeyboardInterrupt):
            evaluated(store, run_id)
    assert points(store, run_id, "eval/one_nn") == [(640, 0.5)]
    assert evaluated(store, run_id, node="2")
    check_evaluated(store, run_id)


@pytest.mark.parametrize("where", ["1/journal", "far", "far/a"])
def test_an_evaluation_in_an_outage_is_delivered_later(store, tmp_path, evaluated, away, where):
    """With its run, which began in the outage too; from here and from what storage keeps."""
    path = tmp_path / "1" / "journal" / "a.jsonl"
    journal = tracking.Journal.open(path, store, "a-key", str(tmp_path / "far" / "a"))
    with away():
        started(store, journal=journal)
        tracking.end_run(store, "a-key", "FINISHED", journal)
        assert not evaluated(store, "a-key")
    assert tracking.waiting(tmp_path / where) == {"a-key": 3}
    tracking.deliver(tmp_path / where)
    assert tracking.waiting(tmp_path / where) == {}
    run_id = tracking.find_run(MlflowClient(store), "a-key")
    assert run_id is not None
    check_evaluated(store, run_id)


def test_an_evaluation_of_somebody_elses_run_needs_no_place_in_its_folder(store, evaluated, home):
    run_id = started(store)
    (home / "far").write_text("in the way")
    assert evaluated(store, run_id)
    check_evaluated(store, run_id)


def test_what_is_refused_for_good_holds_nothing_up(server, tmp_path, caplog):
    """A point, a setting, and a file that the store of artifacts does not take."""

    def plan(request: Request) -> Fault | None:
        refused = request.method == "PUT" and "refused.png" in request.path
        return Fault(refuse="AccessDenied") if refused else None

    server.start()
    with FaultProxy(server.uri, plan) as proxy:
        uri = proxy.endpoint
        journal = tracking.Journal.open(tmp_path / "a.jsonl", uri, "a")
        run_id = started(uri, journal=journal)
        for step in range(9):
            journal.add_metrics({"loss": float(step), "what?": 1.0 if step == 7 else 2.0}, step)
        tracking.set_tags(uri, run_id, {"no\nname": "x"}, journal)
        journal.add_file("figures/refused.png", b"png")
        journal.add_file("figures/taken.png", b"png")
        tracking.end_run(uri, run_id, "FINISHED", journal)
        assert proxy.injected["refuse"] == 1
    assert tracking.waiting(tmp_path) == {}
    run = MlflowClient(server.uri).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert set(run.data.metrics) == {"loss"}
    assert len(points(server.uri, run_id, "loss")) == 9
    kept = [f.path for f in MlflowClient(server.uri).list_artifacts(run_id, "figures")]
    assert kept == ["figures/taken.png"]
    assert caplog.text.count("MLflow refuses what? at") == 9
    for what in ("what? at 7 images", "tags", "figures/refused.png"):
        assert f"MLflow refuses {what} of run {run_id} (" in caplog.text


@pytest.mark.parametrize("status", [401, 403, 408, 409, 429, 500, 503, 504])
def test_what_may_be_mended_is_sent_again(status, store, tmp_path, monkeypatch):
    """A login among it, which fails for all alike."""
    run_id = started(store)
    journal = tracking.Journal.open(tmp_path / "a.jsonl", store, run_id)
    journal.add_metrics({"loss": 1.0}, 1)
    with monkeypatch.context() as patch:

        def refuse(*_: object, **__: object) -> None:
            raise MlflowException("no", error_code=get_error_code(status))

        patch.setattr(MlflowClient, "log_batch", refuse)
        tracking.end_run(store, run_id, "FINISHED", journal)
    assert journal.unsent == 2
    tracking.deliver(tmp_path)
    assert points(store, run_id, "loss") == [(1, 1.0)]


def test_a_run_that_begins_in_an_outage_gets_one_mlflow_run(
    server, tmp_path, monkeypatch, mlflow_runs
):
    """Two that deliver at once, and once more after the note of it was lost, make it once."""
    monkeypatch.setattr(tracking, "_LAST_CHANCE", 1.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"No MLflow store answers.*start it, or set MLFLOW"):
        tracking.check(server.uri)
    key = tracking.new_key("a")
    journal = tracking.Journal.open(tmp_path / "a.jsonl", server.uri, key)
    assert started(server.uri, journal=journal) == key
    tracker = tracking.Tracker(journal)
    tracker.log({"loss": 1.0}, 1)
    tracker.close()
    tracking.set_tags(server.uri, key, {"best": "x"}, journal)
    tracking.end_run(server.uri, key, "FINISHED", journal)
    assert tracking.waiting(tmp_path) == {key: 4}
    server.start()
    tracking.check(server.uri)
    with ThreadPoolExecutor(2) as both:
        list(both.map(lambda _: tracking.deliver(tmp_path), range(2)))
    (tmp_path / "a.sent").unlink()
    assert list(tracking.deliver(tmp_path).values()) == [4]
    (run,) = mlflow_runs(server.uri)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"optim.lr_g": "0.1"}
    assert {"preset": "ring", "best": "x", "run_key": key}.items() <= run.data.tags.items()
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("ring", "abc")
    assert points(server.uri, run.info.run_id, "loss") == [(1, 1.0)]
    assert tracking.run_exists(MlflowClient(server.uri), key)
    kept = [f.path for f in MlflowClient(server.uri).list_artifacts(run.info.run_id)]
    assert kept == ["config.json"]


def test_nested_runs_of_an_outage_find_the_run_above_them(store, tmp_path, away, mlflow_runs):
    """And one that was stopped early is ended, but not before it has said all."""
    folders = {name: str(tmp_path / "runs" / name) for name in ("a", "a-0", "a-1")}
    journals = {
        name: tracking.Journal.open(tmp_path / "journal" / f"{name}.jsonl", store, name, folder)
        for name, folder in folders.items()
    }
    with away():
        started(store, journal=journals["a"])
        for name in ("a-0", "a-1"):
            started(store, journal=journals[name], parent="a", name=name)
        tracking.end_run(store, "a-0", "FINISHED", journals["a-0"])
        journals["a-1"].add_metrics({"loss": 1.0}, 1)
        journals["a-1"].keep()
        children = [folders["a-0"], folders["a-1"]]
        tracking.end_children(store, "a", "stopped early", journals["a"], children)
        tracking.end_run(store, "a", "FINISHED", journals["a"])
        with pytest.raises(UserError, match=r"does not take the rest of run a .*try sync again"):
            tracking.deliver(tmp_path / "journal")
    tracking.deliver(tmp_path / "journal")
    runs = {run.info.run_name: run for run in mlflow_runs(store)}
    assert len(mlflow_runs(store)) == 3
    assert {name: run.info.status for name, run in runs.items()} == {
        "a": "FINISHED",
        "a-0": "FINISHED",
        "a-1": "KILLED",
    }
    assert runs["a-1"].data.tags["ended"] == "stopped early"
    assert "ended" not in runs["a-0"].data.tags
    above = {runs[name].data.tags["mlflow.parentRunId"] for name in ("a-0", "a-1")}
    assert above == {runs["a"].info.run_id}
    assert points(store, runs["a-1"].info.run_id, "loss") == [(1, 1.0)]
    # Begun again, it is no longer one that was stopped.
    assert started(store, journal=journals["a-1"]) == runs["a-1"].info.run_id
    again = MlflowClient(store).get_run(runs["a-1"].info.run_id)
    assert again.info.status == "RUNNING"
    assert "ended" not in again.data.tags


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URI of a run's folder."""
    where = request.getfixturevalue("s3") if request.param == "s3" else str(tmp_path / "far")
    return f"{where}/runs/a"


def test_a_run_goes_on_where_its_journal_never_was(store, tmp_path, place, mlflow_runs):
    """The second node repeats no point of the first; what the first never sent, it says anew."""
    first = tracking.Journal.open(tmp_path / "1" / "a.jsonl", store, "a", place)
    started(store, journal=first)
    for step in range(5):
        first.add_metrics({"loss": float(step)}, step)
    first.add_file("figures/x.png", b"png")
    first.keep()
    for step in range(5, 8):  # lost with the node, and sent to nobody
        first.add_metrics({"loss": -1.0}, step)
    first.send()
    assert first.unsent == first.unkept == 3
    second = tracking.Journal.open(tmp_path / "2" / "a.jsonl", store, "a", place)
    started(store, journal=second)
    for step in range(3, 10):
        second.add_metrics({"loss": float(step)}, step)
    tracking.end_run(store, second.run_id, "FINISHED", second)
    (run,) = mlflow_runs(store)
    assert run.info.status == "FINISHED"
    wanted = [(step, float(step)) for step in range(10)]
    assert points(store, run.info.run_id, "loss") == wanted
    tracking.deliver(tmp_path / "1")  # the first node is found again
    tracking.deliver(place)
    assert points(store, run.info.run_id, "loss") == wanted
    third = tracking.Journal.open(tmp_path / "1" / "a.jsonl", store, "a", place)
    third.add_metrics({"loss": -1.0}, 7)
    assert third.unsent == 0


def test_what_a_lost_node_did_not_send_is_delivered_from_the_store(
    store, tmp_path, place, away, monkeypatch
):
    monkeypatch.setattr(tracking, "_LAST_CHANCE", 0.5)
    journal = tracking.Journal.open(tmp_path / "1" / "a.jsonl", store, "a", place)
    with away():
        started(store, journal=journal)
        tracker = tracking.Tracker(journal)
        tracker.log({"loss": 1.0}, 1)
        tracker.figure("samples", b"png", 1)
        tracker.close()
        tracking.end_run(store, "a", "FAILED", journal)
    shutil.rmtree(tmp_path / "1")
    above = place.rpartition("/")[0]
    assert tracking.waiting(place) == tracking.waiting(above) == {"a": 4}
    ((run_id, count),) = tracking.deliver(above).items()
    assert count == 4
    assert tracking.waiting(place) == tracking.deliver(place) == {}
    run = MlflowClient(store).get_run(run_id)
    assert run.info.status == "FAILED"
    assert points(store, run_id, "loss") == [(1, 1.0)]
    kept = [f.path for f in MlflowClient(store).list_artifacts(run_id, "figures")]
    assert kept == ["figures/samples-0000000001.png"]


def test_nothing_is_sent_that_storage_does_not_hold(store, tmp_path, monkeypatch, caplog):
    """A store that is away is said once and stops nobody."""
    monkeypatch.setattr(tracking, "_LAST_CHANCE", 0.5)
    journal = tracking.Journal.open(tmp_path / "a.jsonl", store, "a", str(tmp_path / "far"))
    run_id = started(store, journal=journal)
    with monkeypatch.context() as patch:

        def refuse(uri: str, data: bytes) -> None:
            raise storage.Unavailable("the store is away")

        patch.setattr(storage, "write_bytes", refuse)
        tracker = tracking.Tracker(journal)
        tracker.log({"loss": 1.0}, 1)
        tracker.close()
    assert points(store, run_id, "loss") == []
    assert caplog.text.count("the store is away") == 1
    tracking.end_run(store, run_id, "FINISHED", journal)
    assert points(store, run_id, "loss") == [(1, 1.0)]


def test_a_full_disk_leaves_no_half_line(store, tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    journal = tracking.Journal.open(path, store, started(store))
    tracker = tracking.Tracker(journal)
    tracker.log({"loss": 1.0}, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 9, limits[1]))
    try:
        tracker.log({"loss": 2.0}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    tracker.log({"loss": 3.0}, 3)
    tracker.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("step") for line in lines] == [None, 1, 3]
    assert "The journal cannot be written" in caplog.text


def test_a_run_whose_store_has_changed_is_told_there_from_the_start(store, tmp_path, empty_store):
    journal = tracking.Journal.open(tmp_path / "a.jsonl", store, "a", str(tmp_path / "far"))
    before = started(store, journal=journal)
    journal.add_metrics({"loss": 1.0}, 1)
    tracking.end_run(store, before, "KILLED", journal)
    shutil.copy(empty_store, tmp_path / "other.db")
    other = f"sqlite:///{tmp_path}/other.db"
    journal = tracking.Journal.open(tmp_path / "a.jsonl", other, "a", str(tmp_path / "far"))
    after = started(other, journal=journal)
    journal.add_metrics({"loss": 2.0}, 2)
    tracking.end_run(other, after, "FINISHED", journal)
    assert points(other, after, "loss") == [(1, 1.0), (2, 2.0)]
    assert points(store, before, "loss") == [(1, 1.0)]


def test_another_run_of_the_same_name_has_its_own_journal(store, tmp_path, mlflow_runs):
    path, far = tmp_path / "journal" / "a.jsonl", str(tmp_path / "far")
    for key in ("first", "second"):
        journal = tracking.Journal.open(path, store, key, far)
        started(store, journal=journal)
        journal.add_metrics({"loss": float(len(key))}, 1)
        shutil.rmtree(far)  # as its user does, to begin anew
    assert len(tracking.deliver(path.parent)) == 2
    found: list[Run] = mlflow_runs(store)
    assert {run.data.tags["run_key"]: run.data.metrics["loss"] for run in found} == {
        "first": 5.0,
        "second": 6.0,
    }

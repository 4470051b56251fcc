"""The steps of a workflow, for Metaflow: prepare, perhaps sweep, train, evaluate, register.

``pipelines/workflow.py`` is the command; it checks what it is given and starts this file. Each step
is a process of its own that calls the function behind the command of the same name, and what passes
from one to the next are places and ids, never models.
"""

# Metaflow builds its names at run time, where no type checker sees them.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false

import faulthandler
import functools
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from metaflow import FlowSpec, Parameter, card, current, environment, retry, step, timeout
from metaflow.cards import Image, Markdown, Table
from metaflow.exception import METAFLOW_EXIT_DISALLOW_RETRY

from ivegan.errors import UserError
from pipelines.flows import limits

TIMEOUT, RETRY, ENVIRONMENT = limits.arguments()
GRACE = 60  # seconds that a step has to end in order, after its time is over


def bounded(title: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Return a decorator of a step's body: its end is certain, and a user's mistake is final."""

    def decorate(body: Callable[[Any], None]) -> Callable[[Any], None]:
        @functools.wraps(body)
        def run(flow: Any) -> None:
            from ivegan.storage import Unavailable
            from pipelines import workflow

            # Metaflow's timeout is a signal that code outside Python may never look at.
            faulthandler.dump_traceback_later(TIMEOUT[title]["seconds"] + GRACE, exit=True)
            try:
                body(flow)
            except Unavailable as away:
                # At the next attempt that may be other. Its cause's text may hold a password.
                raise away from None
            except UserError as mistake:
                workflow.note_mistake(mistake)
                sys.exit(METAFLOW_EXIT_DISALLOW_RETRY)
            finally:
                faulthandler.cancel_dump_traceback_later()

        return run

    return decorate


def need_places(flow: Any) -> None:
    """See that everything has a place outside a pod, whose disk goes when its step ends.

    Raises:
        UserError: something has none.
    """
    from ivegan.config import preset

    if "METAFLOW_KUBERNETES_WORKLOAD" not in os.environ:
        return
    names = ("storage", "out") if preset(flow.preset).is_points else ("data", "storage", "out")
    missing = [name for name in names if not getattr(flow, name)]
    missing += [] if os.environ.get("MLFLOW_TRACKING_URI") else ["MLFLOW_TRACKING_URI"]
    if missing:
        raise UserError(
            "Each step is a pod, and what it writes to its disk is gone with it: set "
            f"{', '.join(missing)} to places outside it."
        )


class IveGanFlow(FlowSpec):
    """Raw data to registered models, for one preset."""

    preset = Parameter("preset", default="digits", help="what to train")
    changes = Parameter("set", default="", help="settings to change: optim.lr_g=1e-4,seed=3")
    source = Parameter("source", default="", help="raw data for the build, where it needs any")
    data = Parameter("data", default="", help="shards; built below runs/data where not given")
    storage = Parameter("storage", default="", help="where run folders go")
    out = Parameter("out", default="", help="where figures and reports go")
    workers = Parameter("workers", default=2, type=int, help="DDP workers; 0 is without Ray")
    threads = Parameter("threads", default=1, type=int, help="CPU threads of each worker")
    gpu = Parameter("gpu", default=False, type=bool, help="give each worker a GPU")
    precision = Parameter("precision", default="float32", help="float32 or bfloat16")
    stream = Parameter("stream", default=False, type=bool, help="read shards without a cache")
    wait_for_nodes = Parameter("wait-for-nodes", default=0.0, type=float, help="seconds")
    run_name = Parameter("run-name", default="", help="run id of the training")
    sweep_samples = Parameter("sweep-samples", default=0, type=int, help="trials; 0 is no sweep")
    sweep_images = Parameter("sweep-images", default=0, type=int, help="of a trial; 0 is all")
    sweep_space = Parameter("sweep-space", default="", help="what to search")
    anew = Parameter("anew", default=False, type=bool, help="reuse no finished sweep or training")

    @timeout(**TIMEOUT["prepare"])
    @retry(**RETRY)
    @environment(**ENVIRONMENT)
    @step
    @bounded("prepare")
    def start(self) -> None:
        """Build the shards, or see that they are there."""
        from pipelines import workflow

        need_places(self)
        self.run_id = self.run_name or f"{self.preset}-{current.run_id}"
        self.data_uri = workflow.prepare(workflow.plan_of(self), self.source)
        self.searched: dict[str, Any] = {}
        self.way = "sweep" if self.sweep_samples else "train"
        self.next({"sweep": self.sweep, "train": self.train}, condition="way")

    @card(type="blank")
    @timeout(**TIMEOUT["sweep"])
    @retry(**RETRY)
    @environment(**ENVIRONMENT)
    @step
    @bounded("sweep")
    def sweep(self) -> None:
        """Search for better settings, or finish the search that an attempt before began."""
        from pipelines import workflow

        plan = workflow.plan_of(self)
        self.searched = workflow.sweep(self, plan)
        current.card.append(Markdown(f"# {self.preset}: {self.searched['sweep_id']}"))
        picture = workflow.sweep_picture(plan, self.searched["sweep_id"])
        if picture is not None:
            current.card.append(Image(picture))
        current.card.append(Table(*workflow.sweep_table(self.searched)))
        self.next(self.train)

    @timeout(**TIMEOUT["train"])
    @retry(**RETRY)
    @environment(**ENVIRONMENT)
    @step
    @bounded("train")
    def train(self) -> None:
        """Train, or go on where an interrupted attempt stopped, or find what is finished."""
        from pipelines import workflow

        self.trained = workflow.train_or_reuse(self, workflow.plan_of(self))
        self.next(self.evaluate)

    @card(type="blank")
    @timeout(**TIMEOUT["evaluate"])
    @retry(**RETRY)
    @environment(**ENVIRONMENT)
    @step
    @bounded("evaluate")
    def evaluate(self) -> None:
        """Measure the last checkpoint and draw the paper's figures."""
        from ivegan.evaluation import report
        from pipelines import evaluate, workflow

        at, out = self.trained["checkpoint"], workflow.report_folder(self)
        print(f"measuring {at} on held-out samples")
        with workflow.folder_for(out) as folder:
            self.metrics = evaluate.evaluate_checkpoint(at, data=self.data_uri, out=folder)
            figures = {path.stem: path.read_bytes() for path in sorted(folder.glob("*.png"))}
        self.report = f"{out}/report.html"
        current.card.append(Markdown(f"# {self.preset}: run {self.trained['run_id']}"))
        rows = [[title, value, against] for title, value, against, _ in report.rows(self.metrics)]
        current.card.append(Table(rows, headers=["what", "here", "to hold it against"]))
        for name, png in figures.items():
            current.card.append(Markdown(f"### {name.replace('_', ' ')}"))
            current.card.append(Image(png))
        self.next(self.register)

    @timeout(**TIMEOUT["register"])
    @retry(**RETRY)
    @environment(**ENVIRONMENT)
    @step
    @bounded("register")
    def register(self) -> None:
        """Register the encoder and the generator of this run, as candidates in staging."""
        from pipelines import registry

        print(f"registering both halves of {self.trained['run_id']}")
        self.registered = registry.register(self.trained["checkpoint"])
        for name in self.registered["names"]:
            stage = self.registered["stage"]
            print(f"{name} reloads from MLflow and agrees with the checkpoint: in {stage}")
        self.next(self.end)

    @step
    def end(self) -> None:
        """Gather what ``--json`` prints."""
        self.result = json.loads(
            json.dumps(
                {
                    **self.trained,
                    "data": self.data_uri,
                    "sweep": self.searched or None,
                    "evaluation": self.metrics,
                    "report": self.report,
                    "registered": self.registered,
                },
                default=str,
            )
        )


if __name__ == "__main__":
    IveGanFlow()

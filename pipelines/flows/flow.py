"""The steps of a workflow, for Metaflow: prepare, an optional sweep, train, evaluate, register.

``pipelines/workflow.py`` is the command; it checks its options and starts this file. Each step is a
process of its own that calls the function behind the command of the same name.
"""

# Metaflow builds its names at run time, where no type checker sees them.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metaflow import FlowSpec, JSONType, Parameter, card, current, step
from metaflow.cards import Image, Markdown, Table
from metaflow.exception import METAFLOW_EXIT_DISALLOW_RETRY

from ivegan import storage
from ivegan.errors import UserError
from pipelines.flows.runner import MISTAKE


def final(body: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return a step's body in which a UserError ends the step without a traceback.

    The sentence goes to the command, which prints it if the workflow fails.
    """

    @functools.wraps(body)
    def run(flow: Any) -> None:
        mistake = Path(os.environ.get(MISTAKE, os.devnull))
        if mistake.is_file():  # of an earlier attempt
            mistake.unlink()
        try:
            body(flow)
        except UserError as error:
            print(error, flush=True)
            mistake.write_text(str(error))
            again = isinstance(error, storage.Unavailable)
            sys.exit(1 if again else METAFLOW_EXIT_DISALLOW_RETRY)

    return run


class IveGanFlow(FlowSpec):
    """Raw data to registered models, for one preset."""

    preset = Parameter("preset", default="digits", help="preset to train")
    options = Parameter(
        "options",
        type=JSONType,
        default="{}",
        help="options of workflow.py by name, as one JSON object; settings as "
        '{"set": {"optim.lr_g": 1e-4}}',
    )

    @step
    @final
    def start(self) -> None:
        """Build the shards, or check that they exist."""
        from pipelines.flows import steps

        steps.reports_uri(self)  # raises now what it would after the training
        plan = steps.plan_of(self)
        self.data_uri = steps.prepare(plan, self.options.get("source"))
        self.searched: dict[str, Any] = {}
        self.way = "sweep" if self.options.get("sweep_samples") else "train"
        self.next({"sweep": self.sweep, "train": self.train}, condition="way")

    @card(type="blank")
    @step
    @final
    def sweep(self) -> None:
        """Search for better settings, or finish the search that an earlier attempt started."""
        from pipelines.flows import steps

        self.searched = steps.sweep(self, steps.plan_of(self))
        current.card.append(Markdown(f"# {self.preset}: {self.searched['sweep_id']}"))
        current.card.append(Image(storage.read_bytes(self.searched["figure"])))
        current.card.append(Table(*steps.sweep_table(self.searched)))
        self.next(self.train)

    @step
    @final
    def train(self) -> None:
        """Train, continue an interrupted training, or find a finished equal one."""
        from pipelines.flows import steps

        self.trained = steps.train(self, steps.plan_of(self))
        self.next(self.evaluate)

    @card(type="blank")
    @step
    @final
    def evaluate(self) -> None:
        """Measure the last checkpoint and draw the paper's figures."""
        from ivegan.evaluation import report
        from pipelines.evaluate import Evaluate, evaluate_checkpoint
        from pipelines.flows import steps

        checkpoint_uri, run_id = self.trained["checkpoint"], self.trained["run_id"]
        out = storage.join(steps.reports_uri(self), run_id)
        print(f"measuring {checkpoint_uri} on held-out samples")
        options = Evaluate(checkpoint=checkpoint_uri, data=self.data_uri, out=out)
        result = evaluate_checkpoint(options)
        self.metrics, self.report = result["metrics"], result["report"]
        current.card.append(Markdown(f"# {self.preset}: run {run_id}"))
        rows = [[row.meaning.title, row.value, row.compare] for row in report.rows(self.metrics)]
        current.card.append(Table(rows, headers=["metric", "value", "compare with"]))
        for name in sorted(result["figures"]):
            current.card.append(Markdown(f"### {name.replace('_', ' ')}"))
            current.card.append(Image(result["files"][f"{name}.png"]))
        self.next(self.register)

    @step
    @final
    def register(self) -> None:
        """Register the encoder and the generator of this run, as candidates in staging."""
        from pipelines.models.register import register

        print(f"registering both halves of {self.trained['run_id']}")
        self.registered = register(self.trained["checkpoint"])
        for name in self.registered["names"]:
            stage = self.registered["stage"]
            print(f"{name} reloads from MLflow and agrees with the checkpoint: in {stage}")
        self.next(self.end)

    @step
    def end(self) -> None:
        """Gather the JSON object of the command."""
        result = {
            **self.trained,
            "data": self.data_uri,
            "sweep": self.searched or None,
            "evaluation": self.metrics,
            "report": self.report,
            "registered": self.registered,
        }
        self.result = json.loads(json.dumps(result, default=str))


if __name__ == "__main__":
    IveGanFlow()

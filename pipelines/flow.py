"""The steps of a workflow, for Metaflow: prepare, train, evaluate, register.

``pipelines/workflow.py`` is the command; it checks what it is given and starts this file. Each step
is a process of its own that calls the function behind the command of the same name, and what passes
from one to the next are places and ids, never models.
"""

# Metaflow builds its names at run time, where no type checker sees them.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false

import json
from pathlib import Path

from metaflow import FlowSpec, Parameter, card, current, retry, step
from metaflow.cards import Image, Markdown, Table


class IveGanFlow(FlowSpec):
    """Raw data to registered models, for one preset."""

    preset = Parameter("preset", default="digits", help="what to train")
    changes = Parameter("set", default="", help="settings to change: optim.lr_g=1e-4,seed=3")
    source = Parameter("source", default="", help="raw data for the build, where it needs any")
    data = Parameter("data", default="", help="shards; built below runs/data where not given")
    storage = Parameter("storage", default="", help="where run folders go")
    out = Parameter("out", default="", help="where figures and reports go")
    workers = Parameter("workers", default=2, type=int, help="DDP workers; 0 is without Ray")
    gpu = Parameter("gpu", default=False, type=bool, help="give each worker a GPU")
    run_name = Parameter("run-name", default="", help="run id of the training")

    @step
    def start(self) -> None:
        """Build the shards, or see that they are there."""
        from pipelines import workflow

        plan = workflow.plan_of(self)
        self.data_uri = workflow.prepare(plan, self.source)
        print(
            f"shards in {self.data_uri}" if self.data_uri else "points are drawn as they are used"
        )
        self.next(self.train)

    @retry(times=1, minutes_between_retries=0)
    @step
    def train(self) -> None:
        """Train, or go on where an interrupted attempt of this step stopped."""
        from pipelines import train, workflow

        plan = workflow.plan_of(self, data=self.data_uri)
        self.trained = train.fit(plan, show=train.Display(plan))
        self.next(self.evaluate)

    @card(type="blank")
    @step
    def evaluate(self) -> None:
        """Measure the last checkpoint and draw the paper's figures."""
        from ivegan import report
        from pipelines import evaluate, workflow

        out = Path(workflow.report_folder(self))
        self.report = str(out / "report.html")
        print(f"measuring {self.trained['checkpoint']} on held-out samples")
        at = self.trained["checkpoint"]
        self.metrics = evaluate.evaluate_checkpoint(at, data=self.data_uri, out=out)
        current.card.append(Markdown(f"# {self.preset}: run {self.trained['run_id']}"))
        rows = [[title, value, against] for title, value, against, _ in report.rows(self.metrics)]
        current.card.append(Table(rows, headers=["what", "here", "to hold it against"]))
        for figure in sorted(out.glob("*.png")):
            current.card.append(Markdown(f"### {figure.stem.replace('_', ' ')}"))
            current.card.append(Image(figure.read_bytes()))
        self.next(self.register)

    @step
    def register(self) -> None:
        """Register the encoder and the generator of this run, as candidates in staging."""
        from pipelines import registry

        self.registered = registry.register(self.trained["checkpoint"])
        for name in self.registered["names"]:
            print(f"{name} reloads from MLflow and agrees with the checkpoint: in staging")
        self.next(self.end)

    @step
    def end(self) -> None:
        """Gather what ``--json`` prints."""
        self.result = json.loads(
            json.dumps(
                {
                    **self.trained,
                    "data": self.data_uri,
                    "evaluation": self.metrics,
                    "report": self.report,
                    "registered": self.registered,
                },
                default=str,
            )
        )


if __name__ == "__main__":
    IveGanFlow()

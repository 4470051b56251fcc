"""Small trainings, whose losses are read from the run's record."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.building import build
from ivegan.config import override, preset
from pipelines.record import read_metrics
from pipelines.training.fit import fit
from pipelines.training.follow import Show
from pipelines.training.plan import Run, resolve

Start = Callable[..., tuple[dict[str, Any], list[dict[str, float]]]]


def losses_of(run_uri: str) -> list[dict[str, float]]:
    """Return the losses of a run's record, flush by flush."""
    return [
        {k: v for k, v in point.metrics.items() if k.startswith(("loss/", "logit/"))}
        for point in read_metrics(run_uri)
    ]


@pytest.fixture
def ring(home: Path, store: str) -> Callable[..., Start]:
    """Return a function of settings; it returns one that trains, and returns result and losses."""

    def of(workers: int = 0, images: int = 64 * 20, **settings: Any) -> Start:
        settings = {name.replace("__", "."): value for name, value in settings.items()}
        sizes = {"batch_size": 64, "total_images": images}
        config = override(preset("ring"), sizes | settings)

        def start(
            run_id: str = "a", show: Show | None = None, **options: Any
        ) -> tuple[dict[str, Any], list[Any]]:
            cadence: dict[str, Any] = {"log_every": 64, "save_every": 64 * 10}
            run = Run(workers=workers, run_id=run_id, **cadence | options)
            plan = resolve("ring", config, run)
            return fit(plan, show=show), losses_of(plan.run_uri)

        return start

    return of


@pytest.fixture
def small_digits(home: Path, store: str) -> Callable[..., tuple[dict[str, Any], list[float]]]:
    """Return a function that trains small digits from ten shards, and returns losses of D."""
    uri = str(home / "ten-shards")
    build("digits", source=None, out=uri, workers=0, shard_size=135)

    def start(
        run_id: str, images: int = 16 * 12, norm: str = "none", **options: Any
    ) -> tuple[dict[str, Any], list[float]]:
        sizes = {"batch_size": 16, "model.width": 0.25, "total_images": images, "model.norm": norm}
        run = Run(data=uri, run_id=run_id, log_every=16, save_every=16 * 6, **options)
        plan = resolve("digits", override(preset("digits"), sizes), run)
        return fit(plan), [one["loss/D"] for one in losses_of(plan.run_uri)]

    return start

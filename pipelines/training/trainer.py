"""Ray's TorchTrainer without the actors that a run of ours has no work for.

Each is a process: it takes one to two seconds of a core to start, and half a percent of one while
it waits, since Ray wakes it a hundred times a second. What is overridden here is Ray's own and not
public: where a version of Ray goes another way, the actors are back, and nothing else changes.
"""

from typing import Any

from ray.train import Result
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy


class Trainer(TorchTrainer):
    """Trains without Ray Data, and on a Ray of its own without what only shared clusters need.

    Args:
        alone: whether Ray lives and dies with this run. One that others use, such as the trials of
            a sweep, needs somebody to free what a run holds that is stopped from outside.
        settings: of the TorchTrainer.
    """

    def __init__(self, *given: Any, alone: bool, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self._alone = alone

    def _create_default_callbacks(self) -> list[Any]:
        idle: tuple[type, ...] = (DatasetsCallback,)
        if self._alone:
            idle += (PlacementGroupCleanerCallback,)
        return [c for c in super()._create_default_callbacks() if not isinstance(c, idle)]

    def _initialize_and_run_controller(self, **settings: Any) -> Result:
        if self._alone:
            settings["scaling_policy"] = _Unannounced(self.scaling_config)
        return super()._initialize_and_run_controller(**settings)


class _Unannounced(FixedScalingPolicy):
    """A fixed number of workers that no autoscaler is told of."""

    def _maybe_send_resource_request(self) -> None: ...

    def _send_resource_request(self) -> None: ...

    def _cancel_resource_request(self) -> None: ...

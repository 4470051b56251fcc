"""The digits, built by the commands that train on them, where nobody has built them."""

from data_prep.building import build
from ivegan import storage
from ivegan.data.manifest import MANIFEST
from pipelines.training.plan import Plan


def prepare_digits(plan: Plan) -> None:
    """Build the digits that a plan trains on, where they are missing from the default place."""
    if plan.data_uri is None or plan.config.dataset != "digits" or plan.run.data is not None:
        return
    if not storage.exists(storage.join(plan.data_uri, MANIFEST)):
        build("digits", source=None, out=plan.data_uri, workers=0)

"""Finds the model of a run. Called by the stages that use one: `evaluate` and `sample`."""

from layered_model import LayeredPipeline
from pipelines import storage
from pipelines.config import Config, UserError
from pipelines.schema import RunDir


def load_model(config: Config) -> LayeredPipeline:
    """Load the model that training left in the run's directory.

    Raises:
        UserError: there is none, or it is damaged; says which command makes one.
    """
    path = RunDir(storage.absolute(config.run)).model
    command = f"layered train --preset {config.preset} --run {config.run}"
    try:
        return LayeredPipeline.from_pretrained(path)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"run={config.run!r}: {error}; `{command}` makes it") from error

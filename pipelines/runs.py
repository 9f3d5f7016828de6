"""Reads what training left in a run's directory: the model, and where the time of a step went.

Called by `evaluate`, `sample` and `serving`, and by `train` and `demo`.
"""

import json
from collections import Counter
from collections.abc import Mapping

from layered_model import LayeredPipeline
from layered_model.checkpoint import CONFIG_FILE
from pipelines import storage
from pipelines.config import Config, UserError
from pipelines.schema import RunDir


def load_model(config: Config) -> LayeredPipeline:
    """Load the model that training left in the run's directory.

    Raises:
        UserError: there is none, or it is damaged; says which command makes one.
    """
    path = model_directory(config.run)
    command = f"layered train --preset {config.preset} --run {config.run}"
    try:
        return LayeredPipeline.from_pretrained(path)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"run={config.run!r}: {error}; `{command}` makes it") from error


def model_directory(run: str) -> str:
    """Where the model of a run is, or of what is a model's directory itself, as `layered export` writes them."""
    path = storage.absolute(run)
    if storage.exists(storage.join(path, CONFIG_FILE)):
        return path
    return RunDir(path).model


def step_split(layout: RunDir) -> str:
    """What a training step spends its time on, over the whole run: ``model 93 %, optimizer 6 %, data 1 %, other 0 %``."""
    seconds: Counter[str] = Counter()
    previous = 0
    for text in storage.read_bytes(layout.metrics_log).decode().splitlines():
        line = json.loads(text)
        if "images_per_second" not in line:
            continue  # of a validation only
        spent = (line["images"] - previous) / line["images_per_second"]
        previous = line["images"]
        for name, fraction in line.items():
            if name.startswith("time/"):
                seconds[name.removeprefix("time/")] += fraction * spent
    return split_text(seconds)


def split_text(parts: Mapping[str, float]) -> str:
    """Parts of a whole in percent, the largest first."""
    total = sum(parts.values())
    ordered = Counter(parts).most_common()
    return ", ".join(f"{name} {100 * part / total:.1f} %" for name, part in ordered)

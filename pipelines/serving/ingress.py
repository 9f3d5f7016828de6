"""The application on Ray Serve: one process that speaks HTTP, and replicas that paint.

    serve run pipelines.serving.ingress:build run=runs/demo overrides="serve.max_rows=8 serve.max_replicas=2"
    serve deploy cluster/serve.yaml
    LAYERED_RUN=runs/demo serve build pipelines.serving.ingress:app --output-path serve.yaml

One process takes all requests: limits of a client and pictures that wait to be fetched are in its memory. It hands on what takes
time, so it keeps up with some dozens of GPUs. Called by `pipelines.serve`, and by Ray Serve through `build`.
"""

import json
import os
import shlex

from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from layered_model.checkpoint import load_config as load_model_config
from pipelines import paths, storage
from pipelines.config import Config, UserError, load_run_config
from pipelines.runs import model_directory
from pipelines.sections import ServeConfig
from pipelines.serving.api import create_app
from pipelines.serving.clients import load_keys
from pipelines.serving.replicas import Replica, ReplicaPainter

HEALTH_SECONDS = 10.0
RUN_VARIABLE = "LAYERED_RUN"
"""The run of `app`, in the environment of whoever imports it."""

INGRESS_REQUESTS = 1000
"""At once; more wait in Ray's proxy."""

SLACK = 16
"""Calls that a replica takes beside the pictures for which it has room: what is too much it refuses itself, at once."""


@serve.ingress()
class Ingress:
    """The interface, with replicas behind it.

    Args:
        replicas: Of `Replica`.
        settings: See `ServeConfig`.
    """

    def __init__(self, replicas: DeploymentHandle, settings: ServeConfig) -> None:
        self._replicas, self._settings = replicas, settings

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The app. Called by Ray Serve, in the ingress's process."""
        painter = ReplicaPainter(self._replicas, self._settings)
        return create_app(painter, self._settings, load_keys(self._settings))


class Arguments(BaseModel):
    """What `serve run` and a file of `serve deploy` may say of the application."""

    model_config = ConfigDict(extra="forbid")

    run: str = Field(description="Directory of the run; local or s3://.")
    overrides: list[str] = Field(
        default_factory=list,
        description="Settings to override, such as serve.max_replicas=4; on a command line separated by spaces.",
    )

    @field_validator("overrides", mode="before")
    @classmethod
    def _listed(cls, overrides: object) -> object:
        return shlex.split(overrides) if isinstance(overrides, str) else overrides


def build(arguments: Arguments) -> serve.Application:
    """The application of a run, with the run's own configuration.

    Raises:
        UserError: there is no such run, no model in it, or a setting is wrong.
    """
    overrides = [f"run={json.dumps(arguments.run)}", *arguments.overrides]
    return application(load_run_config(arguments.run, overrides))


def __getattr__(name: str) -> serve.Application:
    """`app` for `serve build`, which passes no arguments on: the application of the run that ``LAYERED_RUN`` names.

    Raises:
        AttributeError: for any other name.
        UserError: the variable is not set, or as `build`.
    """
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if RUN_VARIABLE not in os.environ:
        raise UserError(
            f"{__name__}:app is of the run that {RUN_VARIABLE} names, and it is not set"
        )
    return build(Arguments(run=os.environ[RUN_VARIABLE]))


def application(config: Config) -> serve.Application:
    """The application of a configuration.

    Raises:
        UserError: the run has no model, or keys are required and missing.
    """
    settings = paths.placed(config).serve
    model = require_model(config)
    load_keys(settings)
    room = settings.max_pictures + settings.max_queued + SLACK
    replicas = serve.deployment(
        Replica,
        name="replica",
        max_ongoing_requests=room,
        max_queued_requests=room,
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "initial_replicas": settings.min_replicas,
            "target_ongoing_requests": settings.max_pictures,
            "upscale_delay_s": 10.0,
            "downscale_delay_s": 300.0,
        },
        ray_actor_options=resources(settings),
        logging_config={"enable_access_log": False},  # the ingress has one
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=60.0,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        graceful_shutdown_wait_loop_s=1.0,
    )
    return in_front(replicas.bind(model, name_of(config), settings), settings)


def in_front(replicas: serve.Application, settings: ServeConfig) -> serve.Application:
    """The interface, bound to what paints."""
    ingress = serve.deployment(
        Ingress,
        name="ingress",
        num_replicas=1,
        max_ongoing_requests=INGRESS_REQUESTS,
        # As Serve's own controller and proxies: it must not wait for room that replicas have taken.
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=settings.drain_seconds,
        graceful_shutdown_wait_loop_s=1.0,
    )
    return ingress.bind(replicas, settings)


def resources(settings: ServeConfig) -> dict[str, float]:
    """What Ray keeps for a replica."""
    return {"num_cpus": settings.cpus_per_replica, "num_gpus": 1 if settings.use_gpu else 0}


def name_of(config: Config) -> str:
    """What clients call a run's model."""
    return os.path.basename(storage.absolute(config.run))


def require_model(config: Config) -> str:
    """The directory of the run's model.

    Raises:
        UserError: there is none, or its configuration is damaged.
    """
    model = model_directory(config.run)
    try:
        load_model_config(model)
    except (FileNotFoundError, ValueError) as error:
        raise UserError(
            f"run={config.run!r}: {error}; `layered train` makes it, `layered export` from a checkpoint"
        ) from error
    return model

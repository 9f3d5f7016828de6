"""Draws for others over HTTP, on Ray Serve, until it is interrupted. What is served is `serving.ingress`."""

import ipaddress
import logging
import sys
import time
from collections.abc import Sequence

from pipelines import cli, storage
from pipelines.config import Config
from pipelines.errors import StageFailed
from pipelines.sections import ServeConfig
from pipelines.serving.clients import load_keys
from pipelines.session import Needs, connect, event, warning

logger = logging.getLogger(__name__)

APPLICATION = "layered"
POLL_SECONDS = 2.0


def check(config: Config) -> list[str]:
    """Refuses what cannot be served; says what `run` would do.

    Raises:
        UserError: the run has no model, or keys are required and missing.
    """
    from pipelines.serving.ingress import require_model

    settings = config.serve
    model = require_model(config)
    keys = load_keys(settings)
    who = f"{len(keys.hashes)} keys" if settings.require_key else "anybody"
    replicas = f"{settings.min_replicas} to {settings.max_replicas} replicas"
    return [f"serve {model} at {_url(settings)} to {who}, with {replicas}"]


def needs(config: Config) -> Needs:
    """What a cluster must be able to give, before serving begins."""
    settings = config.serve
    return Needs(
        stage="serve",
        workers=settings.min_replicas,
        cpus_per_worker=settings.cpus_per_replica,
        gpus_per_worker=1.0 if settings.use_gpu else 0.0,
        cpus_for_tasks=0.0,
        paths=(config.run,),
    )


def run(config: Config) -> None:
    """Serves the run's model.

    Raises:
        UserError: the run has no model, keys are required and missing, or the cluster has no room.
        StageFailed: Ray Serve could not start it, or lost it.
    """
    event(logger, "serve", what=check(config)[0])
    settings = config.serve
    warn_if_open(settings)
    with connect(config, needs(config)):
        from ray import serve

        from pipelines.serving.ingress import application

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(
            http_options={"host": settings.host, "port": settings.port},
            # Of what stands between: it tells of every step.
            logging_config={"log_level": "WARNING"},
        )
        try:
            serve.run(application(config), name=APPLICATION, route_prefix="/")
            event(logger, "serving", page=_url(settings), run=storage.absolute(config.run))
            _wait()
        except KeyboardInterrupt:
            event(logger, "stopped", by="interruption")
        except RuntimeError as error:
            raise StageFailed(f"serve: {error}") from error
        finally:
            serve.delete(APPLICATION)


def warn_if_open(settings: ServeConfig) -> None:
    """Says so where other machines can draw without a key."""
    if not (settings.require_key or _is_loopback(settings.host)):
        warning(
            logger,
            "open_to_all",
            host=settings.host,
            advice="anybody who reaches this address can draw; set serve.require_key=true",
        )


def _wait() -> None:
    """Until interrupted, or until the application is gone.

    Raises:
        StageFailed: somebody has deleted it, or it failed for good.
    """
    from ray import serve

    while True:
        time.sleep(POLL_SECONDS)
        status = serve.status().applications.get(APPLICATION)
        if status is None or status.status == "DEPLOY_FAILED":
            raise StageFailed(f"serve: {status.message if status else 'the application is gone'}")


def _url(settings: ServeConfig) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{settings.port}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(argv: Sequence[str] | None = None) -> int:
    """``layered serve``."""
    return cli.main(["serve", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    raise SystemExit(main())

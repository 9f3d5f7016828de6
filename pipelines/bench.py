"""Measures the networks of a preset beside diffusers' U-Net of equal multiply-adds, in one run.

Contenders are the layered network, the single-scale network of the same shape, and the peer; early exits of the layered network
stand below them. For each: multiply-adds, parameters, what a training step keeps in memory, and the time of a forward pass, a
training step and a sampling step. All get the same pictures, text, precision and threads, and each the memory format in which a
trial finds its training step faster. Dropout is off. On a GPU networks run in bfloat16 under torch.compile.

How multiply-adds and times are taken: `costs`. How the peer is sized: `peer`. What a step is: `contenders`. Needs no Ray.
"""

import json
import logging
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from layered_model.presets import PRESETS
from layered_model.unet import UNetConfig
from pipelines import cli, costs, peer
from pipelines.config import UserError
from pipelines.contenders import FORMATS, NUM_STEPS, NUM_TOKENS, Batch, Contender, Ours, Theirs
from pipelines.session import event

logger = logging.getLogger(__name__)

WORKS = ("forward", "training_step", "sampling_step")
DEFAULT_PRESETS = {"cpu": ("64T", "128S"), "cuda": ("S", "B")}
DEFAULT_BATCH_SIZE = {"cpu": 4, "cuda": 16}
WARM_UP = {"cpu": 1, "cuda": 3}
"""Rounds that do not count; on a GPU the first compiles."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What is measured, and how."""

    presets: tuple[str, ...]
    device: str
    "'cpu' or 'cuda'."
    threads: int
    batch_size: int
    repeats: int
    "Rounds that count."

    def __post_init__(self) -> None:
        for name in self.presets:
            if name not in PRESETS:
                raise UserError(f"preset={name!r} must be one of {', '.join(PRESETS)}")
        for field in ("threads", "batch_size", "repeats"):
            if (value := getattr(self, field)) < 1:
                raise UserError(f"--{field.replace('_', '-')} {value} must be at least 1")

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()


def settle(
    presets: Sequence[str] = (),
    *,
    device: str | None = None,
    threads: int | None = None,
    batch_size: int | None = None,
    repeats: int = 9,
) -> Settings:
    """Settings with what was not said filled in: a GPU where there is one, as many threads as torch would take.

    Raises:
        UserError: a preset is unknown, a number is not positive, or there is no such device.
    """
    here = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = device or here
    if chosen not in DEFAULT_PRESETS or (chosen == "cuda" and here == "cpu"):
        raise UserError(f"--device {chosen} must be {'cpu or cuda' if here == 'cuda' else 'cpu'}")
    return Settings(
        presets=tuple(presets) or DEFAULT_PRESETS[chosen],
        device=chosen,
        threads=torch.get_num_threads() if threads is None else threads,
        batch_size=DEFAULT_BATCH_SIZE[chosen] if batch_size is None else batch_size,
        repeats=repeats,
    )


def run(settings: Settings, output: str | None = None) -> dict[str, Any]:
    """Measures every preset, prints a table for each, and returns and writes everything.

    Args:
        settings: from `settle`.
        output: JSON file to write; none for None.

    Raises:
        UserError: diffusers is not installed, or a preset has no peer.
    """
    peer.require()
    torch.set_num_threads(settings.threads)
    result: dict[str, Any] = {"machine": machine(settings), "settings": asdict(settings)}
    result["presets"] = {}
    for name in settings.presets:
        measured = measure(replace(PRESETS[name], dropout=0.0), settings)
        result["presets"][name] = measured
        sys.stdout.write(table(name, measured, result["machine"], settings) + "\n\n")
        sys.stdout.flush()
        if output is not None:
            Path(output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def machine(settings: Settings) -> dict[str, str | float]:
    """What the figures hold for."""
    import diffusers

    gpu = settings.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if gpu else costs.processor(),
        "precision": "bfloat16" if gpu else "float32",
        "threads": settings.threads,
        "cores": len(os.sched_getaffinity(0)),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }


def measure(config: UNetConfig, settings: Settings) -> dict[str, Any]:
    """All figures of one shape."""
    single = replace(config, kind="single_scale")
    shapes = {str(r): costs.network_macs(config, NUM_TOKENS, r) for r in config.resolutions}
    goal = shapes.pop(str(config.resolutions[-1]))
    matched = peer.match(config, goal, NUM_TOKENS)
    event(logger, "matched", widths=matched.widths, gmac=matched.macs / 1e9)
    macs = {
        "layered": goal,
        "single_scale": costs.network_macs(single, NUM_TOKENS),
        "diffusers": matched.macs,
    }

    batch = Batch.make(config, settings.batch_size, torch.device(settings.device))
    ours = Ours(config, batch)
    contenders: dict[str, Contender] = {
        "layered": ours,
        "single_scale": Ours(single, batch),
        "diffusers": Theirs(config, matched.widths, batch),
    }
    networks = {
        name: {
            "macs": macs[name],
            "parameters": costs.num_parameters(contender.network),
            "memory_format": choose_format(contender, settings),
            "saved_bytes_per_picture": _saved(contender) // settings.batch_size,
        }
        for name, contender in contenders.items()
    }
    if settings.device == "cuda":
        for name, contender in contenders.items():
            contender.compile()
            networks[name]["peak_training_bytes"] = _peak(contender)
    product, product_macs = costs.matrix_product(batch.pictures.device, ours.dtype)
    times = {
        work: _rounds(
            {name: getattr(c, work) for name, c in contenders.items()} | {"product": product},
            settings,
        )
        for work in ("forward", "training_step")
    }
    exits = [int(name) for name in shapes]
    times["sampling_step"] = _rounds(
        {name: c.draw for name, c in contenders.items()}
        | {f"exit_{r}": lambda r=r: ours.draw(r) for r in exits},
        settings,
        parts=NUM_STEPS,
    )
    for r in exits:
        networks[f"exit_{r}"] = {"macs": shapes[str(r)]}
    rate = product_macs / statistics.median(times["training_step"]["product"])
    return _report(networks, times, rate, settings) | {
        "peer_widths": matched.widths,
        "macs_per_second_of_matmul": rate,
    }


def choose_format(contender: Contender, settings: Settings) -> str:
    """The memory format in which a training step is faster; the contender is left in it."""
    seconds = {}
    for name in FORMATS:
        contender.use(name)
        job = {name: contender.training_step}
        taken = costs.rounds(job, repeats=3, warm_up=1, synchronize=settings.synchronize)
        seconds[name] = min(taken[name])
    best = min(seconds, key=lambda name: seconds[name])
    contender.use(best)
    return best


def table(
    name: str, measured: dict[str, Any], machine: dict[str, str | float], settings: Settings
) -> str:
    """The figures of one preset for a person."""
    head = ("network", "GMAC", "M par.", "saved MiB", *(w.replace("_", " ") for w in WORKS))
    rows = [head]
    for network, figures in measured["networks"].items():
        memory = figures.get("peak_training_bytes", figures.get("saved_bytes_per_picture"))
        rows.append(
            (
                network.replace("_", " "),
                f"{figures['macs'] / 1e9:.2f}",
                f"{figures['parameters'] / 1e6:.1f}" if "parameters" in figures else "",
                "" if memory is None else f"{memory / 2**20:.1f}",
                *(_cell(figures["seconds"].get(work), 1e3, 1) for work in WORKS),
            )
        )
    for other, ratios in measured["ratios"].items():
        times = (_cell(ratios[work], 1.0, 3) for work in WORKS)
        macs = f"{ratios['macs']:.3f}"
        saved = f"{ratios['saved_bytes_per_picture']:.3f}"
        rows.append((f"layered / {other.replace('_', ' ')}", macs, "", saved, *times))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    share = ", ".join(f"{n} {s:.0%}" for n, s in measured["share_of_matmul"].items())
    return "\n".join(
        [
            f"{name}: batch of {settings.batch_size}, {machine['precision']}, "
            f"{machine['threads']} threads, {machine['device']}; ms, median (quartiles) of "
            f"{settings.repeats} interleaved rounds",
            *lines,
            f"diffusers' block_out_channels {tuple(measured['peer_widths'])}; training steps reach, "
            f"of the {measured['macs_per_second_of_matmul'] / 1e9:.0f} GMAC/s of a matrix product: {share}",
        ]
    )


def _saved(contender: Contender) -> int:
    return costs.saved_bytes(contender.network, contender.loss)


def _peak(contender: Contender) -> int:
    """Most memory that a training step takes beside what is resident anyway."""
    contender.training_step()  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    contender.training_step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _rounds(
    jobs: dict[str, costs.Job], settings: Settings, parts: int = 1
) -> dict[str, list[float]]:
    taken = costs.rounds(
        jobs,
        repeats=settings.repeats,
        warm_up=WARM_UP[settings.device],
        synchronize=settings.synchronize,
    )
    return {name: [value / parts for value in values] for name, values in taken.items()}


def _report(
    networks: dict[str, dict[str, Any]],
    times: dict[str, dict[str, list[float]]],
    rate: float,
    settings: Settings,
) -> dict[str, Any]:
    """Networks with their times, and ratios of the layered network to the others."""
    for name, figures in networks.items():
        figures["seconds"] = {work: taken[name] for work, taken in times.items() if name in taken}
    ours, ratios, share = networks["layered"], {}, {}
    for name in ("single_scale", "diffusers"):
        theirs = networks[name]
        plain = {
            key: ours[key] / theirs[key]
            for key in ("macs", "parameters", "saved_bytes_per_picture")
        }
        ratios[name] = plain | {
            work: asdict(costs.ratio(taken["layered"], taken[name]))
            for work, taken in times.items()
        }
    for name in ("layered", "single_scale", "diffusers"):
        seconds = statistics.median(times["training_step"][name])
        share[name] = 3 * networks[name]["macs"] * settings.batch_size / seconds / rate
    return {"networks": networks, "ratios": ratios, "share_of_matmul": share}


def _cell(value: Any, factor: float, digits: int) -> str:
    """Median (quartiles) of seconds, or of a `costs.Spread` as a dictionary."""
    if value is None:
        return ""
    spread = costs.Spread.of(value) if isinstance(value, list) else costs.Spread(**value)
    median, low, high = (
        f"{v * factor:.{digits}f}" for v in (spread.median, spread.low, spread.high)
    )
    return f"{median} ({low}-{high})"


def main(argv: Sequence[str] | None = None) -> int:
    """``layered bench``."""
    return cli.main(["bench", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    raise SystemExit(main())

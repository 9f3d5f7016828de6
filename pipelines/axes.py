"""Axes of charts: where values lie in a picture, round ticks, and what is written at them.

Called by `charts`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Axis:
    """Where values lie in a picture."""

    low: float
    high: float
    begin: float
    "Pixel of `low`."
    end: float
    "Pixel of `high`."
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def place(self, values: np.ndarray | float) -> np.ndarray:
        """Pixels of values."""
        low, high = self.low, self.high
        found = np.asarray(values, dtype=np.float64)
        if self.logarithmic:
            low, high, found = math.log(low), math.log(high), np.log(found)
        return np.asarray(self.begin + (found - low) / (high - low) * (self.end - self.begin))


def linear_ticks(low: float, high: float, about: int) -> list[float]:
    """Round values between two others: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.15g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round values between two positive others: powers of ten, and multiples of them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for multiples in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 4, 6, 8)):
        values = [float(f"{m}e{power}") for power in powers for m in multiples]
        ticks = [value for value in values if low <= value <= high]
        if len(ticks) >= 4:
            break
    return ticks[:: 1 + len(ticks) // 9]


def labels(ticks: Sequence[float]) -> list[str]:
    """Texts of ticks, with as many digits as it takes to tell them apart."""
    texts: list[str] = []
    for digits in range(4, 16):
        texts = [short(tick, digits) for tick in ticks]
        if len(set(texts)) == len(texts):
            break
    return texts


def short(value: float, digits: int = 4) -> str:
    """A number for an axis: 20k, 1.5M, 0.05, 2e-5."""
    size, suffix = abs(value), ""
    if size >= 1e15 or 0 < size < 1e-3:
        number, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        value, suffix = float(number), f"e{int(exponent)}"
    else:
        for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if size >= factor:
                value, suffix = value / factor, letter
                break
    return f"{value:.{digits}g}{suffix}".replace("-", "\N{MINUS SIGN}")

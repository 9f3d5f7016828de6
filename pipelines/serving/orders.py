"""What a server is asked to draw and what it answers: plain data between whoever takes orders and whoever paints.

An order is one picture. `Painter.draw` answers it with a stream of `Accepted`, then previews, low layers first, then one
`Picture`; who has seen enough closes the stream, and the order's place is free at the next step. Before `Accepted` nothing has
been promised: an order is refused there, by one of the errors below. Everything here can be pickled, for an order may be
painted on another machine.

Called by `api`, which makes orders of requests; by `painter`, which paints them; and by `replicas`, which carries them there.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from jaxtyping import UInt8
from numpy import ndarray

Pixels = UInt8[ndarray, "side side 3"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """One picture to draw; decides it to the bit, with the model's weights, on one kind of machine."""

    prompt: str
    "What to draw; empty for anything."
    resolution: int
    "Pixels of a side, one of the model's."
    seed: int
    "Of the noise, from 0 to 2^63 - 1."
    num_steps: int
    "Steps from noise to picture."
    guidance: float | tuple[float, ...]
    "How far to follow the prompt, for all layers or for each of the model's, low to high."
    negative_prompt: str = ""
    "What to move away from."
    layer_prompts: Mapping[int, str] = field(default_factory=dict)
    "Prompts of their own for resolutions above the lowest."
    image: Pixels | None = None
    "Picture to start from: of a resolution of the model, and at least as large as what is drawn."
    finish: Pixels | None = None
    "Picture of a lower resolution to finish: the drawn one, downscaled, is that picture. Not with `image`."
    strength: float = 0.8
    "Share of the steps to take from `image` or `finish`, in (0, 1]."
    num_previews: int = 0
    "Previews wanted on the way; fewer where there are fewer steps."
    deadline_seconds: float | None = None
    "From acceptance to the picture; None for the server's own limit, which it cannot exceed."


@dataclass(frozen=True, slots=True)
class Accepted:
    """The order is taken: it will be drawn, or end with an error."""

    num_ahead: int
    "Orders that were waiting for a place before it."


@dataclass(frozen=True, slots=True)
class Preview:
    """The picture as the model expects it so far."""

    index: int
    "From 0."
    step: int
    "Steps taken."
    num_steps: int
    "In all; fewer than ordered where it starts from a picture."
    pixels: Pixels
    "Of the lowest layer first, of the order's resolution last."


@dataclass(frozen=True, slots=True)
class Picture:
    """The picture."""

    pixels: Pixels
    "Of the order's resolution."
    model: str
    "SHA-256 of the weights that drew it."
    seconds: float
    "From acceptance to here."


Event = Accepted | Preview | Picture


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What a client may know of the model."""

    name: str
    "What clients call it: the run's last part."
    weights_sha256: str
    "Of the weights."
    resolutions: tuple[int, ...]
    "That can be drawn, low to high."
    sampler: str
    "Solver that all pictures are drawn with."
    num_steps: int
    "Used where an order does not say."
    guidance: float
    "Used where an order does not say."
    max_tokens: int
    "Of a prompt; longer ones are refused."
    can_finish: bool
    "Whether a lower picture can be finished, which takes noise that all layers share."
    created: int
    "When the weights were written, in seconds since 1970."


@dataclass(frozen=True, slots=True)
class Distribution:
    """How often values of some size came up."""

    bounds: tuple[float, ...]
    "Upper ends of the ranges, rising; one more range goes on from the last."
    counts: tuple[int, ...]
    "Values in each range, one more than there are bounds."
    total: float
    "Sum of all values."


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one engine has to do, and has done since it began."""

    replica: str
    "Which one."
    active: int
    "Pictures on their way."
    waiting: int
    "Pictures that wait for a place."
    rows: Distribution
    "Rows of each pass of the network."
    seconds: Distribution
    "Of each pass."


class BadOrder(ValueError):
    """An order that can never be drawn: the message names what is wrong with it and what would be right."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(param, message)
        self.param = param
        self.message = message

    def __str__(self) -> str:
        return self.message


class Busy(RuntimeError):
    """The queue is full; come again after `retry_after_seconds`."""

    def __init__(self, retry_after_seconds: float) -> None:
        super().__init__(retry_after_seconds)
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        return f"the queue is full; try again in {self.retry_after_seconds:.0f} seconds"


class TooLate(RuntimeError):
    """The order's deadline passed before its picture was done."""


class Unavailable(RuntimeError):
    """Nobody can paint now, or whoever painted this order is gone; the same order may be placed again."""


class Painter(Protocol):
    """Whoever paints: the engine in this process, or replicas of it on a cluster."""

    async def facts(self) -> ModelFacts:
        """The model that paints now.

        Raises:
            Unavailable: nobody can paint now.
        """
        ...

    async def work(self) -> list[Work]:
        """What each engine does now; none where nobody can paint."""
        ...

    def draw(self, order: Order) -> AsyncIterator[Event]:
        """One order's events, see the module. Closing the iterator (``aclose``) gives the order up.

        Raises:
            BadOrder: it can never be drawn; before `Accepted`.
            Busy: the queue is full; before `Accepted`.
            TooLate: its deadline has passed.
            Unavailable: nobody can paint, or who painted it is gone.
        """
        ...

"""What a server's answers hold, for whoever asks: its models, pictures on their way, and pictures.

Read from the JSON of the interface; what only a later server tells is passed over. Called by `client`.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

UNREADABLE = (AttributeError, KeyError, OverflowError, TypeError, ValueError)
"""What the functions here raise where an answer is not what it should be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """A model that a server draws with, and how much may be asked of it."""

    name: str
    "What requests call it."
    weights_sha256: str
    "Of the weights."
    resolutions: tuple[int, ...]
    "That can be drawn, low to high."
    num_steps: int
    "Used where a request does not say."
    guidance: float
    "Used where a request does not say."
    max_tokens: int
    "Of a prompt."
    can_finish: bool
    "Whether a lower picture can be finished."
    max_images: int
    "Pictures of one request."
    max_steps: int
    "Steps of one picture."
    max_previews: int
    "Previews of one picture."


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedPreview:
    """A picture on its way, as the model expects it so far."""

    image_index: int
    "Which of the pictures asked for, from 0."
    seed: int
    "Of its noise."
    step: int
    "Steps taken."
    num_steps: int
    "In all."
    resolution: int
    "Pixels of a side: low ones come first."
    content: bytes
    "PNG file."


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedPicture:
    """A picture that is done."""

    image_index: int
    "Which of the pictures asked for, from 0."
    seed: int
    "Of its noise."
    num_steps: int
    "Steps taken."
    resolution: int
    "Pixels of a side."
    content: bytes
    "PNG file, whose text chunks say what it was drawn from."
    model: str
    "SHA-256 of the weights that drew it."
    seconds: float
    "From its acceptance to its end."


def read_models(content: bytes) -> list[ServedModel]:
    """The answer of ``/v1/models``; raises one of `UNREADABLE`, as all here do."""
    return [_model(entry) for entry in json.loads(content)["data"]]


def _model(entry: Mapping[str, Any]) -> ServedModel:
    limits = {key: int(entry["limits"][key]) for key in ("max_images", "max_steps", "max_previews")}
    if limits["max_images"] < 1 or not entry["resolutions"]:
        raise ValueError("nothing can be asked of this model")
    return ServedModel(
        name=str(entry["id"]),
        weights_sha256=str(entry["weights_sha256"]),
        resolutions=tuple(sorted(map(int, entry["resolutions"]))),
        num_steps=int(entry["num_steps"]),
        guidance=float(entry["guidance"]),
        max_tokens=int(entry["max_tokens"]),
        can_finish=bool(entry["can_finish"]),
        **limits,
    )


def read_error(content: str | bytes) -> tuple[str, str, str]:
    """The error of a refusal or of an event: its type, the parameter that is wrong (or nothing), and what it says."""
    error = json.loads(content)["error"]
    return str(error["type"]), str(error["param"] or ""), str(error["message"])


def read_event(name: str, data: str) -> EncodedPreview | EncodedPicture | None:
    """A preview or a picture of a stream; None for any other event."""
    kind = name.partition(".")[2]
    if kind not in ("partial_image", "completed"):
        return None
    fields = json.loads(data)
    shared: dict[str, Any] = {
        key: int(fields[key]) for key in ("image_index", "seed", "num_steps", "resolution")
    }
    shared["content"] = base64.b64decode(fields["b64_json"], validate=True)
    if kind == "partial_image":
        return EncodedPreview(**shared, step=int(fields["step"]))
    return EncodedPicture(
        **shared, model=str(fields["weights_sha256"]), seconds=float(fields["seconds"])
    )

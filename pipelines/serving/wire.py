"""What clients send and get: requests as they are checked, orders that are made of them, pictures as files, answers as JSON.

The words are those of OpenAI's images API (https://platform.openai.com/docs/api-reference/images), so that its clients work
unchanged: what they may send and nothing else is taken, except for what only this model has (seed, number of steps, guidance).
Whatever is wrong is told as a `BadOrder`, which names the field. Called by `api`.
"""

import base64
import hashlib
import io
import json
import secrets
import time
from dataclasses import asdict
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from pipelines.grid import png_bytes
from pipelines.pictures import crop_square, decode
from pipelines.sections import ServeConfig
from pipelines.serving.orders import BadOrder, ModelFacts, Order, Picture, Pixels, Preview

MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}

MAX_PIXELS = 50_000_000
"""Of a picture that is sent, before it takes any memory."""

SEED_BITS = 32
"""Of seeds that are drawn here: short enough to be typed, and exact in JavaScript."""

Format = Literal["png", "jpeg", "webp"]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _whole(text: str) -> str:
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("half of a surrogate pair is no character of Unicode")
    return text


Text = Annotated[str, AfterValidator(_whole)]
"""JSON can hold halves of characters, of which tokenizers and files know nothing."""


class Wanted(BaseModel):
    """What all routes that draw understand."""

    model_config = ConfigDict(extra="forbid")

    prompt: Text = Field(description="What to draw; empty for anything.")
    model: Text | None = Field(None, description="Name of the model; there is one.")
    n: int = Field(1, ge=1, description="Pictures; picture i is drawn from `seed` + i.")
    size: Text = Field(
        "auto",
        description="`WxH`, a square of one of the model's resolutions; `auto` is the highest.",
        examples=["auto", "256x256"],
    )
    response_format: Literal["b64_json", "url"] = Field(
        "b64_json", description="The picture itself, or where it can be fetched for a while."
    )
    output_format: Format = Field(
        "png", description="png holds in its text chunks all that it takes to draw it again."
    )
    output_compression: int = Field(90, ge=0, le=100, description="Quality of jpeg and webp.")
    stream: bool = Field(False, description="Answer with server-sent events.")
    partial_images: int = Field(
        0, ge=0, description="Previews on the way where the answer is streamed, low layers first."
    )
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="Decides the picture; drawn at random where it is absent."
    )
    num_steps: int | None = Field(None, ge=1, description="Steps from noise to picture.")
    guidance: Finite | list[Finite] | None = Field(
        None, description="How far to follow the prompt: one number, or one for each layer."
    )
    negative_prompt: Text = Field("", description="What to move away from.")
    layer_prompts: dict[int, Text] = Field(
        default_factory=dict,
        description="Prompts of their own for resolutions above the lowest.",
        examples=[{"512": "fine brush strokes"}],
    )
    deadline_seconds: Finite | None = Field(
        None,
        gt=0,
        description="Give up what is not done by then; the server has a limit of its own.",
    )
    quality: Literal["auto", "standard"] = Field("auto", description="Has no effect.")
    background: Literal["auto", "opaque"] = Field("auto", description="Always opaque.")
    moderation: Literal["auto", "low"] = Field("auto", description="Has no effect.")
    user: str | None = Field(None, description="Has no effect.")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        """A field that is null is absent, as in OpenAI's API."""
        if not isinstance(values, dict):
            return values
        return {key: value for key, value in values.items() if value is not None}


class EditWanted(Wanted):
    """What routes understand that start from a picture. Forms hold texts, so lists and objects are JSON in them."""

    image: bytes = Field(
        description="A png, jpeg or webp file.", json_schema_extra={"format": "binary"}
    )
    strength: Finite = Field(
        0.8, gt=0, le=1, description="Share of the steps that are taken from the picture."
    )
    input_fidelity: Literal["low", "high"] = Field("low", description="Has no effect.")

    @field_validator("guidance", "layer_prompts", mode="before")
    @classmethod
    def _from_json(cls, value: Any) -> Any:
        try:
            return json.loads(value) if isinstance(value, str) else value
        except ValueError as error:
            raise ValueError(f"{value!r} must be JSON") from error


class ErrorAnswer(BaseModel):
    """An error, in OpenAI's form."""

    class Error(BaseModel):
        """What is wrong."""

        message: str
        type: str
        param: str | None = Field(description="The field that is to blame.")
        code: str | None

    error: Error


class ImagesAnswer(BaseModel):
    """Pictures that were drawn."""

    class Image(BaseModel):
        """One picture."""

        b64_json: str | None = None
        url: str | None = None
        seed: int
        resolution: int

    created: int
    model: str
    weights_sha256: str
    size: str
    output_format: Format
    background: str
    quality: str
    data: list[Image]


def first_mistake(kind: type[Wanted], error: ValidationError) -> tuple[str, str | None]:
    """What is wrong with a request of a kind, in a line, and the field that is to blame."""
    first = error.errors(include_url=False)[0]
    param = str(first["loc"][0]) if first["loc"] else None
    if param is None:
        return "the body must be a JSON object", None
    if first["type"] in ("missing", "extra_forbidden"):
        known = ", ".join(kind.model_fields)
        told = "is missing" if first["type"] == "missing" else f"is unknown; known are {known}"
        return f"{param} {told}", param
    value = first["input"]
    shown = f"{param}={repr(value)[:40]}" if isinstance(value, str | int | float) else param
    told = str(first["msg"]).removeprefix("Value error, ")
    return f"{shown}: {told[0].lower()}{told[1:]}", param


def orders_of(
    wanted: Wanted,
    facts: ModelFacts,
    settings: ServeConfig,
    *,
    seed: int,
    start: Literal["image", "finish"] = "image",
) -> list[Order]:
    """A request's orders, picture by picture.

    Args:
        wanted: The request.
        facts: The model's.
        settings: Whose limits hold.
        seed: Of the first picture.
        start: What the picture of an `EditWanted` is, as `Order` has it.

    Raises:
        BadOrder: what was asked is not there, or is too much.
    """
    if wanted.model not in (None, facts.name):
        raise BadOrder("model", f"model={wanted.model!r} is not here; there is {facts.name!r}")
    _check_limits(wanted, settings)
    resolution = _resolution(wanted.size, facts)
    guidance = facts.guidance if wanted.guidance is None else wanted.guidance
    options: dict[str, Any] = {}
    if isinstance(wanted, EditWanted):
        options["strength"] = wanted.strength
        if start == "image":
            options["image"] = _cropped(wanted.image, resolution)
        else:
            options["finish"] = _lower(wanted.image, resolution, facts)
    return [
        Order(
            prompt=wanted.prompt,
            resolution=resolution,
            seed=(seed + i) % 2**63,
            num_steps=wanted.num_steps or facts.num_steps,
            guidance=tuple(guidance) if isinstance(guidance, list) else guidance,
            negative_prompt=wanted.negative_prompt,
            layer_prompts=wanted.layer_prompts,
            num_previews=wanted.partial_images if wanted.stream else 0,
            deadline_seconds=wanted.deadline_seconds,
            **options,
        )
        for i in range(wanted.n)
    ]


def random_seed() -> int:
    """A seed that nobody can guess."""
    return secrets.randbits(SEED_BITS)


def _check_limits(wanted: Wanted, settings: ServeConfig) -> None:
    bounds = {
        "n": settings.max_images,
        "num_steps": settings.max_steps,
        "partial_images": settings.max_previews,
    }
    for name, most in bounds.items():
        value = getattr(wanted, name)
        if value is not None and value > most:
            raise BadOrder(name, f"{name}={value} must be at most {most}")
    texts = {"prompt": wanted.prompt, "negative_prompt": wanted.negative_prompt}
    texts |= {f"layer_prompts[{key}]": text for key, text in wanted.layer_prompts.items()}
    most = settings.max_prompt_characters
    for name, text in texts.items():
        if len(text) > most:
            raise BadOrder(name, f"{name} has {len(text)} characters; at most {most} are read")


def _resolution(size: str, facts: ModelFacts) -> int:
    if size == "auto":
        return facts.resolutions[-1]
    for resolution in facts.resolutions:
        if size == size_text(resolution):
            return resolution
    sizes = ", ".join(map(size_text, facts.resolutions))
    raise BadOrder("size", f"size={size[:20]!r} must be auto or one of {sizes}")


def size_text(resolution: int) -> str:
    """``512x512``."""
    return f"{resolution}x{resolution}"


def _decoded(content: bytes) -> Image.Image:
    try:
        return decode(content, MAX_PIXELS)
    except UnidentifiedImageError as error:
        raise BadOrder("image", "image is not a png, jpeg or webp file") from error
    except Exception as error:  # Pillow raises whatever a damaged file makes it stumble over
        raise BadOrder("image", f"image cannot be read: {error}") from error


def _cropped(content: bytes, resolution: int) -> Pixels:
    """A picture of any shape as a square of the order's size."""
    return np.asarray(crop_square(_decoded(content), resolution))


def _lower(content: bytes, resolution: int, facts: ModelFacts) -> Pixels:
    """A picture of one of the lower resolutions, as it is."""
    if not facts.can_finish:
        raise BadOrder("image", f"model {facts.name!r} cannot finish a lower picture")
    picture = _decoded(content)
    sides = [side for side in facts.resolutions if side < resolution]
    width, height = picture.size
    if width != height or width not in sides:
        expected = ", ".join(map(size_text, sides)) or "none: this is the lowest size"
        raise BadOrder(
            "image", f"image of {width}x{height} pixels must be of a size below `size`: {expected}"
        )
    return np.asarray(picture)


def picture_file(
    event: Preview | Picture, wanted: Wanted, order: Order, facts: ModelFacts
) -> bytes:
    """A picture in the format that was asked for; a png tells what it was drawn from."""
    picture = Image.fromarray(event.pixels)
    if wanted.output_format == "png":
        about = _about(order, facts)
        if isinstance(event, Preview):
            about |= {"preview_after_steps": str(event.step)}
        else:
            about |= {"model_sha256": event.model}  # another than that of `facts`, if just replaced
        return png_bytes(picture, about)
    buffer = io.BytesIO()
    picture.save(buffer, wanted.output_format, quality=wanted.output_compression)
    return buffer.getvalue()


def _about(order: Order, facts: ModelFacts) -> dict[str, str]:
    """What a picture was drawn from; the names that `layered sample` writes."""
    guidance = order.guidance
    told = {
        "prompt": order.prompt,
        "negative_prompt": order.negative_prompt,
        "seed": str(order.seed),
        "size": size_text(order.resolution),
        "sampler": facts.sampler,
        "num_steps": str(order.num_steps),
        "guidance": json.dumps(guidance),
        "model_sha256": facts.weights_sha256,
    }
    if order.layer_prompts:
        told["layer_prompts"] = json.dumps(dict(order.layer_prompts), ensure_ascii=False)
    for name, start in (("image", order.image), ("finish", order.finish)):
        if start is not None:
            told[f"{name}_sha256"] = hashlib.sha256(start.tobytes()).hexdigest()
            told["strength"] = str(order.strength)
    return told


def facts_answer(facts: ModelFacts, settings: ServeConfig) -> dict[str, Any]:
    """A model as OpenAI's API describes it, and what else a client may want to know."""
    told = asdict(facts)
    return {
        "id": told.pop("name"),
        "object": "model",
        "created": told.pop("created"),
        "owned_by": "layered-diffusion",
        **told,
        "limits": {
            name: getattr(settings, name)
            for name in (
                "max_images",
                "max_steps",
                "max_previews",
                "max_prompt_characters",
                "max_body_bytes",
            )
        },
    }


def common_answer(wanted: Wanted, order: Order) -> dict[str, Any]:
    """What every answer says."""
    return {
        "size": size_text(order.resolution),
        "output_format": wanted.output_format,
        "background": "opaque",
        "quality": "auto",
    }


def event_answer(
    wanted: Wanted, order: Order, index: int, event: Preview | Picture, file: bytes
) -> dict[str, Any]:
    """An event of a stream; `index` is the picture's among those of the request."""
    kind = "image_edit" if isinstance(wanted, EditWanted) else "image_generation"
    told: dict[str, Any] = {
        "created_at": int(time.time()),
        **common_answer(wanted, order),
        "image_index": index,
        "seed": order.seed,
        "resolution": len(event.pixels),
        "b64_json": base64.b64encode(file).decode(),
    }
    if isinstance(event, Preview):
        return {
            "type": f"{kind}.partial_image",
            "partial_image_index": event.index,
            "step": event.step,
            "num_steps": event.num_steps,
            **told,
        }
    return {
        "type": f"{kind}.completed",
        "num_steps": order.num_steps,
        "seconds": round(event.seconds, 3),
        "weights_sha256": event.model,
        **told,
    }

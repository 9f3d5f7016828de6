"""What the interface's own description (OpenAPI) says of its answers. Called by `api`."""

from typing import Any

from pipelines.serving.wire import ErrorAnswer, ImagesAnswer

DESCRIPTION = (
    "Draws pictures of a prompt with a layered diffusion model. The first routes are those of OpenAI's images API, whose "
    "clients work unchanged: set their base URL to this server's with /v1."
)
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "model": ErrorAnswer}
    for status, text in {
        400: "Something in the request is wrong: `error.param` names it.",
        401: "An API key is needed.",
        404: "There is no such thing.",
        408: "The body was too slow.",
        413: "The body is too large.",
        429: "Too much is asked for: come again after `Retry-After` seconds.",
        503: "Nobody can draw now: come again after `Retry-After` seconds.",
        504: "The picture was not done before its deadline.",
    }.items()
}
OTHERS: dict[int | str, dict[str, Any]] = {
    "default": {"description": "Something went wrong.", "model": ErrorAnswer}
}
"""FastAPI adds an error of its own to routes that describe no other, in another form."""
EVENT = {
    "type": "object",
    "description": "An event of the stream.",
    "required": ["event", "data"],
    "properties": {
        "event": {"type": "string", "examples": ["image_generation.partial_image"]},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
}
PICTURES = {
    200: {
        "description": "Pictures; events with `stream`: previews (`...partial_image`), pictures (`...completed`), or an "
        "`error`, which is the last.",
        "model": ImagesAnswer,
        "content": {"text/event-stream": {"schema": EVENT}},
    },
    **REFUSALS,
    **OTHERS,
}

"""What the network is asked, a row a picture; rows of many pictures share passes, and none notices.

A network's row depends on its own inputs alone, but the last digits of a float32 sum also depend on how a library orders it, and
that it decides by the shape of the batch: one convolution of one picture goes another way than two, and a matrix product of few
rows another than one of many. So on the CPU the rows go through in passes of 2, 4, 6 or 8, an odd last one twice, and layers that
see one vector a row (`blocks.RowLinear`) are given 16 rows at least. Within these sizes oneDNN and MKL were seen to compute a row
alike to the last bit on processors of Intel and AMD (``tests/layered_model/test_rows.py``): a picture is then the same whatever
shares its passes. On a GPU kernels vary with the batch as they like, and pictures agree to about one level of 255.

Rows share passes however far up they go: a layer reads the layers below and none above, so the trunk computes all rows, and each
layer above it those that go on. A picture of 128 pixels fills up a pass of pictures of 512.

Called by `denoiser`, which asks and takes the answer, and by a server's engine, for many pictures at once.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from layered_model.unet import Network

LayerRows = list[Float[Tensor, "rows _c _h _w"]]
"""Of each layer, low to high."""
CPU_ROWS = 8
"""Of a pass on the CPU, at most. More would not be faster by much either."""


class Prompt(NamedTuple):
    """Token embeddings of a batch and which of them are real; no real token is the unconditional prompt."""

    text: Float[Tensor, "b n d"]
    mask: Bool[Tensor, "b n"]

    def take(self, rows: Tensor | slice) -> "Prompt":
        """Some of the rows."""
        return Prompt(self.text[rows], self.mask[rows])


class Rows(NamedTuple):
    """Inputs of `layered_model.unet.LayeredUNet`; a layer has those of the first rows, of as many as go so far up."""

    x: LayerRows
    logsnr: Float[Tensor, " rows"]
    prompt: Prompt
    layer_prompts: tuple[Prompt | None, ...] | None = None

    def part(self, first: int, last: int) -> "Rows":
        """Rows from the first to before the last."""
        rows = slice(first, last)
        own = self.layer_prompts
        x = [x[rows] for x in self.x if len(x) > first]
        return Rows(
            x,
            self.logsnr[rows],
            self.prompt.take(rows),
            own and tuple(prompt and prompt.take(rows) for prompt in own[: len(x)]),
        )


def join(parts: Sequence[Rows]) -> Rows:
    """Rows one after the other; those of the most layers must come first.

    Where some have prompts of their own for a layer, the others repeat theirs.
    """
    if len(parts) == 1:
        return parts[0]
    layers = [[part for part in parts if len(part.x) > layer] for layer in range(len(parts[0].x))]
    layer_prompts = None
    if any(part.layer_prompts for part in parts):
        layer_prompts = tuple(_join_own(layer, those) for layer, those in enumerate(layers))
    return Rows(
        [torch.cat([part.x[layer] for part in those]) for layer, those in enumerate(layers)],
        torch.cat([part.logsnr for part in parts]),
        join_prompts([part.prompt for part in parts]),
        layer_prompts,
    )


def _join_own(layer: int, parts: Sequence[Rows]) -> Prompt | None:
    """A layer's own prompts, if any has one."""
    own = [part.layer_prompts[layer] if part.layer_prompts else None for part in parts]
    if not any(own):
        return None
    return join_prompts([prompt or part.prompt for prompt, part in zip(own, parts, strict=True)])


def join_prompts(prompts: Sequence[Prompt]) -> Prompt:
    """Prompts one after the other."""
    return Prompt(*(torch.cat(parts) for parts in zip(*prompts, strict=True)))


def predict(network: Network, rows: Rows) -> LayerRows:
    """The network's float32 outputs, low to high, a row each, in its own precision and in passes as the module says."""
    return predict_together(network, [rows])[0]


@torch.inference_mode()
def predict_together(network: Network, parts: Sequence[Rows]) -> list[LayerRows]:
    """The same for each of several, from passes that all share."""
    on_cpu = parts[0].logsnr.device.type == "cpu"
    placed: list[tuple[LayerRows, Rows]] = []
    "Where its outputs go, and each part, in the order of the passes."
    found: list[LayerRows] = [[] for _ in parts]
    for depth in sorted({len(part.x) for part in parts}, reverse=True):
        these = [pair for pair in zip(found, parts, strict=True) if len(pair[1].x) == depth]
        count, last = sum(len(part.logsnr) for _, part in these), these[-1][1]
        if on_cpu and count % 2:
            these.append(([], last.part(len(last.logsnr) - 1, len(last.logsnr))))
        placed += these
    rows = join([part for _, part in placed])
    for layer, output in enumerate(_run_all(network, rows, CPU_ROWS if on_cpu else None)):
        those = [pair for pair in placed if len(pair[1].x) > layer]
        counts = [len(part.logsnr) for _, part in those]
        for (own, _), answer in zip(those, torch.split(output, counts), strict=True):
            own.append(answer)
    return found


def _run_all(network: Network, rows: Rows, most: int | None) -> LayerRows:
    """In passes of so many rows at most."""
    count = len(rows.logsnr)
    most = most or count
    passes = [
        _run(network, rows.part(first, min(first + most, count))) for first in range(0, count, most)
    ]
    if len(passes) == 1:
        return passes[0]
    return [
        torch.cat([found[layer] for found in passes if len(found) > layer])
        for layer in range(len(rows.x))
    ]


def _run(network: Network, rows: Rows) -> LayerRows:
    options: dict[str, Any] = {}
    if rows.layer_prompts is not None:
        options["layer_text"] = list(rows.layer_prompts)
    dtype = next(network.parameters()).dtype
    with torch.autocast(rows.logsnr.device.type, dtype, enabled=dtype != torch.float32):
        outputs = network(
            [x.to(dtype) for x in rows.x],
            rows.logsnr,
            rows.prompt.text.to(dtype),
            rows.prompt.mask,
            **options,
        )
    return [output.float() for output in outputs]

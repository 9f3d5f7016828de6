"""What the network is asked, a row a picture; rows of many pictures share passes, and none notices.

A network's row depends on its own inputs alone, but the last digits of a float32 sum also depend on how a library orders it, and
that it decides by the shape of the batch: one convolution of one picture goes another way than two, and a matrix product of few
rows another than one of many. So on the CPU the rows go through in passes of 2, 4, 6 or 8, an odd last one twice, and layers that
see one vector a row (`blocks.RowLinear`) are given 16 rows at least. Within these sizes oneDNN and MKL were seen to compute a row
alike to the last bit on processors of Intel and AMD (``tests/layered_model/test_rows.py``): a picture is then the same whatever
shares its passes. On a GPU kernels vary with the batch as they like, and pictures agree to about one level of 255.

Called by `denoiser`, which asks and takes the answer, and by a server's engine, which joins what many pictures ask.
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
    """Inputs of the network; see `layered_model.unet.LayeredUNet`."""

    x: LayerRows
    logsnr: Float[Tensor, " rows"]
    prompt: Prompt
    layer_prompts: tuple[Prompt | None, ...] | None = None

    def part(self, first: int, last: int) -> "Rows":
        """Rows from the first to before the last."""
        rows = slice(first, last)
        own = self.layer_prompts
        return Rows(
            [x[rows] for x in self.x],
            self.logsnr[rows],
            self.prompt.take(rows),
            own and tuple(prompt and prompt.take(rows) for prompt in own),
        )


def join(parts: Sequence[Rows]) -> Rows:
    """Rows of the same layers one after the other. Where some have prompts of their own for a layer, the others repeat theirs."""
    if len(parts) == 1:
        return parts[0]
    layer_prompts = None
    if any(part.layer_prompts for part in parts):
        own = [part.layer_prompts or (None,) * len(part.x) for part in parts]
        layer_prompts = tuple(
            join_prompts(
                [prompt or part.prompt for prompt, part in zip(prompts, parts, strict=True)]
            )
            if any(prompts)
            else None
            for prompts in zip(*own, strict=True)
        )
    return Rows(
        [torch.cat(layer) for layer in zip(*(part.x for part in parts), strict=True)],
        torch.cat([part.logsnr for part in parts]),
        join_prompts([part.prompt for part in parts]),
        layer_prompts,
    )


def join_prompts(prompts: Sequence[Prompt]) -> Prompt:
    """Prompts one after the other."""
    return Prompt(*(torch.cat(parts) for parts in zip(*prompts, strict=True)))


@torch.inference_mode()
def predict(network: Network, rows: Rows) -> LayerRows:
    """The network's float32 outputs, low to high, a row each, in its own precision and in passes as the module says."""
    count = len(rows.logsnr)
    most = CPU_ROWS if rows.logsnr.device.type == "cpu" else count
    passes = [
        _run(network, rows.part(first, min(first + most, count))) for first in range(0, count, most)
    ]
    return [torch.cat(layer) for layer in zip(*passes, strict=True)] if passes[1:] else passes[0]


def _run(network: Network, rows: Rows) -> LayerRows:
    count = len(rows.logsnr)
    odd = count % 2 and rows.logsnr.device.type == "cpu"
    if odd:
        rows = join([rows, rows.part(count - 1, count)])
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
    return [output[:count].float() for output in outputs]

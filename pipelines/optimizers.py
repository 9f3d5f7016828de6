"""Optimizers of a network: AdamW, or Muon for its hidden weights with AdamW for the rest.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the averaged gradient of a weight matrix by the
nearest matrix of equal singular values, so that rare directions learn as fast as common ones:

    m <- mu m + (1 - mu) g        u = (1 - mu) g + mu m  (Nesterov)
    w <- (1 - lr decay) w - lr 0.2 sqrt(max(rows, columns)) orthogonal(u)

The factor gives the update the root mean square of AdamW's, so that learning rate and weight decay are AdamW's (Liu et al.
2025, https://arxiv.org/abs/2502.16982, eq. 4). A convolution is the matrix of its output channels against everything else.
`torch.optim.Muon` is the same rule for matrices alone; it refuses convolutions, which hold most of a U-Net's weights.

Called by `trainer`.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from pipelines.config import TrainConfig

BETAS = (0.9, 0.99)
"""Of AdamW; a short second moment follows the loss of noise levels that differ by orders of magnitude."""
MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic that takes singular values in (0, 1] to about [0.7, 1.2] in five steps (Jordan et al.)."""


def make_optimizers(network: nn.Module, train: TrainConfig) -> list[Optimizer]:
    """The optimizers that together hold every parameter of the network once."""

    def adamw(parameters: Iterable[nn.Parameter]) -> Optimizer:
        return AdamW(
            parameters,
            lr=train.learning_rate,
            betas=BETAS,
            weight_decay=train.weight_decay,
            fused=True,
        )

    if train.optimizer == "adamw":
        return [adamw(network.parameters())]
    hidden = hidden_weights(network)
    chosen = {id(weight) for weight in hidden}
    return [
        Muon(hidden, learning_rate=train.learning_rate, weight_decay=train.weight_decay),
        adamw(p for p in network.parameters() if id(p) not in chosen),
    ]


def hidden_weights(network: nn.Module) -> list[nn.Parameter]:
    """Weights of linear maps and convolutions, without the convolutions from and to few channels: pictures' own."""
    return [
        module.get_parameter("weight")
        for module in network.modules()
        if (isinstance(module, nn.Conv2d) and min(module.weight.shape[:2]) > 4)
        or isinstance(module, nn.Linear)
    ]


class Muon(Optimizer):
    """See the module's formula."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, learning_rate: float, weight_decay: float
    ) -> None:
        super().__init__(parameters, {"lr": learning_rate, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].lerp_(weight.grad, 1 - MOMENTUM)
                update = orthogonal(weight.grad.lerp(momentum, MOMENTUM).flatten(1))
                scale = 0.2 * max(update.shape) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update.view(weight.shape), alpha=-group["lr"] * scale)


def orthogonal(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """About the matrix with the same singular vectors and all singular values 1, by five Newton-Schulz steps.

    In bfloat16 on a GPU, where that is enough and several times faster.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x: Tensor = wide.to(torch.bfloat16) if matrix.is_cuda else wide
    x = x / (x.norm() + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide is matrix else x.T).to(matrix.dtype)

"""Optimizers of a network: AdamW, or Muon for its convolutions with AdamW for the rest.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the averaged gradient of a weight matrix by the
nearest matrix of equal singular values, so that rare directions learn as fast as common ones:

    m <- mu m + (1 - mu) g        u = (1 - mu) g + mu m  (Nesterov)
    w <- (1 - lr decay) w - lr 0.2 sqrt(max(rows, columns)) orthogonal(u)

The factor gives the update the root mean square of AdamW's, so that learning rate and weight decay are AdamW's (Liu et al.
2025, https://arxiv.org/abs/2502.16982, eq. 4). A convolution is the matrix of its output channels against everything else.
`torch.optim.Muon` is the same rule for matrices alone; it refuses convolutions, which hold most of a U-Net's weights. The
linear maps are left to AdamW: they would cost as much again and add little.

Called by `trainer`.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from pipelines.sections import TrainConfig

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
    chosen = kernels(network)
    taken = {id(weight) for weight in chosen}
    return [
        Muon(chosen, learning_rate=train.learning_rate, weight_decay=train.weight_decay),
        adamw(p for p in network.parameters() if id(p) not in taken),
    ]


def kernels(network: nn.Module) -> list[nn.Parameter]:
    """Weights of the convolutions between features: all but those from and to pictures."""
    return [
        module.get_parameter("weight")
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and {"input", "heads"}.isdisjoint(name.split("."))
    ]


class Muon(Optimizer):
    """See the module's formula. In a process group each process orthogonalizes its part of the weights."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, learning_rate: float, weight_decay: float
    ) -> None:
        super().__init__(parameters, {"lr": learning_rate, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            # Input channels last: the order of columns means nothing to a matrix, and the layout is the usual one.
            rows = [weight.movedim(1, -1) for weight in weights]
            updates = orthogonal_all(
                [self._averaged(weight).movedim(1, -1).flatten(1) for weight in weights]
            )
            for row, update in zip(rows, updates, strict=True):
                scale = 0.2 * max(update.shape) ** 0.5
                row.mul_(1 - group["lr"] * group["weight_decay"])
                row.add_(update.view(row.shape), alpha=-group["lr"] * scale)

    def _averaged(self, weight: nn.Parameter) -> Tensor:
        """Nesterov's momentum."""
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        return weight.grad.lerp(state["momentum"].lerp_(weight.grad, 1 - MOMENTUM), MOMENTUM)


def orthogonal_all(matrices: Sequence[Tensor]) -> list[Tensor]:
    """`orthogonal` of each, the work shared out among the processes of the default group if there is one."""
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    if world == 1:
        return [orthogonal(matrix) for matrix in matrices]
    flat = matrices[0].new_zeros(sum(matrix.numel() for matrix in matrices))
    parts = torch.split(flat, [matrix.numel() for matrix in matrices])
    results = [part.view(matrix.shape) for part, matrix in zip(parts, matrices, strict=True)]
    by_size = sorted(range(len(matrices)), key=lambda i: matrices[i].numel())
    for i in by_size[rank::world]:
        results[i].copy_(orthogonal(matrices[i]))
    dist.all_reduce(flat)
    return results


def orthogonal(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """About the matrix with the same singular vectors and all singular values 1, by five Newton-Schulz steps.

    A step is ``x <- q x`` with ``q = a + b g + c g^2`` and ``g = x x^T``. Both commute, so the steps are taken on the small
    ``g <- q g q`` and only their product meets the matrix: for a 3x3 convolution's kernel less than half the work.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonal(matrix.T).T
    x = matrix / (matrix.norm() + 1e-7)
    gram: Tensor = x @ x.T
    step = product = _quintic(gram)
    for _ in range(4):
        gram = step @ gram @ step
        step = _quintic(gram)
        product = step @ product
    result: Tensor = product @ x
    return result


def _quintic(gram: Tensor) -> Tensor:
    a, b, c = NEWTON_SCHULZ
    q = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    q.diagonal().add_(a)
    return q

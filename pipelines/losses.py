"""The training loss between two lines of the log: of each layer, and of each layer by noise level.

The mean over all noise levels hides what is learnt when: a network that composes better and one that draws finer detail may
cost the same. Pictures are sorted by the reference's logsnr into fixed bins of width 2, named by their middles; the first and
the last hold everything beyond. Sums stay on the device until they are taken, and are added up over the workers then. Called
by `trainer`.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

MIDDLES = (-7, -5, -3, -1, 1, 3, 5, 7)


class LossByNoise:
    """Sums of unweighted squared errors and numbers of pictures."""

    def __init__(self, resolutions: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.resolutions = tuple(resolutions)
        self._edges = torch.tensor([m + 1.0 for m in MIDDLES[:-1]], device=device)
        self._sums = torch.zeros(2, len(self.resolutions), len(MIDDLES), device=device)

    def add(self, logsnr: Float[Tensor, " b"], per_picture: Float[Tensor, "layers b"]) -> None:
        """Takes in one batch.

        Args:
            logsnr: the reference's, of each picture.
            per_picture: see `layered_model.diffusion.LossTerms`.
        """
        place = torch.bucketize(logsnr, self._edges)
        both = torch.stack([per_picture, torch.ones_like(per_picture)]).to(self._sums.dtype)
        self._sums.index_add_(2, place, both)

    def take(self) -> dict[str, float]:
        """Means over the batches and workers so far, and starts anew; every worker calls it.

        Returns:
            ``loss/32`` for each layer, and ``loss/32/logsnr_-5`` for each of its bins, where there was a picture.
        """
        if dist.is_initialized():
            dist.all_reduce(self._sums)
        errors, counts = self._sums.tolist()
        self._sums.zero_()
        means: dict[str, float] = {}
        for resolution, error, count in zip(self.resolutions, errors, counts, strict=True):
            if not sum(count):
                continue
            means[f"loss/{resolution}"] = sum(error) / sum(count)
            means |= {
                f"loss/{resolution}/logsnr_{middle}": e / n
                for middle, e, n in zip(MIDDLES, error, count, strict=True)
                if n
            }
        return means

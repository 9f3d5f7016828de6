"""A small score of a network under training: how far what it draws is from the validation split, at every resolution.

Captions, noise, sampler and extractor are those with which `layered evaluate` scores that split. The reference are the pictures
whose captions are drawn: as many as are drawn, and the same each time. A Frechet distance of few pictures is far too large
(docs/evaluation.md), each time by about as much; what it shows is the way down.

Pictures are drawn and looked at in blocks of ``evaluate.batch_size``, shared out among the workers. What decides a block is its
number, so the score does not depend on how many workers there are. Called by `trainer`, on every worker, and by `train`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from layered_model import LayeredPipeline
from layered_model.extractor import FeatureExtractor, Features
from layered_model.unet import Network
from pipelines import drawing, extractors
from pipelines.config import Config, UserError
from pipelines.dataset import PreparedDataset
from pipelines.drawing import Caption, Pyramid
from pipelines.metrics import (
    ClassStatistics,
    FeatureStatistics,
    frechet_distance,
    inception_score,
)
from pipelines.recipe import model_config
from pipelines.validation import SPLIT
from pipelines.workers import share_out, share_weights


def check(config: Config, dataset: PreparedDataset) -> None:
    """Refuses a score that could not be computed.

    Raises:
        UserError: the validation split has too few pictures, or the extractor has no weights.
    """
    if not config.train.score_every_images:
        return
    asked = f"train.score_every_images={config.train.score_every_images}"
    if (count := dataset.num_images(SPLIT)) < 2:
        raise UserError(
            f"{asked} needs a validation split of 2 pictures or more, and that of "
            f"dataset={config.dataset!r} has {count}; 0 trains without a score"
        )
    try:
        extractors.load(config.evaluate)
    except UserError as error:
        raise UserError(f"{asked}: {error}") from error


class RunningScore:
    """Scores networks, all on the same captions and noise.

    Args:
        config: of the run.
        dataset: whose validation split is drawn and compared with.
        device: where this worker computes.
    """

    def __init__(self, config: Config, dataset: PreparedDataset, device: torch.device) -> None:
        self.config, self.dataset, self.device = config, dataset, device
        self.extractor: FeatureExtractor = extractors.load(config.evaluate, device)
        captions = drawing.choose_captions(
            dataset, SPLIT, config.train.num_score_images, config.seed
        )
        size = config.evaluate.batch_size
        self.blocks = [captions[start : start + size] for start in range(0, len(captions), size)]
        self.has_reference = False
        self.reference: dict[int, FeatureStatistics] = {}
        "By resolution; on rank 0."

    def measure(self, network: Network, num_images: int) -> dict[str, float]:
        """Scores rank 0's network; all workers call it together.

        Args:
            network: rank 0's is scored; the others' get its weights.
            num_images: that it has seen.

        Returns:
            On rank 0 ``score/fd_lite0/32`` and ``score/is_lite0/32``, or what the extractor calls them, for each resolution; on
            the others nothing.

        Raises:
            OSError: pictures or captions could not be read, by whichever worker; on rank 0.
        """
        network = network.to(self.device)
        share_weights(network)
        model = model_config(self.config, self.dataset, num_images)
        pipeline = LayeredPipeline(model, network, device=self.device)
        makers: list[Callable[[LayeredPipeline, Sequence[Caption]], Pyramid]] = [self._draw]
        if not self.has_reference:
            makers.append(self._real)
        tasks = [
            functools.partial(self._features, make, pipeline, block)
            for make in makers
            for block in self.blocks
        ]
        found = share_out(tasks)
        drawn, real = found[: len(self.blocks)], found[len(self.blocks) :]
        self.has_reference = True
        for resolution in pipeline.resolutions if real else ():
            features, _ = _joined(real, resolution)
            self.reference[resolution] = FeatureStatistics.from_features(features)
        return self._scores(drawn) if drawn else {}

    def _draw(self, pipeline: LayeredPipeline, captions: Sequence[Caption]) -> Pyramid:
        size = self.config.evaluate.batch_size
        return drawing.draw(pipeline, self.dataset, SPLIT, captions, self.config.sample, size)

    def _real(self, pipeline: LayeredPipeline, captions: Sequence[Caption]) -> Pyramid:
        rows = [caption.row for caption in captions]
        return drawing.real_pictures(pipeline.diffusion, self.dataset, SPLIT, rows)

    def _features(
        self,
        make: Callable[[LayeredPipeline, Sequence[Caption]], Pyramid],
        pipeline: LayeredPipeline,
        captions: Sequence[Caption],
    ) -> dict[int, Features]:
        """Of one block's pictures, at each resolution, on the CPU."""
        found = {}
        for resolution, pictures in make(pipeline, captions).items():
            features, logits = self.extractor(torch.from_numpy(pictures))
            found[resolution] = Features(features.cpu(), None if logits is None else logits.cpu())
        return found

    def _scores(self, drawn: Sequence[Mapping[int, Features]]) -> dict[str, float]:
        name, scores = self.extractor.score_name, {}
        for resolution, reference in self.reference.items():
            features, logits = _joined(drawn, resolution)
            distance = frechet_distance(FeatureStatistics.from_features(features), reference)
            scores[f"score/{name('fd')}/{resolution}"] = distance
            if logits is not None:
                score, _ = inception_score([ClassStatistics.from_logits(logits)])
                scores[f"score/{name('is')}/{resolution}"] = score
        return scores


def _joined(
    blocks: Sequence[Mapping[int, Features]], resolution: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Features and logits of all blocks, in their order."""
    features, logits = zip(*(block[resolution] for block in blocks), strict=True)
    return (
        torch.cat(features).numpy(),
        None if logits[0] is None else torch.cat(logits).numpy(),
    )

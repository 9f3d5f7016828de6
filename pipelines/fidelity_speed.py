"""A round of torch-fidelity's Inception for each line of input; `bench_fid` runs it in an interpreter that has torch-fidelity.

    python -I fidelity_speed.py WEIGHTS NUM_IMAGES BATCH_SIZE THREADS SIDE

Imports nothing of the project, whose environment may not have torchvision. Writes ``ready`` and, after each round, ``done``.
"""

import sys

import torch


def main() -> None:
    """Load, then answer."""
    weights = sys.argv[1]
    num_images, batch_size, threads, side = map(int, sys.argv[2:])
    torch.set_num_threads(threads)
    # torchvision's extension is built for another torch; only the operators that its import asks for are missing here.
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    layers = ["2048", "logits_unbiased"]
    extractor = FeatureExtractorInceptionV3("inception-v3-compat", layers, weights)
    generator = torch.Generator().manual_seed(0)
    shape = (num_images, side, side, 3)
    pictures = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    _say("ready")
    for _ in sys.stdin:
        with torch.no_grad():
            for batch in torch.split(pictures.permute(0, 3, 1, 2).contiguous(), batch_size):
                extractor(batch)
        _say("done")


def _say(word: str) -> None:
    sys.stdout.write(word + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

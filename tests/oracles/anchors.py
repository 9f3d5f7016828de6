"""What torch-fidelity, pytorch-fid and clean-fid say of two folders of PNG files with the same weights; for their environment.

    python anchors.py WEIGHTS GENERATED REFERENCE OUTPUT.npz

Imports nothing of the project. The file written holds features, logits and scores, each under the tool's name. Scores are what
the tools print, with torch-fidelity's own settings (KID: at most 1,000 pictures a subset). Its KID comes from kernels in float32,
where the sums of many numbers near 1 cancel; ``kid_float64`` is the same code with the same features in float64.
"""

import os
import pathlib
import shutil
import sys
import tempfile

import numpy as np
import torch

# torchvision's extension is built for another torch; only the operators that its import asks for are missing here.
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

NETWORK, LAYERS = "inception-v3-compat", ["2048", "logits_unbiased"]
LARGEST_SUBSET = 1000
PYTORCH_FEATURES = 16
"""Pictures of which pytorch-fid's features are asked."""


def fidelity(weights: str, generated: str, reference: str, cache: str) -> dict[str, object]:
    """torch-fidelity's features and scores."""
    from torch_fidelity import calculate_metrics
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.utils import (
        create_feature_extractor,
        extract_featuresdict_from_input_id_cached,
    )

    counts = [len(os.listdir(folder)) for folder in (generated, reference)]
    options = {
        "input1": generated,
        "input2": reference,
        "input1_cache_name": "generated",
        "input2_cache_name": "reference",
        "cache_root": cache,
        "feature_extractor": NETWORK,
        "feature_extractor_weights_path": weights,
        "feature_layer_prc": LAYERS[0],
        "batch_size": 8,
        "cuda": False,
        "verbose": False,
        "save_cpu_ram": True,
        "kid_subset_size": min(LARGEST_SUBSET, *counts),
    }
    scores = calculate_metrics(fid=True, isc=True, kid=True, prc=True, **options)
    extractor = create_feature_extractor(NETWORK, LAYERS, **options)
    found = [
        extract_featuresdict_from_input_id_cached(number, extractor, **options) for number in (1, 2)
    ]
    exact = kid_features_to_metric(*(of[LAYERS[0]].double() for of in found), **options)
    return {
        "features": found[0][LAYERS[0]].numpy(),
        "logits": found[0][LAYERS[1]].numpy(),
        "fid": scores["frechet_inception_distance"],
        "is": scores["inception_score_mean"],
        "is_deviation": scores["inception_score_std"],
        "kid": scores["kernel_inception_distance_mean"],
        "kid_float64": exact["kernel_inception_distance_mean"],
        "kid_float64_deviation": exact["kernel_inception_distance_std"],
        "precision": scores["precision"],
        "recall": scores["recall"],
    }


def pytorch_fid(weights: str, generated: str, reference: str, cache: str) -> dict[str, object]:
    """pytorch-fid's distance, and features of the first pictures."""
    from pytorch_fid.fid_score import calculate_fid_given_paths, get_activations
    from pytorch_fid.inception import FID_WEIGHTS_URL, InceptionV3

    published = pathlib.Path(cache, "checkpoints", FID_WEIGHTS_URL.rpartition("/")[2])
    published.parent.mkdir()
    shutil.copy(weights, published)
    torch.hub.set_dir(cache)
    fid = calculate_fid_given_paths([generated, reference], 8, "cpu", 2048, num_workers=0)
    network = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[2048]])
    files = sorted(pathlib.Path(generated).iterdir())[:PYTORCH_FEATURES]
    return {"features": get_activations(files, network, 8, 2048, "cpu", num_workers=0), "fid": fid}


def clean_fid(generated: str) -> dict[str, object]:
    """The first picture as clean-fid resizes it."""
    from cleanfid.resize import build_resizer
    from PIL import Image

    with Image.open(min(pathlib.Path(generated).iterdir())) as picture:
        return {"resized": build_resizer("clean")(np.asarray(picture.convert("RGB")))}


def main() -> None:
    """Ask all and write."""
    weights, generated, reference, output = sys.argv[1:]
    with tempfile.TemporaryDirectory() as cache:
        answers = {
            "fidelity": fidelity(weights, generated, reference, cache),
            "pytorch": pytorch_fid(weights, generated, reference, cache),
            "clean": clean_fid(generated),
        }
    named = {
        f"{tool}/{key}": value for tool, said in answers.items() for key, value in said.items()
    }
    np.savez(output, **named)


if __name__ == "__main__":
    main()

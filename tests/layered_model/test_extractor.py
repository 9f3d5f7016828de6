"""What holds for every extractor: arithmetic, batches, and the names of its numbers."""

import pytest
import torch

from layered_model.extractor import FeatureExtractor


@pytest.fixture
def make():
    """Makes an extractor whose features are the means of the channels."""

    def of(network=lambda x: (x.mean((2, 3)), None), **changes) -> FeatureExtractor:
        plain = {"name": "mean", "prefix": "mean", "dim": 3, "num_classes": None}
        made = {"preprocess": "none", "weights_sha256": "abc", "network": network}
        return FeatureExtractor(
            **{**plain, **made, "prepare": lambda x: x.permute(0, 3, 1, 2).float(), **changes}
        )

    return of


def _settings() -> tuple[object, ...]:
    cudnn = torch.backends.cudnn
    of_cudnn = cudnn.enabled, cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32
    return *of_cudnn, torch.get_float32_matmul_precision()


@pytest.fixture
def fast_arithmetic():
    """The settings of one who trains."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield _settings()
    torch.set_float32_matmul_precision(before)


def test_features_are_computed_in_float32_whatever_the_caller_allows(make, fast_arithmetic) -> None:
    """With cuDNN, reproducibly and without TF32; afterwards the caller's settings are back."""
    seen = []
    make(lambda x: (seen.append(_settings()), (x.mean((2, 3)), None))[1])(
        torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    )
    assert seen == [(True, True, False, False, "highest")]
    assert _settings() == fast_arithmetic

    def fail(x):
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        make(fail)(torch.zeros(2, 4, 4, 3, dtype=torch.uint8))
    assert _settings() == fast_arithmetic


def test_chunks_are_put_together_in_order(make) -> None:
    images = torch.arange(5 * 2 * 2 * 3).reshape(5, 2, 2, 3).to(torch.uint8)
    sizes = []
    found = make(lambda x: (sizes.append(len(x)), (x.mean((2, 3)),) * 2)[1], chunk=2)(images)
    assert sizes == [2, 2, 1]
    torch.testing.assert_close(found.features, images.float().mean((1, 2)))
    torch.testing.assert_close(found.logits, found.features)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"prefix": "", "is_fid": True}, ["fid", "kid", "is", "recall"]),
        (
            {"prefix": "clean", "is_fid": True},
            ["fid_clean", "kid_clean", "is_clean", "recall_clean"],
        ),
        ({"prefix": "lite0"}, ["fd_lite0", "kd_lite0", "is_lite0", "recall_lite0"]),
    ],
)
def test_only_fids_own_network_gives_what_is_called_fid_and_kid(make, changes, names) -> None:
    assert [make(**changes).score_name(m) for m in ("fd", "kd", "is", "recall")] == names

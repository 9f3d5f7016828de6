"""Facts about the FID Inception network: its size, its three resizes, and which files it takes. Its answers: tests/oracles."""

import hashlib
import http.server
import io
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from layered_model import inception
from layered_model.features import FeatureExtractor, load_extractor
from layered_model.inception import Inception, clean_input, pytorch_input, tensorflow_input


@pytest.fixture(scope="module")
def digest(seeded_inception: Path) -> str:
    """SHA-256 of the seeded file."""
    return hashlib.sha256(seeded_inception.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def extractor(seeded_inception: Path, digest: str) -> FeatureExtractor:
    return load_extractor("inception", weights=seeded_inception, sha256=digest)


def _pictures(n: int, high: int, wide: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(256, (n, high, wide, 3), dtype=torch.uint8, generator=generator)


def test_network_has_the_published_size() -> None:
    """472 tensors beside counters, 23.9 million weights, and 5.7 billion multiply-adds a picture."""
    with torch.device("meta"):
        network = Inception()
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            network.eval()(torch.zeros(1, 3, 299, 299))
    names = [key for key in network.state_dict() if not key.endswith("num_batches_tracked")]
    assert len(names) == 472
    assert {"Conv2d_1a_3x3.conv.weight", "Mixed_7c.branch3x3dbl_3b.bn.running_var"} < set(names)
    assert sum(p.numel() for p in network.parameters()) == 23_850_960
    assert counter.get_total_flops() == pytest.approx(11.43e9, rel=1e-3)


@pytest.mark.parametrize("shape", [(7, 5), (64, 64), (299, 299), (300, 512)])
def test_tensorflow_resize_takes_pixels_where_tensorflow_does(shape: tuple[int, int]) -> None:
    """Output pixel i lies at i (h / 299) of the input, between its neighbours' values, without antialiasing."""
    image = _pictures(1, *shape)
    found = tensorflow_input(image)[0].double() * 128 + 128
    rows, columns = (np.arange(299) * (side / 299) for side in shape)
    low, left = rows.astype(int), columns.astype(int)
    down, right = (rows - low)[:, None], (columns - left)[None, :]
    values = image[0].permute(2, 0, 1).double().numpy()
    below, beside = np.minimum(low + 1, shape[0] - 1), np.minimum(left + 1, shape[1] - 1)

    def line(at: np.ndarray) -> np.ndarray:
        return values[:, at][:, :, left] * (1 - right) + values[:, at][:, :, beside] * right

    expected = line(low) * (1 - down) + line(below) * down
    # float32 positions, as in TensorFlow, are up to 1.5e-5 pixels off.
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=255 * 4e-5)


def test_clean_resize_is_pillows_bicubic_of_floats() -> None:
    """As clean-fid has it: a channel at a time, clipped, not rounded."""
    for image in (_pictures(1, 64, 48), _pictures(1, 400, 512)):
        channels = [
            Image.fromarray(channel.astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
            for channel in image[0].permute(2, 0, 1).numpy()
        ]
        expected = np.stack([np.asarray(channel).clip(0, 255) for channel in channels])
        found = clean_input(image)[0].numpy() * 128 + 128
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-3)


def test_every_resize_leaves_a_picture_of_299_pixels_as_it_is() -> None:
    image = _pictures(1, 299, 299)
    x = image.permute(0, 3, 1, 2).float()
    for resize in (tensorflow_input, clean_input):
        torch.testing.assert_close(resize(image), (x - 128) / 128, rtol=0, atol=1e-6)
    torch.testing.assert_close(pytorch_input(image), 2 * x / 255 - 1, rtol=0, atol=1e-6)


def test_features_do_not_depend_on_the_rest_of_the_batch(extractor: FeatureExtractor) -> None:
    """Of more pictures than are done at once."""
    images = _pictures(inception.CHUNK + 2, 32, 32)
    features, logits = extractor(images)
    assert features.shape == (len(images), extractor.dim)
    assert logits is not None
    assert logits.shape == (len(images), extractor.num_classes)
    alone = extractor(images[-1:])
    torch.testing.assert_close(alone.features, features[-1:], rtol=1e-4, atol=1e-5)


def test_only_the_published_weights_give_what_is_called_fid(
    extractor: FeatureExtractor, seeded_inception: Path, digest: str, monkeypatch
) -> None:
    assert extractor.score_name("fd") == f"fd_inception_{digest[:8]}"
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", digest)  # as if it were the published file
    for name, variant in (("inception", ""), ("inception_clean", "_clean")):
        found = load_extractor(name, weights=seeded_inception)
        assert found.is_fid
        assert found.score_name("fd") == f"fid{variant}"


def test_another_file_must_be_stated(seeded_inception: Path, digest: str) -> None:
    with pytest.raises(ValueError, match=rf"SHA-256 {digest}, not the published file's, 6726825d"):
        load_extractor("inception", weights=seeded_inception)
    with pytest.raises(ValueError, match=rf"SHA-256 {digest}, not the stated one, 0000"):
        load_extractor("inception", weights=seeded_inception, sha256="0" * 64)


def test_a_files_content_does_as_well_as_its_path(
    extractor: FeatureExtractor, seeded_inception: Path, digest: str
) -> None:
    """And so do the counters that some files have."""
    state = torch.load(seeded_inception, weights_only=True)
    state["Conv2d_1a_3x3.bn.num_batches_tracked"] = torch.tensor(3)
    content, image = _file(state), _pictures(1, 32, 32)
    other = load_extractor("inception", weights=content, sha256=hashlib.sha256(content).hexdigest())
    assert torch.equal(other(image).features, extractor(image).features)


def _file(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>not found</html>", "no file that torch.load reads"),
        (_file([1, 2]), "no plain state dict, but a list"),
        (_file({"fc.weight": torch.zeros(1000, 2048)}), "472 tensors differ in name or shape"),
    ],
)
def test_what_is_no_such_file_is_named(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_extractor("inception", weights=content, sha256=hashlib.sha256(content).hexdigest())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """A publisher on this machine, whose folder it is, and an empty cache of torch's."""
    folder = tmp_path / "published"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args) -> None:
            super().__init__(*args, directory=str(folder))

        def log_message(self, *_: object) -> None:
            pass

    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}/weights.pth"
        monkeypatch.setattr(inception, "WEIGHTS_URL", address)
        yield folder
        server.shutdown()
        thread.join()
    torch.hub.set_dir(before)


def test_published_weights_are_downloaded_once(
    hub: Path, seeded_inception: Path, digest: str, monkeypatch
) -> None:
    with pytest.raises(OSError, match=r"weights.pth cannot be downloaded .*give its path"):
        load_extractor("inception")
    (hub / "weights.pth").write_bytes(b"another file")
    with pytest.raises(OSError, match=r"cannot be downloaded .*invalid hash"):
        load_extractor("inception")
    (hub / "weights.pth").write_bytes(seeded_inception.read_bytes())
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", digest)
    assert load_extractor("inception").is_fid
    (hub / "weights.pth").unlink()
    assert load_extractor("inception").weights_sha256 == digest

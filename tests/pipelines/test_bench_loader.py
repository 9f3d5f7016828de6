"""The benchmark of the loader: all loaders give the dataset's pictures and text, and all are reported."""

import json
from contextlib import closing

import numpy as np
import pytest

from pipelines import cli, rivals
from pipelines.dataset import PreparedDataset, decode_rows, text_of, text_rows
from pipelines.schema import IMAGE, TEXT, TEXT_LENGTHS


@pytest.fixture
def dataset(prepared) -> PreparedDataset:
    return PreparedDataset.open(str(prepared))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("name", rivals.PACKAGES)
def test_rivals_give_the_same_pictures_and_text(dataset, local_ray, tmp_path, name: str) -> None:
    if (reason := rivals.installed()[name]) is not None:
        pytest.skip(reason)
    shape = rivals.Shape.of(dataset, batch_size=3)
    with closing(getattr(rivals, name)(dataset, shape, 1, tmp_path / name)) as stream:
        batches = [next(stream) for _ in range(4)]
    table = dataset.read("train", [IMAGE, TEXT, TEXT_LENGTHS])
    texts: dict[bytes, list[np.ndarray]] = {}
    for picture, row in zip(decode_rows(table), text_rows(table), strict=True):
        captions = [text_of(row, k) for k in range(len(row[TEXT_LENGTHS]))]
        texts.setdefault(picture.tobytes(), []).extend(captions)
    for batch in batches:
        tensors = list(batch.values()) if isinstance(batch, dict) else batch
        assert [tensor.shape[0] for tensor in tensors] == [3, 3, 3]
        for picture, text, mask in zip(*(tensor.numpy() for tensor in tensors), strict=True):
            tokens = text[mask]
            assert any(np.array_equal(tokens, own) for own in texts[picture.tobytes()])


@pytest.mark.slow
def test_reports_speed_and_its_ratio_to_bare_decoding(
    dataset, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(rivals, "installed", lambda: {"streaming": "it is not there"})
    output = tmp_path / "bench.json"
    arguments = ["--dataset", dataset.path, "--batch-size", "2", "--threads", "1"]
    assert cli.main(["bench", "loader", *arguments, "--repeats", "2", "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "streaming: not compared: it is not there" in shown
    loaders = json.loads(output.read_text())["loaders"]
    assert set(loaders) == {"bare", "pillow", "layered"}
    for figures in loaders.values():
        assert len(figures["speeds"]) == 2
        assert min(figures["speeds"]) > 0
    assert loaders["bare"]["of_bare"]["median"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads 0 must be at least 1"),
        (["--dataset", "nowhere"], "holds no finished dataset"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, message) -> None:
    assert cli.main(["bench", "loader", *arguments]) == 2
    assert message in capsys.readouterr().err

"""`pipelines.losses`: what is logged of the loss between two lines."""

import math

import pytest
import torch

from pipelines.losses import LossByNoise


def test_a_picture_counts_in_its_layer_and_bin() -> None:
    losses = LossByNoise((8, 16))
    logsnr = torch.tensor([-100.0, -5.5, -4.5, 0.5, 100.0])
    losses.add(logsnr, torch.tensor([[1.0, 2.0, 4.0, 8.0, 16.0], [0.0, 0.0, 0.0, 0.0, 5.0]]))
    losses.add(torch.tensor([-5.0]), torch.tensor([[6.0], [3.0]]))
    means = losses.take()
    assert means == pytest.approx(
        {
            "loss/8": 37 / 6,
            "loss/8/logsnr_-7": 1.0,
            "loss/8/logsnr_-5": 4.0,
            "loss/8/logsnr_1": 8.0,
            "loss/8/logsnr_7": 16.0,
            "loss/16": 8 / 6,
            "loss/16/logsnr_-7": 0.0,
            "loss/16/logsnr_-5": 1.0,
            "loss/16/logsnr_1": 0.0,
            "loss/16/logsnr_7": 5.0,
        }
    )


def test_taking_starts_anew() -> None:
    losses = LossByNoise((8,))
    for value in (1.0, 3.0):
        losses.add(torch.tensor([0.5]), torch.tensor([[value]]))
        assert losses.take() == {"loss/8": value, "loss/8/logsnr_1": value}


def test_a_nan_is_seen() -> None:
    losses = LossByNoise((8,))
    losses.add(torch.tensor([0.5, -5.0]), torch.tensor([[float("nan"), 1.0]]))
    assert math.isnan(losses.take()["loss/8"])

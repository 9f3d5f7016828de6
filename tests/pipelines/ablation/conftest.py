"""A small experiment."""

import pytest

from pipelines.ablation import experiment

TEXT = """
title: Noise
question: Which noise?
claim: This one.
scales:
  small: {takes: a minute}
factors:
  noise:
    about: noise of the layers
    concerns: training
    levels:
      sinc: {diffusion.noise: sinc}
      box: {diffusion.noise: box}
  steps:
    about: steps
    concerns: drawing
    levels:
      many: {}
      few: {sample.num_steps: 5}
baselines: [{noise: sinc, steps: many}]
metrics: {fd: lower, is: higher, train_loss: none}
"""


@pytest.fixture
def text() -> str:
    """Of its file."""
    return TEXT


@pytest.fixture
def small() -> experiment.Experiment:
    """What the file says."""
    return experiment.read(TEXT, "noise.yaml")

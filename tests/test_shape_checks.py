"""The checks of shapes are on: they would be silently off if anything imported `layered_model` before the hook was there."""

import importlib
import pkgutil

import jaxtyping
import pytest
import torch

import layered_model
from layered_model.images import to_float

MODULES = [
    f"layered_model.{module.name}" for module in pkgutil.iter_modules(layered_model.__path__)
]


@pytest.fixture(autouse=True)
def _hooked(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--no-shape-checks"):
        pytest.skip("there are none with --no-shape-checks")


def test_a_wrong_shape_is_refused() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match=r"u8\[8,8,3\]"):
        to_float(torch.zeros(8, 8, 3, dtype=torch.uint8))


@pytest.mark.usefixtures("unchecked")
def test_a_test_can_do_without() -> None:
    with pytest.raises(RuntimeError, match="permute"):
        to_float(torch.zeros(8, 8, 3, dtype=torch.uint8))


@pytest.mark.parametrize("name", ["layered_model", *MODULES])
def test_every_module_was_imported_through_the_hook(name: str) -> None:
    loader = importlib.import_module(name).__loader__
    assert type(loader).__module__.startswith("jaxtyping")

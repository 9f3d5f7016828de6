"""The walls between rooms that import-linter cannot see: what importing does."""

import subprocess
import sys
import time

import pytest


def _run(script: str) -> float:
    """Seconds that a fresh interpreter takes for a script."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    return time.perf_counter() - began


def test_layered_model_works_where_ray_and_transformers_are_absent() -> None:
    _run(
        "import sys\n"
        "blocked = 'ray', 'transformers', 'omegaconf', 'yaml', 'pipelines', 'torchvision'\n"
        "sys.modules.update(dict.fromkeys(blocked))\n"
        "import layered_model\n"
    )


@pytest.mark.slow
def test_importing_layered_model_costs_half_a_second_more_than_torch_at_most() -> None:
    _run("import layered_model")  # writes the bytecode
    torch = min(_run("import torch") for _ in range(3))
    ours = min(_run("import layered_model") for _ in range(3))
    assert ours < torch + 0.5


@pytest.mark.parametrize("module", ["config", "session", "cli", "schema", "storage"])
def test_importing_changes_nothing(module: str) -> None:
    _run(
        "import logging, os, torch, random\n"
        "before = dict(os.environ), logging.root.handlers[:], torch.initial_seed(), random.getstate()\n"
        f"import pipelines.{module}, sys\n"
        "after = dict(os.environ), logging.root.handlers[:], torch.initial_seed(), random.getstate()\n"
        "assert before == after\n"
        "assert 'ray' not in sys.modules\n"
    )


def test_torchvision_is_not_here() -> None:
    with pytest.raises(ModuleNotFoundError):
        import torchvision  # noqa: F401

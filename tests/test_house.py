"""The walls between rooms that import-linter cannot see: what importing does."""

import subprocess
import sys

import pytest


def _run(script: str) -> None:
    """A script in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_layered_model_works_where_ray_and_transformers_are_absent() -> None:
    _run(
        "import sys\n"
        "blocked = 'ray', 'transformers', 'omegaconf', 'yaml', 'pipelines', 'torchvision'\n"
        "sys.modules.update(dict.fromkeys(blocked))\n"
        "import layered_model\n"
    )


def test_importing_layered_model_brings_little_beyond_torch() -> None:
    """And so costs little: measured, less than a tenth of a second of a processor."""
    _run(
        "import sys, torch\n"
        "before = {name.partition('.')[0] for name in sys.modules}\n"
        "import layered_model\n"
        "brought = {name.partition('.')[0] for name in sys.modules} - before\n"
        "brought -= sys.stdlib_module_names\n"
        "assert brought <= {'layered_model', 'jaxtyping', 'numpy', 'safetensors'}, brought\n"
    )


def test_importing_changes_nothing() -> None:
    _run(
        "import importlib, logging, os, sys, torch, random\n"
        "def state():\n"
        "    return dict(os.environ), logging.root.handlers[:], torch.initial_seed(), random.getstate()\n"
        "before = state()\n"
        "for module in ('config', 'schema', 'storage', 'session', 'cli'):\n"
        "    importlib.import_module(f'pipelines.{module}')\n"
        "    assert before == state(), module\n"
        "    assert 'ray' not in sys.modules, module\n"
    )


def test_torchvision_is_not_here() -> None:
    with pytest.raises(ModuleNotFoundError):
        import torchvision  # noqa: F401

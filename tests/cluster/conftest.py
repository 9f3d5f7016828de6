"""The files of cluster/, and the versions they must agree with."""

import re
from pathlib import Path

import pytest

CLUSTER = Path(__file__).parents[2] / "cluster"


@pytest.fixture(scope="session")
def ray_version() -> str:
    """As pinned."""
    text = (CLUSTER.parent / "constraints.txt").read_text()
    return re.search(r"^ray==(\S+)$", text, re.MULTILINE)[1]

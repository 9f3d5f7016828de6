"""Requests made up from the server's own description of itself find nothing that it cannot answer as it says."""

import contextlib
from unittest import SkipTest

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

# The network's own tests check its shapes; here that would make drawing three times as slow.
pytestmark = pytest.mark.usefixtures("unchecked")

CHECKS = [
    not_a_server_error,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
]


@pytest.fixture(scope="module")
def described(serve_app):
    """The description of a server that draws quickly."""
    limits = {"max_steps": 3, "max_images": 2, "max_concurrent": 100}
    with serve_app(requests_per_minute=1_000_000, **limits) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_answer_is_as_described(described, mode):
    operations = [result.ok() for result in described.get_all_operations()]
    statuses = {operation.label: _ask(operation, mode) for operation in operations}
    drawn = statuses["POST /v1/images/generations"]
    if mode == GenerationMode.POSITIVE:
        assert len(statuses) == 9
        assert all(statuses.values())
        assert {200, 400} <= drawn
    else:
        assert 400 in drawn


def _ask(operation, mode) -> set[int]:
    """Statuses of the answers to requests made up for an operation."""
    statuses = set()

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode), drawable=st.booleans())
    def ask(case, drawable):
        if isinstance(case.body, dict):
            case.body.pop("deadline_seconds", None)  # which it may be too slow for, with a 504
        if drawable and mode == GenerationMode.POSITIVE and isinstance(case.body, dict):
            # What the description cannot know: which sizes and how many layers the model has.
            unknown = ("size", "layer_prompts", "guidance", "model")
            body = {key: value for key, value in case.body.items() if key not in unknown}
            case.body = body | {"n": 1, "num_steps": 2, "partial_images": 1}
        statuses.add(case.call_and_validate(checks=CHECKS).status_code)

    with contextlib.suppress(SkipTest, Unsatisfiable):  # some have nothing that could be wrong
        ask()
    return statuses

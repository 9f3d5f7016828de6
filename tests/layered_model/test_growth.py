import pytest
import torch

from layered_model.growth import check_growth, grow

SMALL = {"resolutions": (8, 16), "channels": (8, 16, 16), "blocks": (1, 1, 1)}


def run(network, x, *rest):
    with torch.no_grad():
        return network(x, *rest)


def test_lower_outputs_are_bit_identical_at_the_start(tiny, awake, batch_of):
    trained = awake(tiny(**SMALL), seed=1)
    grown = grow(trained, tiny())
    x, *rest = batch_of(tiny())
    before, after = run(trained, x[:2], *rest), run(grown, x, *rest)
    assert len(after) == 3
    assert all(torch.equal(one, other) for one, other in zip(before, after[:2], strict=True))


def test_from_the_trunk_alone_by_two_layers(tiny, awake, batch_of):
    trained = awake(tiny(resolutions=(8,), channels=(16, 16), blocks=(1, 1)), seed=1)
    grown = grow(trained, tiny())
    x, *rest = batch_of(tiny())
    assert torch.equal(run(trained, x[:1], *rest)[0], run(grown, x, *rest)[0])


def test_a_new_layer_predicts_nothing_at_first(tiny, awake, batch_of):
    x, *rest = batch_of(tiny())
    assert not run(grow(awake(tiny(**SMALL)), tiny()), x, *rest)[2].any()


def test_the_grown_network_shares_no_memory_with_the_trained_one(tiny, awake):
    trained = awake(tiny(**SMALL))
    taken = {p.data_ptr() for p in trained.parameters()}
    assert taken.isdisjoint(p.data_ptr() for p in grow(trained, tiny()).parameters())


@pytest.mark.parametrize(
    ("lower", "upper", "message"),
    [
        ({}, {"resolutions": (8, 16)}, r"resolutions=\(8, 16\) must begin with \(8, 16\) and go"),
        ({}, {"resolutions": (4, 8, 16)}, r"resolutions=\(4, 8, 16\) must begin"),
        (
            {"channels": (8, 8, 16)},
            {"channels": (8, 16, 16, 16)},
            r"must be \(8, 8, 16\) in its last 3",
        ),
        ({}, {"blocks": (1, 1, 2, 1)}, r"blocks=\(1, 1, 2, 1\) must be \(1, 1, 1\) in its last 3"),
        ({}, {"attention": (0, 1)}, r"attention=\(0, 1\) must be \(1, 1\), as in"),
        ({}, {"embedding_width": 8}, "embedding_width=8 must be 16"),
        ({}, {"text_width": 8}, "text_width=8 must be 12"),
        ({}, {"upper_norm": "pixel"}, "upper_norm=pixel must be group"),
        ({}, {"kind": "single_scale"}, "kind='single_scale' must be 'layered' to grow"),
    ],
)
def test_a_shape_that_does_not_continue_is_named(lower, upper, message, tiny):
    large = {"channels": (8, 8, 16, 16)} | upper
    small = SMALL | {"channels": (8, 16, 16)} | lower
    if len(large.get("resolutions", (1, 2, 3))) < 3:
        large |= {"channels": (8, 16, 16), "blocks": (1, 1, 1)}
    with pytest.raises(ValueError, match=message):
        check_growth(tiny(**small), tiny(**large))


def test_dropout_may_change(tiny):
    check_growth(tiny(**SMALL), tiny(dropout=0.5))

import re
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from layered_model.unet import LayeredUNet
from pipelines.config import load_config


def run(network, x, logsnr, text, mask):
    with torch.no_grad():
        return network(x, logsnr, text, mask)


def test_every_layer_has_an_output_of_its_resolution(tiny, awake, batch_of):
    config = tiny()
    x, *rest = batch_of(config)
    outputs = run(awake(config), x, *rest)
    assert [o.shape for o in outputs] == [i.shape for i in x]
    assert all(output.std() > 0.01 for output in outputs)


def test_a_fresh_network_predicts_zero(tiny, batch_of):
    config = tiny()
    for output in run(LayeredUNet(config), *batch_of(config)):
        assert (output == 0).all()


def test_early_exit_equals_the_full_run(tiny, awake, batch_of):
    config = tiny()
    network = awake(config)
    x, *rest = batch_of(config)
    full = run(network, x, *rest)
    for num_layers in (1, 2, 3):
        part = run(network, x[:num_layers], *rest)
        assert len(part) == num_layers
        assert all(torch.equal(one, other) for one, other in zip(part, full, strict=False))


def test_downsampling_is_isolated(tiny, awake, batch_of):
    config = tiny()
    network = awake(config)
    x, *rest = batch_of(config)
    before = run(network, x, *rest)
    for layer in range(3):
        changed = [torch.randn_like(p) if i == layer else p for i, p in enumerate(x)]
        after = run(network, changed, *rest)
        for other in range(3):
            assert torch.equal(before[other], after[other]) == (other < layer)


def test_growth_leaves_lower_outputs_bit_identical(tiny, awake, batch_of):
    small = tiny(resolutions=(8, 16), channels=(8, 16, 16), blocks=(1, 1, 1))
    large = tiny()
    trained, grown = awake(small, seed=1), awake(large, seed=2)
    missing = grown.load_state_dict(trained.state_dict(), strict=False)
    assert missing.unexpected_keys == []
    assert {name.split(".")[0] for name in missing.missing_keys} == {"upper", "heads"}
    x, *rest = batch_of(large)
    lower = run(trained, x[:2], *rest)
    assert all(
        torch.equal(one, other) for one, other in zip(lower, run(grown, x, *rest), strict=False)
    )


def test_every_parameter_learns(tiny, batch_of):
    # Heads are zero at first, then the ends of the blocks, so that the insides learn from the third step on.
    config = tiny()
    torch.manual_seed(0)
    network = LayeredUNet(config)
    x, *rest = batch_of(config)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        outputs = network(x, *rest)
        errors = [(output - goal).square().mean() for output, goal in zip(outputs, x, strict=True)]
        sum(errors).backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        optimizer.step()
    idle = [name for name, p in network.named_parameters() if not p.grad.abs().max() > 0]
    assert idle == []


def test_lower_layers_get_no_gradient_from_higher_inputs(tiny, awake, batch_of):
    config = tiny()
    x, *rest = batch_of(config)
    for picture in x:
        picture.requires_grad_()
    outputs = awake(config)(x, *rest)
    grads = torch.autograd.grad(outputs[1].sum(), x, allow_unused=True)
    assert grads[2] is None
    assert all((grad != 0).any() for grad in grads[:2])


def test_masked_tokens_have_no_influence(tiny, awake, batch_of):
    config = tiny()
    network = awake(config)
    x, logsnr, text, mask = batch_of(config)
    other = torch.where(mask[..., None], text, 1e3 * torch.randn_like(text))
    for one, two in zip(
        run(network, x, logsnr, text, mask), run(network, x, logsnr, other, mask), strict=True
    ):
        assert torch.equal(one, two)


def test_padding_further_changes_nothing(tiny, awake, batch_of):
    config = tiny()
    network = awake(config)
    x, logsnr, text, mask = batch_of(config)
    longer = torch.cat([text, torch.zeros_like(text)], dim=1)
    longer_mask = torch.cat([mask, torch.zeros_like(mask)], dim=1)
    for one, two in zip(
        run(network, x, logsnr, text, mask),
        run(network, x, logsnr, longer, longer_mask),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


def test_real_tokens_have_influence(tiny, awake, batch_of):
    config = tiny()
    network = awake(config)
    x, logsnr, text, mask = batch_of(config)
    changed = text.clone()
    changed[:, 0] = torch.randn_like(changed[:, 0])
    for one, two in zip(
        run(network, x, logsnr, text, mask), run(network, x, logsnr, changed, mask), strict=True
    ):
        assert (one - two).abs().max() > 1e-3


def test_a_row_without_text_is_the_same_whatever_its_embeddings(tiny, awake, batch_of):
    config = tiny()
    network = awake(config)
    x, logsnr, text, mask = batch_of(config)
    nothing = torch.zeros_like(mask)
    one = run(network, x, logsnr, text, nothing)
    two = run(network, x, logsnr, torch.zeros_like(text), nothing)
    none = run(network, x, logsnr, text[:, :0], mask[:, :0])
    for a, b, c in zip(one, two, none, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=0, atol=1e-5)


def test_a_picture_does_not_depend_on_its_batch(tiny, awake, batch_of):
    config = tiny()
    network = awake(config)
    x, logsnr, text, mask = batch_of(config, size=3)
    together = run(network, x, logsnr, text, mask)
    for row in range(3):
        one = slice(row, row + 1)
        alone = run(network, [p[one] for p in x], logsnr[one], text[one], mask[one])
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a, b[one], rtol=0, atol=1e-5)


@pytest.mark.parametrize("resolutions", [(8, 32), (4, 32), (8, 16), (32,), (4, 8, 32), (8, 32, 64)])
def test_any_ladder_of_powers_of_two_works(resolutions, tiny, awake, batch_of):
    levels = (resolutions[-1] // resolutions[0]).bit_length() + 1
    config = tiny(resolutions=resolutions, channels=(8,) * levels, blocks=(1,) * levels)
    assert config.num_trunk_levels == 2
    x, *rest = batch_of(config, size=1)
    outputs = run(awake(config), x, *rest)
    assert [output.shape[-1] for output in outputs] == list(resolutions)


def test_levels_without_an_input_may_do_without_blocks(tiny, awake, batch_of):
    config = tiny(resolutions=(8, 32), blocks=(1, 0, 1, 1))
    assert len(run(awake(config), *batch_of(config))) == 2


def test_dropout_is_the_trunks_alone(tiny):
    rates = {
        name.split(".")[0]: module.p
        for name, module in LayeredUNet(tiny(dropout=0.3)).named_modules()
        if isinstance(module, torch.nn.Dropout)
    }
    assert rates == {"trunk": 0.3, "upper": 0.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolutions": ()}, r"resolutions=\(\)"),
        ({"resolutions": (0, 8)}, r"resolutions=\(0, 8\)"),
        ({"resolutions": (8, 24)}, "24 must be 2, 4, 8, ... times 8"),
        ({"resolutions": (16, 8)}, "8 must be 2, 4, 8, ... times 16"),
        ({"resolutions": (8, 8)}, "8 must be 2, 4, 8, ... times 8"),
        ({"channels": (8, 8)}, r"channels=\(8, 8\) must have more than 2 levels"),
        ({"channels": (8, 8, 16, 0)}, r"channels=\(8, 8, 16, 0\)"),
        ({"blocks": (1, 1, 1)}, r"blocks=\(1, 1, 1\) must hold 4 counts"),
        ({"blocks": (1, 1, 1, -1)}, r"blocks=\(1, 1, 1, -1\)"),
        ({"blocks": (0, 1, 1, 1)}, r"blocks=\(0, 1, 1, 1\)"),
        ({"blocks": (1, 0, 1, 1)}, r"blocks=\(1, 0, 1, 1\)"),
        ({"attention": (1,)}, r"attention=\(1,\) must hold 2 counts"),
        ({"resolutions": (7, 14, 28)}, "halves resolution 7 1 times"),
        ({"head_width": 5}, "head_width=5 must divide channels 16"),
        ({"head_width": 0}, "head_width=0 must be positive"),
        ({"text_width": 0}, "text_width=0 must be positive"),
        ({"mid_blocks": -1}, "mid_blocks=-1"),
        ({"dropout": 1.0}, "dropout=1.0 must lie in"),
    ],
)
def test_a_wrong_shape_names_its_field(changes, message, tiny):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def counts_in_comments():
    """Parameters and operations that the comment before a preset of ray_config.yaml states."""
    text = (Path(__file__).parents[2] / "ray_config.yaml").read_text()
    claim = r"# (?:.*\W)?(\d+) M parameters, (\d+) GMAC(?s:.*?)\n  (\w+):\n"
    return [(name, int(macs), int(params)) for params, macs, name in re.findall(claim, text)]


def test_presets_state_what_they_cost():
    assert {"emoji128", "photo128", "coco512"} <= {name for name, *_ in counts_in_comments()}


@pytest.mark.parametrize(("preset", "giga_macs", "million_parameters"), counts_in_comments())
def test_presets_cost_what_their_comments_say(preset, giga_macs, million_parameters):
    config = load_config(preset, [])
    with torch.device("meta"):
        network = LayeredUNet(config.model)
        x = [torch.empty(1, 3, r, r) for r in config.model.resolutions]
        text = torch.empty(1, config.text.max_tokens, config.model.text_width)
        mask = torch.ones(1, config.text.max_tokens, dtype=torch.bool)
        with FlopCounterMode(display=False) as counter:
            network(x, torch.zeros(1), text, mask)
    assert round(counter.get_total_flops() / 2e9) == giga_macs
    assert round(sum(p.numel() for p in network.parameters()) / 1e6) == million_parameters


@pytest.mark.compile
def test_the_network_is_one_graph(tiny, awake, batch_of):
    # Without a code generator, which would take a minute; what may break is the capture.
    config = tiny(resolutions=(8, 16), channels=(8, 16), blocks=(1, 1), attention=(1,))
    network = awake(config)
    captured = torch.compile(network, fullgraph=True, backend="aot_eager")
    for one, two in zip(
        run(network, *batch_of(config)), run(captured, *batch_of(config)), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)

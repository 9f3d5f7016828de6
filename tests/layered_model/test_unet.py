import pytest
import torch

from layered_model.crop import Box
from layered_model.unet import LayeredUNet


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


def test_a_layer_may_have_a_prompt_of_its_own(tiny, awake, batch_of):
    config = tiny()
    network = awake(config)
    x, logsnr, text, mask = batch_of(config)
    own = batch_of(config, seed=1)[2:]
    with torch.no_grad():
        plain = network(x, logsnr, text, mask)
        middle = network(x, logsnr, text, mask, layer_text=[None, own, None])
        top = network(x, logsnr, text, mask, layer_text=[None, None, own])
    assert [torch.equal(a, b) for a, b in zip(plain, middle, strict=True)] == [True, False, False]
    assert [torch.equal(a, b) for a, b in zip(plain, top, strict=True)] == [True, True, False]
    assert (plain[2] - top[2]).abs().max() > 1e-3


def test_the_trunks_prompt_for_each_layer_changes_nothing(tiny, awake, batch_of):
    config = tiny()
    network = awake(config)
    x, logsnr, text, mask = batch_of(config)
    for same in ([None] * 3, [None, (text, mask), (text, mask)]):
        with torch.no_grad():
            outputs = network(x, logsnr, text, mask, layer_text=same)
        for one, two in zip(run(network, x, logsnr, text, mask), outputs, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("kind", ["layered", "single_scale"])
def test_computing_activations_again_leaves_the_gradients_as_they_are(kind, tiny, awake, batch_of):
    config = tiny(kind=kind, dropout=0.3, blocks=(2, 1, 1, 1))
    network = awake(config).train()
    gradients, saved = [], []
    for network.checkpoint_upper in (False, True):
        torch.manual_seed(0)
        network.zero_grad()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t
        ):
            outputs = network(*batch_of(config))
        sum(output.square().sum() for output in outputs).backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
        saved.append(sum(kept))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert saved[1] < 0.7 * saved[0]


@pytest.mark.parametrize("kind", ["layered", "single_scale"])
def test_channels_last_is_kept_all_the_way(kind, tiny, awake, batch_of):
    config = tiny(kind=kind, upper_norm="pixel", dropout=0.1)
    network = awake(config).to(memory_format=torch.channels_last)
    lost = []

    def look(name):
        def hook(module, inputs, output):
            four = isinstance(output, torch.Tensor) and output.ndim == 4
            if four and not output.is_contiguous(memory_format=torch.channels_last):
                lost.append(name)

        return hook

    for name, module in network.named_modules():
        module.register_forward_hook(look(name))
    outputs = run(network, *batch_of(config))
    assert lost == []
    assert all(o.is_contiguous(memory_format=torch.channels_last) for o in outputs)


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


@pytest.mark.compile
@pytest.mark.parametrize("kind", ["layered", "single_scale"])
def test_the_network_is_one_graph_for_all_steps(kind, tiny, awake, batch_of):
    # Without a code generator, which would take a minute; what may break is the capture.
    from torch._dynamo.testing import CompileCounterWithBackend

    config = tiny(kind=kind, resolutions=(8, 16), channels=(8, 16), blocks=(1, 1), attention=(1,))
    network = awake(config)
    counter = CompileCounterWithBackend("aot_eager")
    captured = torch.compile(network, fullgraph=True, backend=counter)
    for step in range(3):
        batch = batch_of(config, seed=step)
        for one, two in zip(run(network, *batch), run(captured, *batch), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.compile
def test_a_training_step_that_computes_activations_again_is_one_graph(tiny, awake, batch_of):
    config = tiny(resolutions=(8, 16), channels=(8, 16), blocks=(1, 1), attention=(1,))
    network = awake(config).train()
    batch = batch_of(config)
    gradients = []
    network.checkpoint_upper = True
    for model in (network, torch.compile(network, fullgraph=True, backend="aot_eager")):
        network.zero_grad()
        sum(output.square().sum() for output in model(*batch)).backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.compile
def test_prompts_and_crops_compile(tiny, awake, batch_of):
    config = tiny(
        resolutions=(8, 16), channels=(8, 16), blocks=(1, 1), attention=(1,), upper_norm="pixel"
    )
    network = awake(config)
    captured = torch.compile(network, fullgraph=True, backend="aot_eager")
    x, logsnr, text, mask = batch_of(config)
    extras = {"layer_text": [None, (text.flip(0), mask.flip(0))], "crop": Box(1, 2, 3, 4)}
    with torch.no_grad():
        both = [model(x, logsnr, text, mask, **extras) for model in (network, captured)]
    for one, two in zip(*both, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)

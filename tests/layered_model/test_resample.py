import math

import numpy as np
import pytest
import scipy.fft
import torch
from torch.nn import functional as F

from layered_model.resample import downscale, project, resampling_matrix, upscale

KERNELS = ("sinc", "periodic", "box")
RATIOS = [(512, 256), (512, 128), (64, 32), (48, 16), (24, 3), (8, 1)]
each_kernel = pytest.mark.parametrize("kernel", KERNELS)
each_ratio = pytest.mark.parametrize(("high", "low"), RATIOS)


def matrix(kernel, high, low):
    return resampling_matrix(kernel, high, low, torch.float64, torch.device("cpu"))


def picture(resolution, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 2, resolution, resolution, generator=generator, dtype=dtype)


def cosine(frequency, resolution):
    """A plane wave at pixel centres, ``frequency`` half periods along a side."""
    centre = (torch.arange(resolution, dtype=torch.float64) + 0.5) / resolution
    wave = torch.cos(math.pi * frequency * centre)
    return wave[:, None] * wave[None, :]


@each_kernel
@each_ratio
def test_rows_are_orthonormal(kernel, high, low):
    a = matrix(kernel, high, low)
    torch.testing.assert_close(a @ a.T, torch.eye(low, dtype=torch.float64), rtol=0, atol=1e-12)


@each_kernel
def test_projected_white_noise_is_white(kernel):
    # The covariance itself: the projection as a matrix from all 16 x 16 pixels to all 8 x 8.
    units = torch.eye(256, dtype=torch.float64).reshape(256, 16, 16)
    operator = project(units, 8, kernel).reshape(256, 64).T
    covariance = operator @ operator.T
    torch.testing.assert_close(covariance, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-13)


@each_kernel
@each_ratio
def test_downscale_undoes_upscale(kernel, high, low):
    x = picture(low)
    again = downscale(upscale(x, high, kernel), low, kernel)
    torch.testing.assert_close(again, x, rtol=0, atol=1e-12)


@each_kernel
def test_downscaling_composes(kernel):
    x = picture(512)
    for operation in (project, downscale):
        torch.testing.assert_close(
            operation(operation(x, 256, kernel), 128, kernel),
            operation(x, 128, kernel),
            rtol=0,
            atol=1e-12,
        )


@each_kernel
def test_upscaling_composes(kernel):
    x = picture(16)
    torch.testing.assert_close(
        upscale(upscale(x, 32, kernel), 128, kernel), upscale(x, 128, kernel), rtol=0, atol=1e-12
    )


@each_kernel
def test_upscale_is_the_transpose_of_the_projection(kernel):
    x, y, ratio = picture(48), picture(16, seed=1), 3
    left = (project(x, 16, kernel) * y).sum()
    right = (x * upscale(y, 48, kernel) / ratio).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=0)


@each_kernel
@each_ratio
def test_a_constant_keeps_its_value(kernel, high, low):
    x = torch.full((1, 1, high, high), 0.7, dtype=torch.float64)
    torch.testing.assert_close(downscale(x, low, kernel), x[..., :low, :low], rtol=0, atol=1e-13)
    torch.testing.assert_close(upscale(x[..., :low, :low], high, kernel), x, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("high", "low"), [(64, 32), (64, 16), (48, 16)])
def test_sinc_keeps_low_frequencies_in_their_place(high, low):
    # A filter that is off by half a pixel changes the phase of every one of these.
    for frequency in range(low):
        torch.testing.assert_close(
            downscale(cosine(frequency, high), low), cosine(frequency, low), rtol=0, atol=1e-12
        )
        torch.testing.assert_close(
            upscale(cosine(frequency, low), high), cosine(frequency, high), rtol=0, atol=1e-12
        )


def test_sinc_removes_high_frequencies_whole():
    for frequency in range(16, 64):
        assert downscale(cosine(frequency, 64), 16).abs().max() < 1e-13


@each_ratio
def test_sinc_is_the_crop_of_a_dct(high, low):
    x = picture(high).numpy()
    spectrum = scipy.fft.dctn(x, axes=(-2, -1), norm="ortho")[..., :low, :low]
    expected = scipy.fft.idctn(spectrum, axes=(-2, -1), norm="ortho")
    np.testing.assert_allclose(project(torch.from_numpy(x), low).numpy(), expected, atol=1e-12)


@each_ratio
def test_periodic_is_the_crop_of_an_fft(high, low):
    # On the grid of pixel centres, and with the Nyquist bin's one real part times sqrt(2).
    x = picture(high)[0, 0, 0]
    frequency = torch.fft.rfftfreq(high, dtype=torch.float64)[: low // 2 + 1] * high
    shift = torch.exp(-1j * math.pi * frequency * (1 / high - 1 / low))
    spectrum = torch.fft.rfft(x, norm="ortho")[: low // 2 + 1] * shift
    if low % 2 == 0:
        spectrum[-1] = spectrum[-1].real * math.sqrt(2)
    expected = torch.fft.irfft(spectrum, n=low, norm="ortho")
    torch.testing.assert_close(matrix("periodic", high, low) @ x, expected, rtol=0, atol=1e-12)


@each_ratio
def test_box_is_average_pooling(high, low):
    x = picture(high)
    pooled = F.avg_pool2d(x, high // low)
    torch.testing.assert_close(downscale(x, low, "box"), pooled, rtol=0, atol=1e-12)
    nearest = F.interpolate(pooled, size=high, mode="nearest")
    torch.testing.assert_close(upscale(pooled, high, "box"), nearest, rtol=0, atol=1e-12)


def test_the_same_resolution_is_left_alone():
    x = picture(16)
    assert project(x, 16) is x
    assert upscale(x, 16) is x
    assert torch.equal(downscale(x, 16), x)


def test_sinc_overshoots_at_an_edge():
    # Which is why a low layer's picture is never clamped before it is saved.
    edge = torch.ones(1, 1, 64, 64)
    edge[..., 26:42] = -1
    assert downscale(edge, 16).abs().max() > 1.2


@each_kernel
def test_autocast_does_not_lower_precision(kernel):
    x = picture(64, dtype=torch.float32)
    plain = downscale(x, 16, kernel), upscale(x, 128, kernel)
    with torch.autocast("cpu", torch.bfloat16):
        cast = downscale(x, 16, kernel), upscale(x, 128, kernel)
    for one, other in zip(plain, cast, strict=True):
        assert other.dtype == torch.float32
        assert torch.equal(one, other)


def test_half_precision_is_computed_in_float32():
    x = picture(64, dtype=torch.float32).bfloat16()
    assert torch.equal(downscale(x, 16), downscale(x.float(), 16))


def test_gradients_pass_through_a_matrix_first_made_in_inference_mode():
    resampling_matrix.cache_clear()
    x = picture(12, dtype=torch.float32)
    with torch.inference_mode():
        downscale(x, 6)
    x.requires_grad_()
    downscale(x, 6).sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / 4), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("high", "low"), [(64, 48), (48, 20), (17, 5), (9, 8)])
@pytest.mark.parametrize("kernel", ["sinc", "periodic"])
def test_a_ratio_need_not_be_whole(kernel, high, low):
    a = matrix(kernel, high, low)
    torch.testing.assert_close(a @ a.T, torch.eye(low, dtype=torch.float64), rtol=0, atol=1e-12)
    constant = torch.full((1, 1, high, high), 0.7, dtype=torch.float64)
    torch.testing.assert_close(
        downscale(constant, low, kernel), constant[..., :low, :low], rtol=0, atol=1e-13
    )
    x = picture(low)
    torch.testing.assert_close(
        downscale(upscale(x, high, kernel), low, kernel), x, rtol=0, atol=1e-12
    )


def test_ratios_that_are_not_whole_compose_too():
    x = picture(60)
    for kernel in ("sinc", "periodic"):
        torch.testing.assert_close(
            project(project(x, 25, kernel), 12, kernel), project(x, 12, kernel), rtol=0, atol=1e-12
        )


def test_a_matrix_is_made_once_for_a_dtype_and_device():
    arguments = ("sinc", 40, 8, torch.float32, torch.device("cpu"))
    assert resampling_matrix(*arguments) is resampling_matrix(*arguments)
    meta = resampling_matrix(*arguments[:-1], torch.device("meta"))
    assert meta.device.type == "meta"


@pytest.mark.compile
@each_kernel
def test_resampling_compiles_into_one_graph(kernel):
    def around(x):
        with torch.autocast("cpu", torch.bfloat16):
            low = project(x, 8, kernel)
            return low, upscale(downscale(x, 16, kernel), 32, kernel)

    compiled = torch.compile(around, fullgraph=True, backend="aot_eager")
    resampling_matrix.cache_clear()
    for resolution in (32, 64, 128):  # a recompile, which may try a resolution that is no constant
        x = picture(resolution, dtype=torch.float32).requires_grad_()
        ours, plain = compiled(x), around(x)
        for one, other in zip(ours, plain, strict=True):
            assert one.dtype == torch.float32
            torch.testing.assert_close(one, other)
        ours[1].sum().backward()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize(("high", "low"), [(16, 32), (16, 0)])
def test_resolutions_out_of_range_are_named(high, low):
    with pytest.raises(ValueError, match=f"resolution {low} must be from 1 to {high}"):
        downscale(picture(high), low)


def test_box_needs_a_whole_ratio():
    with pytest.raises(ValueError, match="resolution 64 is not a multiple of 48, which box needs"):
        downscale(picture(64), 48, "box")


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_kernel_is_named():
    with pytest.raises(ValueError, match="kernel 'lanczos' is unknown"):
        downscale(picture(8), 4, "lanczos")

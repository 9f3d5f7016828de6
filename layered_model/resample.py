"""Orthonormal resampling between resolutions: the one operator for noise and for pictures.

For two resolutions ``n > m`` with any ratio ``k = n / m`` (a whole number for ``box``) a matrix ``A`` of shape ``[m, n]`` with
orthonormal rows (``A A^T = I``) is applied along both axes:

    P x = A x A^T        projection; white noise of variance 1 stays white with variance 1
    D x = P x / k        amplitude-preserving downscale for pictures (a constant stays that constant)
    U y = k A^T y A      right inverse of D: D U = I

Three kernels, all real, pixel-centred and exact under composition:

* ``sinc``: ``A = C_m^T [I 0] C_n`` with ``C`` the orthonormal DCT-II, that is, keep the lowest ``m`` frequencies of ``n``.
  This is ideal (sinc) low-pass interpolation with mirrored borders.
* ``periodic``: the same with ``C`` the real Fourier basis, that is, the crop of an FFT: sinc interpolation of a picture that
  repeats itself, so that opposite borders touch. At an even ``m`` the Nyquist bin has one real part to keep, which takes the
  factor sqrt(2) to stay white; at pixel centres that part is the sine.
* ``box``: average pooling times k. As white as sinc, but it mixes frequencies of the higher resolution into the lower.

An FFT cropped as it comes shifts the grid by half a pixel and loses variance at the Nyquist bin; bicubic or Lanczos filters
colour the noise. Called by `noise`, `diffusion` and `sampler`.
"""

import math
from functools import lru_cache
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

Kernel = Literal["sinc", "periodic", "box"]


def _dct_matrix(n: int) -> Float[Tensor, "{n} {n}"]:
    """Orthonormal DCT-II, float64: row f holds frequency f."""
    position = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi / n * (position + 0.5) * position[:, None]) * math.sqrt(2.0 / n)
    matrix[0] /= math.sqrt(2.0)
    return matrix


def _fourier_matrix(n: int) -> Float[Tensor, "{n} {n}"]:
    """Orthonormal real Fourier basis at pixel centres, float64, from low frequencies to high: constant, cosine, sine, ..."""
    position = 2.0 * math.pi / n * (torch.arange(n, dtype=torch.float64) + 0.5)
    phase = torch.arange(1, n // 2 + 1)[:, None] * position
    waves = torch.stack([phase.cos(), phase.sin()], dim=1).flatten(0, 1) * math.sqrt(2.0 / n)
    if n % 2 == 0:  # at the Nyquist frequency the cosine is zero at every pixel centre
        waves = torch.cat([waves[:-2], waves[-1:] / math.sqrt(2.0)])
    return torch.cat([torch.full((1, n), n**-0.5, dtype=torch.float64), waves])


@lru_cache(maxsize=256)
@torch.inference_mode(
    mode=False
)  # a matrix first needed while sampling must serve training as well
def resampling_matrix(
    kernel: Kernel, high: int, low: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "{low} {high}"]:
    """The matrix ``A`` from ``high`` to ``low`` pixels, computed in float64 and kept per dtype and device.

    Raises:
        ValueError: if ``low`` is above ``high``, for ``box`` not a divisor of it, or the kernel is unknown.
    """
    if not 1 <= low <= high:
        raise ValueError(f"resolution {low} must be from 1 to {high}, which is scaled from")
    if kernel == "sinc":
        matrix = _dct_matrix(low).T @ _dct_matrix(high)[:low]
    elif kernel == "periodic":
        matrix = _fourier_matrix(low).T @ _periodic_band(high, low)
    elif kernel == "box":
        if high % low:
            raise ValueError(f"resolution {high} is not a multiple of {low}, which box needs")
        ratio = high // low
        matrix = torch.eye(low, dtype=torch.float64).repeat_interleave(ratio, dim=1)
        matrix /= math.sqrt(ratio)
    else:
        raise ValueError(f"kernel {kernel!r} is unknown; use 'sinc', 'periodic' or 'box'")
    return matrix.to(device, dtype)


def _periodic_band(high: int, low: int) -> Float[Tensor, "{low} {high}"]:
    """The waves of ``high`` that ``low`` can hold; at its Nyquist frequency only the sine."""
    band = _fourier_matrix(high)[: low + (low % 2 == 0 and low < high)]
    return torch.cat([band[: low - 1], band[-1:]])


def _apply(x: Tensor, kernel: str, high: int, low: int, up: bool) -> Tensor:
    """``A x A^T``, or ``A^T x A`` on the way up, in float32 at least, also under autocast."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    matrix = resampling_matrix(cast(Kernel, kernel), high, low, dtype, x.device)
    left, right = (matrix.T, matrix) if up else (matrix, matrix.T)
    if not torch.is_autocast_enabled(x.device.type):
        return left @ x.to(dtype) @ right
    with torch.autocast(x.device.type, enabled=False):  # which takes a while, beside small pictures
        return left @ x.to(dtype) @ right


# The compiler would ignore the cache of matrices and compute them anew in every call; one opaque operator it calls as it is.
@torch.library.custom_op("layered::resample", mutates_args=())
def _operator(x: Tensor, kernel: str, high: int, low: int, up: bool) -> Tensor:
    return _apply(x, kernel, high, low, up).contiguous()


@_operator.register_fake
def _shape(x: Tensor, kernel: str, high: int, low: int, up: bool) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    side = high if up else low
    return x.new_empty((*x.shape[:-2], side, side), dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Tensor, str, int, int, bool], output: Tensor) -> None:
    ctx.dtype, *ctx.arguments = (inputs[0].dtype, *inputs[1:])


def _transposed(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
    kernel, high, low, up = ctx.arguments
    x_gradient = _operator(gradient, kernel, high, low, not up).to(ctx.dtype)
    return x_gradient, None, None, None, None


_operator.register_autograd(_transposed, setup_context=_keep)


def _scale(x: Tensor, kernel: Kernel, high: int, low: int, *, up: bool) -> Tensor:
    operation = _operator if torch.compiler.is_compiling() else _apply
    return cast(Tensor, operation(x, kernel, high, low, up))


def project(
    x: Float[Tensor, "*batch high high"], low: int, kernel: Kernel = "sinc"
) -> Float[Tensor, "*batch {low} {low}"]:
    """``P x``: keeps white noise white with the same variance. Computed in float32 at least, also under autocast."""
    high = x.shape[-1]
    return x if high == low else _scale(x, kernel, high, low, up=False)


def downscale(
    x: Float[Tensor, "*batch high high"], low: int, kernel: Kernel = "sinc"
) -> Float[Tensor, "*batch {low} {low}"]:
    """``D x``: keeps the amplitude of a picture. Sinc overshoots [-1, 1] at edges; clamp only when saving."""
    return project(x, low, kernel) * (low / x.shape[-1])


def upscale(
    x: Float[Tensor, "*batch low low"], high: int, kernel: Kernel = "sinc"
) -> Float[Tensor, "*batch {high} {high}"]:
    """``U x``: band-limited upscaling (nearest for ``box``), with ``downscale(upscale(x)) == x``."""
    low = x.shape[-1]
    return x if low == high else _scale(x, kernel, high, low, up=True) * (high / low)

"""Scattering features of images (Bruna & Mallat 2013): fixed wavelets and absolute values, learnt from no data.

An image x is filtered by oriented Morlet wavelets, replaced by its absolute value, perhaps filtered and replaced once
more, and blurred: with scales j and orientations a, the channels are

    x * blur,    |x * wavelet[j, a]| * blur,    ||x * wavelet[j, a]| * wavelet[j', a']| * blur    for j' > j

each taken at every 2^scales-th pixel.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fft import fft2, ifft2


def scattering(images: Tensor, *, scales: int = 2, orientations: int = 8) -> Tensor:
    """Compute the channels of orders 0, 1 and 2.

    Args:
        images: `(N, H, W)`, floating-point; zeros lie around them.
        scales: J, the number of octaves of wavelets.
        orientations: L, the number of angles of a wavelet in half a turn.

    Returns:
        `(N, 1 + J L + J (J - 1) L² / 2, H / 2^J, W / 2^J)`.

    Source: Bruna & Mallat 2013, "Invariant scattering convolution networks"; bandwidths and centre frequencies as in
    Oyallon & Mallat 2015.
    """
    step = 2**scales
    margin = step * 2  # beyond it a wavelet's envelope is next to nothing
    height, width = images.shape[-2:]
    size = height + 2 * margin, width + 2 * margin
    blur = _transfer(_gabor(size, 0.8 * 2 ** (scales - 1), 1.0, 0.0, 0.0).real, images)
    angles = [math.pi * a / orientations for a in range(orientations)]
    wavelets = [
        [_transfer(_morlet(size, j, angle, 4 / orientations), images) for angle in angles] for j in range(scales)
    ]

    def pooled(spectrum: Tensor) -> Tensor:
        inner = slice(margin, margin + height, step), slice(margin, margin + width, step)
        return ifft2(spectrum * blur).real[(..., *inner)]

    image = fft2(F.pad(images, (margin,) * 4))
    firsts, seconds = [], []
    for j, first in enumerate(wavelets):
        for one in first:
            spectrum = fft2(ifft2(image * one).abs())
            firsts.append(pooled(spectrum))
            seconds += [pooled(fft2(ifft2(spectrum * two).abs())) for second in wavelets[j + 1 :] for two in second]
    return torch.stack([pooled(image), *firsts, *seconds], dim=-3)


def _transfer(filter_: Tensor, images: Tensor) -> Tensor:
    transfer = fft2(filter_).real  # the filters have a real spectrum: they are conjugate symmetric about pixel (0, 0)
    return transfer.to(images.dtype)


def _morlet(size: tuple[int, int], scale: int, angle: float, slant: float) -> Tensor:
    sigma, frequency = 0.8 * 2**scale, 0.75 * math.pi / 2**scale
    wave = _gabor(size, sigma, slant, angle, frequency)
    envelope = _gabor(size, sigma, slant, angle, 0.0)
    return wave - envelope * (wave.sum() / envelope.sum())  # no response to a constant image


def _gabor(size: tuple[int, int], sigma: float, slant: float, angle: float, frequency: float) -> Tensor:
    """A plane wave under a Gaussian envelope of mass 1, centred on pixel (0, 0) of a torus."""
    rows, columns = (torch.fft.fftfreq(n, d=1 / n, dtype=torch.float64) for n in size)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    envelope = torch.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2)) * slant / (2 * math.pi * sigma**2)
    return envelope * torch.exp(1j * frequency * along)

"""How far two sets of images, or two tensors, are apart."""

from __future__ import annotations

import numpy as np


def psnr(a: np.ndarray, b: np.ndarray, peak: float = 255.0) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal arrays."""
    mse = float(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2))
    return float("inf") if mse == 0 else float(10 * np.log10(peak**2 / mse))


def sqnr(signal: float, noise: float) -> float:
    """Signal-to-quantization-noise ratio in dB from two sums of squares."""
    if noise == 0:
        return float("inf")
    return float(10 * np.log10(max(signal, 1e-30) / noise))


def ssim(a: np.ndarray, b: np.ndarray, peak: float = 255.0) -> float:
    """Structural similarity of two (H, W, 3) images, mean over pixels and channels.

    Source: Wang et al. 2004, eq. 13; Gaussian window of 11 pixels, sigma 1.5, as in scikit-image
        with gaussian_weights=True.
    """
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    g = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    g /= g.sum()

    def blur(z: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            z = np.apply_along_axis(lambda v: np.convolve(v, g, "valid"), axis, z)
        return z

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    return float(
        (((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()
    )


def structure_distance(a: np.ndarray, b: np.ndarray) -> float:
    """A perceptual distance without a network: 1 - SSIM averaged over the image and its halves
    down to 16 pixels (0 = equal).

    It stands where LPIPS would: LPIPS needs torch and downloaded weights. Source of the scales:
    MS-SSIM, Wang et al. 2003.
    """
    x, y, out = np.asarray(a, np.float64), np.asarray(b, np.float64), []
    while min(x.shape[:2]) >= 16:
        out.append(1 - ssim(x, y))
        h, w = (n // 2 * 2 for n in x.shape[:2])
        x, y = (z[:h, :w].reshape(h // 2, 2, w // 2, 2, -1).mean((1, 3)) for z in (x, y))
    return float(np.mean(out))

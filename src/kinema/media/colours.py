"""From the colours of a camera or a screen to sRGB, which is what models and viewers take pixels for.

A picture says by its primaries and its transfer function what its numbers mean. Bright light (PQ and HLG) is
compressed into the range of an ordinary screen, as players do. This file knows arrays, and nothing of files.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import numpy as np
import numpy.typing as npt

UInt8Array = npt.NDArray[np.uint8]
DeepArray = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
Floats = npt.NDArray[np.float32]
# The x and y of red, green, blue and white in CIE 1931.
Chromaticities = tuple[float, float, float, float, float, float, float, float]

_D65 = (0.3127, 0.329)
SRGB_PRIMARIES: Chromaticities = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06, *_D65)
# By the codes of ITU-T H.273, table 2. Those that are left out are sRGB's, or so near that players do not tell them
# apart.
PRIMARIES: dict[int, Chromaticities] = {
    4: (0.67, 0.33, 0.21, 0.71, 0.14, 0.08, 0.310, 0.316),
    8: (0.681, 0.319, 0.243, 0.692, 0.145, 0.049, 0.310, 0.316),
    9: (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, *_D65),
    11: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.314, 0.351),
    12: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, *_D65),
}
BT2020 = 9
# By the codes of table 3. All other curves are shown on the screens that sRGB is shown on, and so keep their numbers.
PQ, HLG = 16, 18
_GAMMAS: dict[int, float] = {8: 1.0, 17: 2.6}
# ITU-R BT.2408: the light of white paper in a picture with bright light, and the brightest light when no one says it.
_WHITE_NITS, PEAK_NITS = 203.0, 1000.0
# Light below this part of white keeps its place; what is brighter shares the rest.
_KNEE = 0.75
# The numbers that a curve is kept for; a step is far below one of 255.
_STEPS = 2**16
# Pixels that are converted at a time: some 20 MB.
_BAND_PIXELS = 2**19
# Bradford's: from XYZ to what the eye adapts (ICC.1:2022, annex E).
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


@dataclass(frozen=True, slots=True)
class Encoding:
    """What the numbers of a picture mean.

    ``transfer`` is a code of table 3 of ITU-T H.273, or the exponent that makes light of a number. ``peak_nits`` is
    the brightest light of a picture in PQ or HLG.
    """

    primaries: Chromaticities = SRGB_PRIMARIES
    transfer: int | float = 13
    peak_nits: float = PEAK_NITS

    @classmethod
    def of_codes(cls, primaries: int, transfer: int, peak_nits: float = PEAK_NITS) -> Encoding:
        """The encoding of these codes of ITU-T H.273, tables 2 and 3. Bright light is in BT.2020 when none is named."""
        if transfer in (PQ, HLG) and primaries not in PRIMARIES and primaries != 1:
            primaries = BT2020
        known = PRIMARIES.get(primaries, SRGB_PRIMARIES)
        return cls(known, _GAMMAS.get(transfer, transfer if transfer in (PQ, HLG) else 13), peak_nits)

    @property
    def is_srgb(self) -> bool:
        return self.primaries == SRGB_PRIMARIES and self.transfer == 13

    @property
    def is_bright(self) -> bool:
        """Whether there may be more light than an ordinary screen has."""
        return self.transfer in (PQ, HLG)


def to_srgb(pixels: DeepArray, encoding: Encoding) -> UInt8Array:
    """Pixels (h, w, 3) uint8 RGB in sRGB of pixels (h, w, 3) uint8 or uint16 RGB of full range in another encoding."""
    height, width = pixels.shape[:2]
    rows = max(1, _BAND_PIXELS // width)
    out = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, rows):
        out[top : top + rows] = _band_to_srgb(pixels[top : top + rows], encoding)
    return out


def _band_to_srgb(pixels: DeepArray, encoding: Encoding) -> UInt8Array:
    light = _light_of(encoding.transfer, int(np.iinfo(pixels.dtype).max) + 1)[pixels]
    if encoding.transfer == HLG:  # from the light of the scene to that of the screen; ITU-R BT.2100, table 5
        luminance = light @ np.array([0.2627, 0.6780, 0.0593], np.float32)
        light *= (np.maximum(luminance, 1e-6) ** 0.2)[..., None] * np.float32(PEAK_NITS / _WHITE_NITS)
    if encoding.is_bright:
        light *= _compression(light.max(axis=-1), max(encoding.peak_nits / _WHITE_NITS, 1.0))[..., None]
    light = light @ _to_srgb_primaries(encoding.primaries).T
    steps = (light.clip(0, 1) * (_STEPS - 1) + np.float32(0.5)).astype(np.uint16)
    return _srgb_of_light()[steps]


def _compression(brightest: Floats, peak: float) -> Floats:
    """The factor (h, w) for light whose brightest primary is ``brightest``, so that ``peak`` times white becomes white.

    Up to the knee nothing changes. Above it, x / (1 + a x) goes on with the same slope, as in ffmpeg's
    ``vf_tonemap.c: mobius``.
    """
    if peak <= 1:
        return np.ones_like(brightest)
    above = np.maximum(brightest - np.float32(_KNEE), 0)
    a = np.float32(1 / (1 - _KNEE) - 1 / (peak - _KNEE))
    return np.where(above > 0, (_KNEE + above / (1 + a * above)) / np.maximum(brightest, 1e-6), 1).astype(np.float32)


@lru_cache(8)
def _light_of(transfer: float, num_steps: int) -> Floats:
    """The light of each number, where white is 1; for HLG, the light of the scene."""
    number = np.linspace(0, 1, num_steps)
    if transfer == PQ:  # SMPTE ST 2084
        root = number ** (1 / 78.84375)
        light = (
            10000
            / _WHITE_NITS
            * (np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (1 / 0.1593017578125)
        )
    elif transfer == HLG:  # ITU-R BT.2100, table 5
        light = np.where(number <= 0.5, number**2 / 3, (np.exp((number - 0.55991073) / 0.17883277) + 0.28466892) / 12)
    elif transfer == 13:  # IEC 61966-2-1
        light = np.where(number <= 0.04045, number / 12.92, ((number + 0.055) / 1.055) ** 2.4)
    else:
        light = number**transfer
    return light.astype(np.float32)


@lru_cache(1)
def _srgb_of_light() -> UInt8Array:
    light = np.linspace(0, 1, _STEPS)
    number = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (255 * number + 0.5).astype(np.uint8)


@lru_cache(8)
def _to_srgb_primaries(primaries: Chromaticities) -> Floats:
    """The matrix (3, 3) from light of these primaries to light of sRGB's; white stays white."""
    here, there = _to_xyz(primaries), _to_xyz(SRGB_PRIMARIES)
    whites = _BRADFORD @ here.sum(axis=1), _BRADFORD @ there.sum(axis=1)
    adapted = np.linalg.inv(_BRADFORD) @ np.diag(whites[1] / whites[0]) @ _BRADFORD @ here
    return cast(Floats, (np.linalg.inv(there) @ adapted).astype(np.float32))


def _to_xyz(primaries: Chromaticities) -> npt.NDArray[np.float64]:
    """Raises numpy's LinAlgError for primaries that make no colours."""
    xy = np.array(primaries, np.float64).reshape(4, 2).T
    xyz = np.stack([xy[0], xy[1], 1 - xy[0] - xy[1]]) / xy[1]
    return cast(npt.NDArray[np.float64], xyz[:, :3] * np.linalg.solve(xyz[:, :3], xyz[:, 3]))

"""Forward and inverse kinematics of the right arm with its roll joints at zero, in closed form.

The ViperX is then a waist and a planar arm of three links. Dimensions: vx300s_right.xml of gym-aloha
0.1.5. The full six-joint inverse crosses the wrist's singularity, where forearm roll and wrist flip by
half a turn from scene to scene; with the rolls at zero every tip position has one smooth answer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_BASE = np.array([0.469, 0.5])  # the waist's axis; the base is turned by 180 degrees
_SHOULDER_HEIGHT = 0.079 + 0.04805
_UPPER = np.array([0.05955, 0.3])  # shoulder to elbow: forward, up (m)
_FOREARM = 0.3
_HAND = 0.069744 + 0.135  # wrist to the tip between the fingers


def tip_of(arm: NDArray[np.float64]) -> NDArray[np.float64]:
    """Tip in the world, float64 [..., 3] (m), of joints [..., 6] (rad), rolls taken as 0."""
    waist, shoulder, elbow, wrist = arm[..., 0], arm[..., 1], arm[..., 2], arm[..., 4]
    sin, cos = np.sin(shoulder), np.cos(shoulder)
    forearm, pitch = shoulder + elbow, shoulder + elbow + wrist
    reach = _UPPER[0] * cos + _UPPER[1] * sin + _FOREARM * np.cos(forearm) + _HAND * np.cos(pitch)
    height = _UPPER[1] * cos - _UPPER[0] * sin - _FOREARM * np.sin(forearm) - _HAND * np.sin(pitch)
    return np.stack(
        [
            _BASE[0] - reach * np.cos(waist),
            _BASE[1] - reach * np.sin(waist),
            _SHOULDER_HEIGHT + height,
        ],
        axis=-1,
    )


def arm_to(tip: NDArray[np.float64], pitch: float | NDArray[np.float64]) -> NDArray[np.float64]:
    """Joints, float64 [..., 6] (rad), that put the tip at ``tip`` [..., 3] (m) with the hand's pitch given.

    pitch: of the hand below the horizontal (rad); pi/2 points straight down. Where the wrist is out of
    reach the arm is stretched towards it.
    """
    x, y = _BASE[0] - tip[..., 0], _BASE[1] - tip[..., 1]
    waist = np.arctan2(y, x)
    forward = np.hypot(x, y) - _HAND * np.cos(pitch)
    up = tip[..., 2] - _SHOULDER_HEIGHT + _HAND * np.sin(pitch)
    upper = np.hypot(*_UPPER)
    distance = np.clip(np.hypot(forward, up), abs(upper - _FOREARM) + 1e-6, upper + _FOREARM - 1e-6)
    # Law of cosines; of the two answers the one with the elbow up.
    at_shoulder = np.arccos(np.clip((upper**2 + distance**2 - _FOREARM**2) / (2 * upper * distance), -1, 1))
    at_elbow = np.arccos(np.clip((upper**2 + _FOREARM**2 - distance**2) / (2 * upper * _FOREARM), -1, 1))
    upper_elevation = np.arctan2(up, forward) + at_shoulder
    forearm_elevation = upper_elevation - (np.pi - at_elbow)
    shoulder = np.arctan2(_UPPER[1], _UPPER[0]) - upper_elevation
    elbow = -forearm_elevation - shoulder
    wrist = pitch - shoulder - elbow
    zero = np.zeros_like(waist)
    return np.stack([waist, shoulder, elbow, zero, wrist, zero], axis=-1)

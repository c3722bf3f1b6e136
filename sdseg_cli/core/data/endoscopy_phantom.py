"""Endoscopy-like pictures: polyps on a folded, wet, unevenly lit wall.

The wall is a height field lit from the camera. A polyp is told by four signs together: it stands out with a
steep rim, its surface has a pit pattern, its hue is shifted, and its vessels stop at the rim. Each sign also
occurs alone: smooth bulges, flat patches of the same hues, foam with a texture, folds with steep edges.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from sdseg_cli.core.data.shapes import Shape, fill, smooth_field, star_outline, stroke, wandering_line


@dataclass
class _Scene:
    """What is drawn so far; ``unit`` pixels are the shorter side, lengths are fractions of it."""

    rng: np.random.Generator
    shape: Shape
    unit: int
    height: np.ndarray  # float32, (H, W): the wall's relief towards the camera
    albedo: np.ndarray  # float32, (H, W, 3), about [0, 1]
    wetness: np.ndarray  # float32, (H, W), [0, 1]: how much of the light is mirrored

    def field(self, cells: float) -> np.ndarray:
        return smooth_field(self.rng, self.shape, cells)

    def soften(self, picture: np.ndarray, length: float) -> np.ndarray:
        return ndimage.gaussian_filter(picture.astype(np.float32), length * self.unit, truncate=3)

    def tint(self, weight: np.ndarray, colour: tuple[float, float, float]) -> None:
        """Multiply the albedo by ``colour`` where ``weight`` is 1."""
        self.albedo *= 1 + weight[..., None] * (np.array(colour, np.float32) - 1)


def draw_endoscopy(rng: np.random.Generator, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Draw one picture.

    Args:
        rng: source of every draw.
        shape: (height, width) in pixels.

    Returns:
        The image, uint8, (H, W, 3), and the label map, uint8, (H, W): 1 on the polyps, of which there is at
        least one.
    """
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    y, x = (y - shape[0] / 2) / min(shape), (x - shape[1] / 2) / min(shape)
    mucosa = np.array([rng.uniform(0.72, 0.9), rng.uniform(0.36, 0.52), rng.uniform(0.26, 0.42)], np.float32)
    scene = _Scene(
        rng,
        shape,
        min(shape),
        np.zeros(shape, np.float32),
        np.broadcast_to(mucosa, (*shape, 3)).copy(),
        np.ones(shape, np.float32),
    )
    window = _window(rng, x, y)
    inset = _inset(rng, shape)
    hidden = (window < 0.5) | (inset > 0)
    lumen = _lumen(scene, x, y)
    _wall(scene)
    polyps = _outlines(rng, int(rng.choice([1, 2, 3], p=[0.74, 0.2, 0.06])), hidden)
    mask = np.zeros(shape, bool)
    for outline, centre, _ in polyps:
        mask |= fill(shape, [outline], centre)
    _decoys(scene)
    _vessels(scene, mask)
    for outline, centre, radius in polyps:
        _polyp(scene, fill(shape, [outline], centre), radius)
    # A polyp stands nearer than the wall behind it, so that less of its light is lost.
    light = _light(scene, lumen * (1 - 0.75 * scene.soften(mask, 0.01)), x, y)
    image = _camera(scene, light)
    image = image * window[..., None] + 0.02 * (1 - window[..., None])
    image[inset == 1] = (0.05, 0.16, 0.11)
    image[inset == 2] = (0.2, 0.75, 0.35)
    return (image * 255 + 0.5).astype(np.uint8), (mask & ~hidden).astype(np.uint8)


def _outlines(
    rng: np.random.Generator, count: int, hidden: np.ndarray
) -> list[tuple[np.ndarray, tuple[float, float], float]]:
    """Outline, centre and radius of each polyp; the first is the largest, all centres are in sight."""
    outlines: list[tuple[np.ndarray, tuple[float, float], float]] = []
    for number in range(count):
        radius = float(np.exp(rng.uniform(np.log(0.13), np.log(0.3)))) * (1 if number == 0 else 0.6)
        outline = star_outline(
            rng,
            radius,
            elongation=float(rng.uniform(1, 1.7)),
            roughness=float(rng.uniform(0.03, 0.16)),
            smoothness=1.8,
        )
        low, high = (0.08, 0.92) if rng.random() < 0.2 else (0.24, 0.76)
        # Tries for a place beside the others; a polyp that finds none is left out, but for the first.
        for _ in range(8):
            centre = (float(rng.uniform(low, high)), float(rng.uniform(low, high)))
            row, column = (int(part * side) for part, side in zip(centre[::-1], hidden.shape, strict=True))
            apart = (
                np.hypot(centre[0] - u, centre[1] - v) > 1.4 * (radius + size) for _, (u, v), size in outlines
            )
            if not hidden[row, column] and all(apart):
                outlines.append((outline, centre, radius))
                break
        else:
            if number == 0:
                outlines.append((outline, (0.5, 0.5), radius))
    return outlines


def _lumen(scene: _Scene, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Lay the folds around the dark end of the tube; returns the light lost to depth, (H, W), [0, 1]."""
    rng = scene.rng
    angle, reach = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.75)
    away_x, away_y = x - reach * np.cos(angle), y - reach * np.sin(angle)
    squash, turn = rng.uniform(0.6, 1), rng.uniform(0, np.pi)
    along = away_x * np.cos(turn) + away_y * np.sin(turn)
    across = (-away_x * np.sin(turn) + away_y * np.cos(turn)) * squash
    distance = np.sqrt(along**2 + across**2) + 1e-3
    distance = distance * (1 + 0.12 * scene.field(3))
    # Folds are rings, closer together with depth; each is steep on the side of the lumen.
    phase = rng.uniform(3, 6) * np.log(distance + 0.15) + 0.35 * scene.field(4) + rng.uniform(0, 6)
    ridge = np.exp(2.5 * (np.sin(2 * phase + 0.6 * np.sin(2 * phase)) - 1))
    present = np.clip(scene.field(3) * 0.6 + rng.uniform(-0.2, 0.8), 0, 1)
    scene.height += 0.08 * rng.uniform(0.3, 1.2) * ridge * present * np.clip(distance * 2, 0.3, 1)
    return np.exp(-((distance / rng.uniform(0.12, 0.4)) ** 1.7)) * rng.uniform(0.7, 0.97)


def _wall(scene: _Scene) -> None:
    """Waves, fine relief and mottling of the mucosa."""
    rng = scene.rng
    scene.height += 0.05 * scene.field(2.5) + 0.012 * scene.field(7) + 0.0018 * scene.field(22)
    redness = scene.field(4) * rng.uniform(0.03, 0.1) + scene.field(14) * 0.03 + scene.field(48) * 0.02
    scene.tint(redness, (1.15, 0.35, 0.4))
    scene.albedo *= 1 + 0.05 * scene.field(3)[..., None]


def _decoys(scene: _Scene) -> None:
    """Each sign of a polyp alone: bulges without texture, flat coloured patches, foam."""
    rng = scene.rng
    for _ in range(rng.integers(1, 4)):
        outline = star_outline(rng, float(rng.uniform(0.08, 0.24)), elongation=float(rng.uniform(1, 2.2)))
        patch = fill(scene.shape, [outline], (float(rng.uniform(0, 1)), float(rng.uniform(0, 1))))
        kind = rng.choice(["bulge", "red", "pale", "mucus"], p=[0.35, 0.25, 0.2, 0.2])
        soft = scene.soften(patch, float(rng.uniform(0.02, 0.04)))
        if kind == "bulge":
            scene.height += 0.12 * scene.soften(soft, 0.04)
        elif kind == "mucus":
            foam = np.clip(soft * 1.6 - 0.3 + 0.25 * scene.field(10), 0, 1)
            bubbles = np.abs(scene.field(30))
            scene.tint(foam, (1.06, 1.45, 1.05))
            scene.height += 0.006 * foam * bubbles
        else:
            scene.tint(soft * rng.uniform(0.5, 1), (0.92, 0.55, 0.6) if kind == "red" else (1.1, 1.45, 1.5))


def _vessels(scene: _Scene, polyps: np.ndarray) -> None:
    """A net of fine dark red lines that the polyps interrupt."""
    rng = scene.rng
    strength = rng.uniform(0, 0.8)
    net = np.zeros(scene.shape, np.float32)
    for _ in range(rng.integers(2, 6)):
        centre = (float(rng.uniform(0, 1)), float(rng.uniform(0, 1)))
        trunk = wandering_line(rng, rng.uniform(0.3, 0.8), 3)
        twigs = [
            trunk[rng.integers(len(trunk))] + wandering_line(rng, rng.uniform(0.08, 0.3), 3)
            for _ in range(rng.integers(2, 6))
        ]
        net = np.maximum(net, stroke(scene.shape, [trunk], 0.009, centre))
        net = np.maximum(net, 0.7 * stroke(scene.shape, twigs, 0.004, centre))
    scene.tint(scene.soften(net * ~polyps, 0.004) * strength, (0.75, 0.4, 0.45))


def _polyp(scene: _Scene, mask: np.ndarray, radius: float) -> None:
    """Raise a dome with a steep rim, a pit pattern and another hue."""
    rng = scene.rng
    inside = ndimage.distance_transform_edt(mask).astype(np.float32) / scene.unit
    depth = np.clip(inside / (radius * rng.uniform(0.5, 0.9)), 0, 1)
    # A dome that is steepest near its foot, but nowhere a cliff.
    dome = scene.soften(np.sqrt(1 - (1 - depth) ** 2), 0.09 * radius)
    scene.height *= 1 - 0.7 * depth
    scene.height += radius * rng.uniform(0.25, 0.5) * dome
    scene.height += depth * (0.02 * radius / 0.2 * scene.field(7))
    soft = scene.soften(mask, 0.006)
    # Pits and gyri: the level lines of a smooth field.
    pits = np.cos(rng.uniform(2.2, 3.2) * scene.field(rng.uniform(16, 28)))
    strength = rng.uniform(0.35, 0.85)
    scene.height += 0.0022 * pits * depth * strength
    scene.tint(soft * (0.5 + 0.5 * pits) * strength, (0.86, 0.68, 0.74))
    hues = [(1.0, 0.72, 0.86), (1.06, 1.2, 1.28), (0.86, 0.74, 0.92), (1.0, 0.98, 1.16)]
    scene.tint(soft * rng.uniform(0.6, 1), hues[rng.integers(len(hues))])
    # The dome throws a soft shadow around its foot.
    shadow = scene.soften(mask, 0.03) * (1 - soft)
    scene.albedo *= 1 - 0.55 * shadow[..., None] * rng.uniform(0.4, 1)


def _light(scene: _Scene, lumen: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Light the relief from two lamps beside the lens: (diffuse, mirrored), both (H, W)."""
    rng = scene.rng
    slope_y, slope_x = np.gradient(scene.height * scene.unit)
    length = np.sqrt(slope_x**2 + slope_y**2 + 1)
    diffuse = np.zeros(scene.shape, np.float32)
    mirrored = np.zeros(scene.shape, np.float32)
    turn = rng.uniform(0, 2 * np.pi)
    offset = rng.uniform(0.25, 0.6)
    for side, power in ((1, 0.62), (-1, 0.38)):
        to_lamp_x = side * offset * np.cos(turn) - x * 0.7
        to_lamp_y = side * offset * np.sin(turn) - y * 0.7
        to_lamp = np.sqrt(to_lamp_x**2 + to_lamp_y**2 + 1)
        cosine = np.clip((1 - slope_x * to_lamp_x - slope_y * to_lamp_y) / (length * to_lamp), 0, 1)
        # Halfway between the lamp and the eye, which looks straight down.
        half_z = 1 + to_lamp
        half = np.sqrt(to_lamp_x**2 + to_lamp_y**2 + half_z**2)
        mirror = np.clip((half_z - slope_x * to_lamp_x - slope_y * to_lamp_y) / (length * half), 0, 1)
        # A third of the light has bounced around the tube and comes from everywhere.
        diffuse += power * (0.33 + 0.67 * cosine)
        mirrored += power * mirror ** rng.uniform(25, 90)
    vignette = 1 - rng.uniform(0.25, 0.7) * (x**2 + y**2)
    gradient = 1 + rng.uniform(0, 0.35) * (x * np.cos(turn) + y * np.sin(turn)) * 1.5
    falloff = np.clip(vignette * gradient, 0.05, None) * (1 - lumen)
    return diffuse * falloff, mirrored * falloff * scene.wetness


def _camera(scene: _Scene, light: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Expose, blur and add noise; returns float32, (H, W, 3), [0, 1]."""
    rng = scene.rng
    diffuse, mirrored = light
    # Wet films are uneven: only some of the places that face the lamps glare.
    glare = np.clip(
        (mirrored + 0.12 * scene.field(12) + 0.06 * scene.field(40) - rng.uniform(0.6, 0.9)) * 6, 0, 1
    )
    picture = scene.albedo * diffuse[..., None] * rng.uniform(1.05, 1.4)
    picture += glare[..., None] * np.array([0.85, 0.85, 0.88], np.float32)
    picture *= np.array([1, rng.uniform(0.93, 1.08), rng.uniform(0.88, 1.12)], np.float32)
    sharpness = rng.uniform(0.0015, 0.004) * scene.unit
    picture = ndimage.gaussian_filter(picture, (sharpness, sharpness, 0), truncate=3)
    picture = np.clip(picture, 0, None) ** np.float32(rng.uniform(0.8, 1.0))
    picture += rng.standard_normal((*scene.shape, 3), dtype=np.float32) * rng.uniform(0.006, 0.018)
    return np.clip(picture / (1 + np.clip(picture - 0.9, 0, None)), 0, 1)


def _window(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """What the eyepiece lets through: 1 inside, 0 in its cut corners; float32, (H, W)."""
    if rng.random() < 0.55:
        return np.ones_like(x)
    cut = rng.uniform(0.76, 0.92)
    # Each axis as a fraction of its own length, so that all four corners are cut alike.
    wide, high = np.abs(x) / (2 * np.abs(x).max()), np.abs(y) / (2 * np.abs(y).max())
    return np.clip((cut - (wide + high)) * min(x.shape) / 2, 0, 1).astype(np.float32)


def _inset(rng: np.random.Generator, shape: Shape) -> np.ndarray:
    """Draw the navigation picture in the lower left corner: 0 none, 1 its ground, 2 the drawn tube."""
    inset = np.zeros(shape, np.uint8)
    if rng.random() < 0.18:
        top, right = int(shape[0] * rng.uniform(0.68, 0.76)), int(shape[1] * rng.uniform(0.22, 0.32))
        inset[top:, :right] = 1
        inset[(inset == 1) & stroke(shape, [wandering_line(rng, 0.2, 8)], 0.02, (0.12, 0.86))] = 2
    return inset

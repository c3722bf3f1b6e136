"""CT-like slices through an upper abdomen: three organs among neighbours of the same brightness.

Grey value tells none of the organs. The liver-like one is large and shows vessels; the kidney-like ones are
beans with a bright cortex, beside the spine; the spleen-like one is a plain crescent at the wall. Stomach,
bowel and muscle are as bright and touch them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy import ndimage

from sdseg_cli.core.data.shapes import (
    Shape,
    fill,
    rotated,
    smooth_field,
    star_outline,
    stroke,
    wandering_line,
)

ORGANS = ("liver-like", "kidney-like", "spleen-like")
LIVER, KIDNEY, SPLEEN = 1, 2, 3


@dataclass
class _Slice:
    """What is drawn so far.

    Body coordinates: (0, 0) is the middle, (1, 0) the left flank, (0, 1) the back.
    """

    rng: np.random.Generator
    shape: Shape
    axes: tuple[float, float]  # the body's half width and half height, fractions of the shorter side
    centre: tuple[float, float]
    tissue: float  # grey of soft tissue, the same for all organs up to a small shift
    grey: np.ndarray = field(init=False)  # float32, (H, W), about [0, 1]
    labels: np.ndarray = field(init=False)  # uint8, (H, W)
    cavity: np.ndarray = field(init=False)  # bool, (H, W): inside the abdominal wall

    def __post_init__(self) -> None:
        self.grey = np.full(self.shape, 0.02, np.float32)
        self.labels = np.zeros(self.shape, np.uint8)
        self.cavity = np.ones(self.shape, bool)

    def region(self, *outlines: np.ndarray, at: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
        """Fill outlines given in body coordinates, moved to ``at``."""
        return fill(self.shape, [(outline + at) * self.axes for outline in outlines], self.centre)

    def blob(self, radius: float, *, elongation: float = 1.0, roughness: float = 0.15) -> np.ndarray:
        """Draw a random outline in body coordinates that is round in the picture but for ``elongation``."""
        outline = star_outline(self.rng, radius, elongation=elongation, roughness=roughness)
        return outline * (self.axes[1] / self.axes[0], 1.0)

    def near(self, x: float, y: float, jitter: float = 0.05) -> tuple[float, float]:
        dx, dy = self.rng.normal(0, jitter, 2).clip(-2 * jitter, 2 * jitter)
        return x + float(dx), y + float(dy)

    def organ_grey(self) -> float:
        return self.tissue + float(self.rng.normal(0, 0.025))

    def paint(self, mask: np.ndarray, grey: float | np.ndarray, label: int = 0) -> None:
        self.grey[mask] = grey if isinstance(grey, float) else grey[mask]
        self.labels[mask] = label


def draw_organs(rng: np.random.Generator, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Draw one slice.

    Args:
        rng: source of every draw.
        shape: (height, width) in pixels.

    Returns:
        The image, uint8, (H, W, 3), three equal channels, and the label map, uint8, (H, W): 1, 2 and 3 are
        the :data:`ORGANS`. Now and then one of them is missing.
    """
    wide = rng.uniform(0.46, 0.54) * min(1.15, shape[1] / min(shape))
    axes = (float(wide), float(wide * rng.uniform(0.7, 0.84)))
    centre = (float(rng.uniform(0.48, 0.52)), float(rng.uniform(0.47, 0.53)))
    body = _Slice(rng, shape, axes, centre, float(rng.uniform(0.5, 0.62)))
    _wall(body)
    _bowel(body)
    _stomach(body)
    missing = rng.choice([0, LIVER, KIDNEY, SPLEEN], p=[0.88, 0.02, 0.05, 0.05])
    if missing != SPLEEN:
        _spleen(body)
    if missing != LIVER:
        _liver(body)
    _great_vessels(body)
    if missing != KIDNEY:
        _kidneys(body)
    _spine(body)
    return _scan(body), body.labels


def _wall(body: _Slice) -> None:
    """Skin, fat, a ring of muscle with ribs in it, and the fat of the cavity."""
    rng = body.rng
    outer = star_outline(rng, 1.0, roughness=0.03, smoothness=1)
    fat = rng.uniform(0.18, 0.34)
    thickness = rng.uniform(0.03, 0.08)
    inner = outer * (1 - thickness)
    body.paint(body.region(outer * 1.015), body.tissue - 0.05)
    body.paint(body.region(outer * 0.995), fat)
    body.paint(body.region(inner), body.tissue - 0.03)
    depth = rng.uniform(0.86, 0.9)
    body.paint(body.region(inner * depth), fat + 0.03)
    # A thin layer of fat stays between the wall and whatever lies in the cavity.
    body.cavity = body.region(inner * (depth - 0.025))
    count = int(rng.integers(8, 13))
    for angle in np.linspace(0, 2 * np.pi, count, endpoint=False) + rng.uniform(0, 1):
        at = np.array([np.cos(angle), np.sin(angle)]) * (1 - thickness) * 0.945
        rib = rotated(star_outline(rng, 1, roughness=0) * 0.02 * (1.0, 2.4), angle)
        body.paint(body.region(rib, at=(float(at[0]), float(at[1]))), float(rng.uniform(0.8, 1)))
    # The muscles beside the spine.
    for side in (-1, 1):
        muscle = body.region(body.blob(0.17, elongation=1.4), at=(side * 0.27, 0.8))
        body.paint(muscle, body.tissue - 0.02)


def _bowel(body: _Slice) -> None:
    """Loops with a bright wall and a content of fluid, contrast agent or gas: brightness of every organ."""
    rng = body.rng
    for _ in range(rng.integers(12, 20)):
        at = (float(rng.uniform(-0.7, 0.7)), float(rng.uniform(-0.7, 0.5)))
        outline = body.blob(float(rng.uniform(0.1, 0.18)), elongation=float(rng.uniform(1, 2.2)))
        body.paint(body.region(outline, at=at) & body.cavity, body.organ_grey() + 0.05)
        content = rng.choice([body.tissue, 0.42, 0.9, 0.03], p=[0.55, 0.25, 0.1, 0.1])
        body.paint(body.region(outline * 0.72, at=at) & body.cavity, float(content))


def _stomach(body: _Slice) -> None:
    rng = body.rng
    at = body.near(0.28, -0.4)
    outline = body.blob(float(rng.uniform(0.28, 0.38)), elongation=1.5, roughness=0.14)
    body.paint(body.region(outline, at=at) & body.cavity, body.tissue + 0.06)
    inside = body.region(outline * 0.88, at=at) & body.cavity
    body.paint(inside, body.organ_grey())
    if rng.random() < 0.6:  # gas rises to the front
        rows = np.arange(body.shape[0])[:, None] / min(body.shape)
        level = (
            body.centre[1] * body.shape[0] / min(body.shape) + (at[1] - rng.uniform(0.02, 0.2)) * body.axes[1]
        )
        body.paint(inside & (rows < level), 0.02)


def _spleen(body: _Slice) -> None:
    """A plain crescent along the wall at the left of the back."""
    rng = body.rng
    middle, reach = rng.uniform(0.05, 0.5), rng.uniform(0.45, 0.75)
    angle = np.linspace(middle - reach, middle + reach, 40)
    taper = np.sqrt(np.clip(1 - ((angle - middle) / reach) ** 2, 0, 1))
    outer = np.full(40, 0.87)
    inner = outer - rng.uniform(0.2, 0.33) * taper * (1 + 0.15 * np.sin(3 * angle + rng.uniform(0, 6)))
    radius = np.concatenate([outer, inner[::-1]])
    turn = np.concatenate([angle, angle[::-1]])
    outline = np.stack([radius * np.cos(turn), radius * np.sin(turn)], axis=1)
    body.paint(body.region(outline) & body.cavity, body.organ_grey(), SPLEEN)


def _liver(body: _Slice) -> None:
    """The large organ at the right (left in the picture), with dark and bright vessels."""
    rng = body.rng
    main = body.blob(float(rng.uniform(0.3, 0.4)), elongation=1.25, roughness=0.1)
    lobe = body.blob(float(rng.uniform(0.16, 0.22)), elongation=1.6, roughness=0.12)
    at, beside = body.near(-0.52, -0.1), (rng.uniform(0.2, 0.4), -rng.uniform(0.2, 0.35))
    mask = body.region(main, lobe + np.array(beside), at=at) & body.cavity
    texture = body.organ_grey() + 0.012 * smooth_field(rng, body.shape, 45)
    tree = np.zeros(body.shape, np.float32)
    for _ in range(rng.integers(4, 8)):
        start = np.array(at) * body.axes + rng.normal(0, 0.07, 2)
        line = wandering_line(rng, float(rng.uniform(0.15, 0.35)), 2) + start
        tree = np.maximum(tree, stroke(body.shape, [line], float(rng.uniform(0.008, 0.018)), body.centre))
    texture += rng.choice([-1, 1]) * rng.uniform(0.06, 0.1) * tree
    body.paint(mask, texture.astype(np.float32), LIVER)


def _great_vessels(body: _Slice) -> None:
    rng = body.rng
    bright = float(rng.uniform(0, 0.2))
    for x, y, radius in ((0.1, 0.36, 0.075), (-0.14, 0.33, 0.085)):
        outline = body.blob(radius, elongation=float(rng.uniform(1, 1.3)), roughness=0.03)
        body.paint(body.region(outline, at=body.near(x, y, 0.02)), body.tissue + bright)


def _kidneys(body: _Slice) -> None:
    """One or two beans beside the spine; the cortex is brighter than the marrow, the hilus is fat."""
    rng = body.rng
    sides = [(-1,), (1,), (-1, 1)][rng.choice(3, p=[0.12, 0.12, 0.76])]
    contrast = float(rng.uniform(0.05, 0.14))
    for side in sides:
        at = body.near(side * 0.44, 0.47, 0.04)
        length, breadth = rng.uniform(0.19, 0.25), rng.uniform(0.12, 0.155)
        angle = np.linspace(0, 2 * np.pi, 80, endpoint=False)
        # A bean: an ellipse with a dent on the side of the spine.
        dent = 1 - rng.uniform(0.35, 0.6) * np.exp(-((np.angle(np.exp(1j * (angle - np.pi))) / 0.5) ** 2))
        bean = np.stack([breadth * np.cos(angle), length * np.sin(angle)], axis=1) * dent[:, None]
        bean = rotated(bean * (side, 1), side * rng.uniform(-0.2, 0.6))
        mask = body.region(bean, at=at)
        body.paint(mask, body.organ_grey() + contrast, KIDNEY)
        pyramids = smooth_field(rng, body.shape, 22) > -0.1
        body.grey[body.region(bean * 0.74, at=at) & pyramids] -= contrast * 1.2
        sinus = body.region(bean * (0.3, 0.38), at=(at[0] - side * 0.05, at[1]))
        body.paint(sinus & mask, 0.28, KIDNEY)


def _spine(body: _Slice) -> None:
    rng = body.rng
    x, y = body.near(0, 0.58, 0.015)
    parts = [
        (body.blob(0.17, elongation=1.1, roughness=0.03), (x, y), 0.78),
        (rotated(body.blob(0.07, elongation=1.0, roughness=0.03) * (0.6, 2.0), 0), (x, y + 0.36), 0.85),
        (body.blob(0.1, roughness=0.05) * (2.2, 0.55), (x, y + 0.26), 0.85),
        (body.blob(0.07, roughness=0.03), (x, y + 0.2), body.tissue - 0.08),
    ]
    for outline, at, grey in parts:
        body.paint(body.region(outline, at=at), grey)
    spongy = body.region(parts[0][0] * 0.86, at=(x, y))
    body.grey[spongy] = 0.66 + 0.05 * smooth_field(rng, body.shape, 40)[spongy]


def _scan(body: _Slice) -> np.ndarray:
    """Blur, uneven gain, noise and the display window; returns uint8, (H, W, 3)."""
    rng = body.rng
    unit = min(body.shape)
    grey = ndimage.gaussian_filter(body.grey, rng.uniform(0.0025, 0.005) * unit, truncate=3)
    gain = 1 + 0.03 * smooth_field(rng, body.shape, 2)
    noise = ndimage.gaussian_filter(
        rng.standard_normal(body.shape, dtype=np.float32), 0.004 * unit, truncate=3
    )
    noise *= rng.uniform(0.015, 0.04) / max(float(noise.std()), 1e-6)
    low, high = rng.uniform(-0.05, 0.1), rng.uniform(0.88, 1.05)
    window = np.clip((grey * gain + noise - low) / (high - low), 0, 1)
    return np.repeat((window * 255 + 0.5).astype(np.uint8)[..., None], 3, axis=2)

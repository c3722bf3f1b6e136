"""The one-page report: pictures, figures and curves in a single HTML file that asks the network for nothing.

Everything a page shows is text or numbers handed in by the caller; names are escaped by the template. The
page is readable without its script, which sorts and filters the case table and moves the sliders; the browser
is told the script's hash and runs no other.
"""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import numpy as np
from PIL import Image

LayerKind = Literal["prediction", "truth", "uncertainty"]


@dataclass(frozen=True)
class Figure:
    """A headline number: ``label`` above, ``value`` large, ``detail`` below."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Step:
    """One command that was run, and how long it took."""

    name: str
    command: str
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Layer:
    """A picture with transparency over the image; all layers of a ``kind`` share one opacity slider."""

    kind: LayerKind
    source: str


@dataclass(frozen=True)
class Stage:
    """The image once, with layers on it."""

    caption: str
    layers: tuple[Layer, ...] = ()


@dataclass(frozen=True)
class SliceView:
    """One slice (or one run) of a case.

    ``image`` is a ``data:`` address, held once however many stages show it; ``width`` and ``height`` are the
    proportions it is shown in; ``name`` is what the slider says, such as "slice 12".
    """

    name: str
    image: str
    width: int
    height: int
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class GalleryCase:
    """One case with its pictures; ``badge`` tells why it is shown (worst, middle, best).

    Several ``views`` get a slider that begins at number ``first``.
    """

    title: str
    badge: str
    score: str
    views: tuple[SliceView, ...]
    first: int = 0


@dataclass(frozen=True)
class Picture:
    """A wide picture with a section of its own; ``source`` is a ``data:`` address."""

    title: str
    caption: str
    source: str


@dataclass(frozen=True)
class Chart:
    """A drawing with a title and one sentence on what it shows.

    ``legend`` tells its curves apart: names with classes of the style sheet, as ``charts.line_legend`` gives.
    """

    title: str
    caption: str
    svg: str
    legend: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Table:
    """A table of text; the first column holds the names of the rows."""

    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class CaseTable:
    """One plain row a case, to be sorted by any column and filtered by text and by one number.

    ``limit_column`` is the index of the column that the number bounds from above; None leaves it out.
    """

    title: str
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    limit_column: int | None = None


@dataclass(frozen=True)
class Page:
    """All that one page shows, top to bottom."""

    title: str
    lead: str
    figures: tuple[Figure, ...] = ()
    steps: tuple[Step, ...] = ()
    pictures: tuple[Picture, ...] = ()
    gallery: tuple[GalleryCase, ...] = ()
    gallery_title: str = "Test cases"
    gallery_note: str = ""
    legend: tuple[tuple[str, str], ...] = ()
    charts: tuple[Chart, ...] = ()
    charts_title: str = "Curves"
    convergence: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    cases: CaseTable | None = None
    facts: tuple[tuple[str, str], ...] = ()
    recipes: tuple[tuple[str, str], ...] = ()  # (of what, YAML); the former is empty where only one can be
    footer: str = ""


def render_page(page: Page) -> str:
    """Render a page as one HTML document that needs no other file and no network."""
    import jinja2

    resource = resources.files("sdseg_cli").joinpath("resources")
    template = resource.joinpath("report.html.j2").read_text("utf-8")
    # Neither line ends nor blanks around it may differ between what is hashed and what the browser reads.
    script = resource.joinpath("report.js").read_text("utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["duration"] = format_duration
    kinds = [
        layer.kind
        for case in page.gallery
        for view in case.views
        for stage in view.stages
        for layer in stage.layers
    ]
    return environment.from_string(template).render(
        page=page,
        total_seconds=sum(step.seconds for step in page.steps),
        # A row of the case table leads to the pictures of its case, where it has some.
        anchors={case.title: f"case-{number}" for number, case in enumerate(page.gallery, start=1)},
        kinds=list(dict.fromkeys(kinds)),
        script=script,
        script_hash=digest,
    )


def webp_source(image: np.ndarray, *, longest: int = 320, quality: int = 82) -> str:
    """Encode a picture as a ``data:`` address.

    Args:
        image: uint8, (height, width, 3) or (height, width).
        longest: pictures with a longer side are scaled down to it, in pixels.
        quality: of the WebP encoder, 0 to 100.

    Returns:
        ``data:image/webp;base64,...``
    """
    picture = Image.fromarray(np.ascontiguousarray(image)).convert("RGB")
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return _address(picture, quality=quality)


def layer_source(layer: np.ndarray, *, longest: int = 320) -> str:
    """Encode a layer with transparency as a ``data:`` address, without loss: masks stay sharp and small.

    Args:
        layer: uint8, (height, width, 4).
        longest: layers with a longer side are scaled down to it, in pixels.

    Returns:
        ``data:image/webp;base64,...``
    """
    picture = Image.fromarray(np.ascontiguousarray(layer), "RGBA")
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return _address(picture, lossless=True)


def _address(picture: Image.Image, **options: Any) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", method=4, **options)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def heat_map(values: np.ndarray, *, highest: float) -> np.ndarray:
    """Colour a map from dark violet (0) over red to pale yellow (``highest``).

    Args:
        values: float, (height, width).
        highest: the value of the brightest colour; larger ones are clipped.

    Returns:
        uint8, (height, width, 3).
    """
    level = np.clip(np.nan_to_num(values) / max(highest, 1e-12), 0.0, 1.0)
    stops = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    colours = np.array([[14, 11, 34], [88, 24, 105], [186, 54, 85], [248, 134, 44], [252, 246, 190]], float)
    channels = [np.interp(level, stops, colours[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)


def format_duration(seconds: float) -> str:
    """Seconds as people say them: ``8.4 s``, ``42 s``, ``3 min 05 s``, ``1 h 02 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"

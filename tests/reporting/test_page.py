"""The report page: one file, nothing fetched, every name escaped, charts that survive odd numbers."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from sdseg_cli.core.reporting.page import (
    Chart,
    DotRow,
    Figure,
    GalleryCase,
    Page,
    Panel,
    Picture,
    Series,
    Step,
    Table,
    dot_plot,
    format_duration,
    heat_map,
    line_chart,
    render_page,
    webp_source,
)

HOSTILE = "<script>alert('x')</script>\"&"
VOID = {"meta", "img", "br", "link"}


class Reader(HTMLParser):
    """Collects tags and attributes and checks that every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def hostile_page() -> Page:
    chart = line_chart(
        [Series(HOSTILE, [0, 1], [0.1, 0.2])], x_label=HOSTILE, y_label=HOSTILE, description=HOSTILE
    )
    dots = dot_plot([DotRow(HOSTILE, [0.5], 0.5)], x_label=HOSTILE, description=HOSTILE)
    source = webp_source(np.zeros((8, 8, 3), np.uint8))
    return Page(
        title=HOSTILE,
        lead=HOSTILE,
        figures=(Figure(HOSTILE, HOSTILE, HOSTILE),),
        steps=(Step(HOSTILE, HOSTILE, 1.0, HOSTILE),),
        gallery=(GalleryCase(HOSTILE, HOSTILE, HOSTILE, (Panel(HOSTILE, source),)),),
        pictures=(Picture(HOSTILE, HOSTILE, source),),
        gallery_note=HOSTILE,
        legend=((HOSTILE, "#fff"),),
        charts=(Chart(HOSTILE, HOSTILE, chart), Chart(HOSTILE, HOSTILE, dots)),
        tables=(Table(HOSTILE, HOSTILE, (HOSTILE, HOSTILE), ((HOSTILE, HOSTILE),)),),
        facts=((HOSTILE, HOSTILE),),
        recipe=HOSTILE,
        footer=HOSTILE,
    )


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    return reader


def test_every_name_is_escaped_wherever_it_is_shown():
    html = render_page(hostile_page())
    assert "<script" not in html
    assert "script" not in read(html).tags
    assert html.count("&lt;script&gt;") > 20


def test_the_page_asks_the_network_for_nothing():
    html = render_page(hostile_page())
    assert all(address.startswith("data:image/webp;base64,") for address in read(html).addresses)
    assert not re.search(r"https?:|url\(|@import", html)
    assert "default-src 'none'" in html


def test_the_page_follows_dark_mode_small_screens_and_print():
    html = render_page(hostile_page())
    for rule in ("prefers-color-scheme: dark", "max-width: 620px", "@media print", "width=device-width"):
        assert rule in html


def test_an_empty_page_shows_its_title_and_no_empty_sections():
    reader = read(render_page(Page(title="Nothing yet", lead="")))
    assert "h1" in reader.tags
    assert "section" not in reader.tags


def test_a_step_that_took_no_time_does_not_break_the_bar():
    assert "0.0 s in all" in render_page(Page(title="t", lead="", steps=(Step("a", "b", 0.0),)))


def test_a_picture_becomes_webp_and_is_scaled_down_not_up():
    for shape, expected in (((40, 20, 3), (20, 40)), ((640, 320), (160, 320))):
        source = webp_source(np.full(shape, 100, np.uint8), longest=320)
        picture = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/webp;base64,"))))
        assert (picture.format, picture.size) == ("WEBP", expected)


def test_the_heat_map_runs_from_dark_to_light_and_clips():
    colours = heat_map(np.array([[0.0, 0.25, 0.5, 9.0, math.nan]]), highest=0.5)
    assert colours.shape == (1, 5, 3)
    brightness = colours.astype(int).sum(axis=-1)[0]
    assert brightness[0] < brightness[1] < brightness[2] == brightness[3]
    assert brightness[4] == brightness[0]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (8.44, "8.4 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3725, "1 h 02 min"),
    ],
)
def test_durations_read_as_people_say_them(seconds, text):
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("x", "y"),
    [
        ([], []),
        ([1], [0.5]),
        ([1, 2], [3.0, 3.0]),
        ([1, 2, 3], [math.nan, 1e-9, math.inf]),
        ([0, 1], [-4, 9e9]),
    ],
)
def test_curves_of_odd_numbers_are_still_valid_svg(x, y):
    svg = line_chart([Series("loss", x, y, marks=True)], x_label="step", y_label="loss", description="d")
    ElementTree.fromstring(svg)  # noqa: S314  (our own drawing)
    assert "nan" not in svg
    assert "inf" not in svg


def test_a_long_curve_is_thinned_to_what_can_be_seen():
    svg = line_chart(
        [Series("loss", range(100_000), [1.0] * 100_000)], x_label="step", y_label="loss", description="d"
    )
    (points,) = re.findall(r'points="([^"]*)"', svg)
    assert len(points.split()) == 160


def test_a_scatter_has_dots_and_no_line():
    svg = line_chart(
        [Series("cases", [0, 1, 2], [0, 1, 0], marks=True, line=False)],
        x_label="x",
        y_label="y",
        description="d",
    )
    assert svg.count("<circle") == 3
    assert "<polyline" not in svg


def test_a_dot_plot_shows_one_dot_a_case_and_its_mean():
    rows = [DotRow("sdseg", [0.9, 1.0, math.nan], 0.95, (0.9, 1.0)), DotRow("none", [], math.nan)]
    svg = dot_plot(rows, x_label="Dice", description="d")
    root = ElementTree.fromstring(svg)  # noqa: S314  (our own drawing)
    assert len(root.findall("circle")) == 2
    labels = [text.text for text in root.findall("text") if text.get("class") == "label"]
    assert labels == ["sdseg: 0.950", "none: none"]

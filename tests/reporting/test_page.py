"""The report page: one file, nothing fetched, every name escaped, charts that survive odd numbers."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from sdseg_cli.core.reporting.charts import (
    CHART_WIDTH,
    DotRow,
    Series,
    dot_plot,
    line_chart,
    line_legend,
    reliability_plot,
)
from sdseg_cli.core.reporting.page import (
    CaseTable,
    Chart,
    Figure,
    GalleryCase,
    Layer,
    Page,
    Picture,
    SliceView,
    Stage,
    Step,
    Table,
    format_duration,
    heat_map,
    layer_source,
    render_page,
    webp_source,
)

HOSTILE = "<script>alert('x')</script>\"&"
VOID = {"meta", "img", "br", "link", "input"}


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
    curve = reliability_plot([(HOSTILE, [(0.1, 0.2, 5)]), (HOSTILE, [])], description=HOSTILE)
    source = webp_source(np.zeros((8, 8, 3), np.uint8))
    layer = Layer("prediction", layer_source(np.zeros((8, 8, 4), np.uint8)))
    view = SliceView(HOSTILE, source, 8, 8, (Stage(HOSTILE), Stage(HOSTILE, (layer,))))
    return Page(
        title=HOSTILE,
        lead=HOSTILE,
        figures=(Figure(HOSTILE, HOSTILE, HOSTILE),),
        steps=(Step(HOSTILE, HOSTILE, 1.0, HOSTILE),),
        gallery=(GalleryCase(HOSTILE, HOSTILE, HOSTILE, (view, view), 1),),
        gallery_title=HOSTILE,
        charts_title=HOSTILE,
        cases=CaseTable(HOSTILE, HOSTILE, (HOSTILE, HOSTILE), ((HOSTILE, HOSTILE * 3),), limit_column=1),
        pictures=(Picture(HOSTILE, HOSTILE, source),),
        gallery_note=HOSTILE,
        legend=((HOSTILE, "#fff"),),
        charts=tuple(Chart(HOSTILE, HOSTILE, drawing) for drawing in (chart, dots, curve)),
        convergence=(Chart(HOSTILE, HOSTILE, chart, ((HOSTILE, "c0"),)),),
        tables=(Table(HOSTILE, HOSTILE, (HOSTILE, HOSTILE), ((HOSTILE, HOSTILE),)),),
        facts=((HOSTILE, HOSTILE),),
        recipes=((HOSTILE, HOSTILE), ("", HOSTILE), ("none", "")),
        footer=HOSTILE,
    )


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    return reader


def test_every_name_is_escaped_wherever_it_is_shown():
    html = render_page(hostile_page())
    assert html.count("<script") == 1  # our own
    assert read(html).tags.count("script") == 1
    assert "alert(" not in re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1]
    assert html.count("&lt;script&gt;") > 30
    assert html.count("<details") == 2  # no recipe, no details


def test_no_script_runs_but_the_one_whose_hash_the_page_names():
    html = render_page(hostile_page())
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html
    assert not re.search(r"\son\w+=", html)


def test_the_page_asks_the_network_for_nothing():
    html = render_page(hostile_page())
    for address in read(html).addresses:
        assert re.match(r"data:image/webp;base64,|data:,$|#case-", address)
    assert not re.search(r"https?:|url\((?!data:)|@import", html)
    assert "default-src 'none'" in html


def test_the_image_of_a_slice_is_held_once_however_many_stages_show_it():
    source = webp_source(np.full((8, 8, 3), 77, np.uint8))
    view = SliceView("slice 0", source, 8, 8, (Stage("image"), Stage("prediction"), Stage("uncertainty")))
    html = render_page(Page("t", "", gallery=(GalleryCase("a", "worst", "Dice 1", (view,)),)))
    assert html.count(source) == 1


def test_a_thousand_cases_make_a_small_page():
    rows = tuple((f"case-{number:04d}", "0.912", "0.845", "0.9", "3.1", "scored") for number in range(1000))
    table = CaseTable("All", "", ("case", "Dice", "IoU", "recall", "HD95", "outcome"), rows, limit_column=1)
    dots = dot_plot([DotRow("polyp", [0.9] * 1000, 0.9)], x_label="Dice", description="d")
    html = render_page(Page("t", "", charts=(Chart("Dice", "", dots),), cases=table))
    assert len(html) < 300_000
    assert dots.count("<circle") == 0
    assert dots.count("<rect") == 1  # one bar: all are equal


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


def test_curves_of_one_name_share_a_colour_and_those_beyond_the_colours_are_dashed():
    names = ["a", "b", "b", *"cdefghij"]
    lines = [Series(name, [0, 1], [0, 1]) for name in names]
    tones = dict(line_legend(lines))
    assert list(tones) == list("abcdefghij")
    assert (tones["b"], tones["h"], tones["i"]) == ("c1", "c0 d1", "c1 d1")
    svg = line_chart(lines, x_label="x", y_label="y", description="d")
    assert svg.count('class="curve c1"') == 2
    assert svg.count('class="curve c0 d1"') == 1
    html = render_page(Page("t", "", charts=(Chart("", "", svg, line_legend(lines)),)))
    classes = {one for tone in tones.values() for one in tone.split()}
    assert all(re.search(rf"svg \.{one} {{ (--tone|stroke)", html) for one in classes)
    key = r'<line class="curve c0 d1"[^>]*/></svg>h</span>'
    assert len(re.findall(key, html)) == 1


def test_the_last_number_of_an_axis_and_the_score_of_a_long_name_are_not_cut_off():
    svg = line_chart([Series("a", [0, 10_000], [0, 1])], x_label="x", y_label="y", description="d")
    at = re.search(r'x="([\d.]+)" y="[\d.]+" text-anchor="middle">10000<', svg)[1]
    assert float(at) + 5 * 3.5 <= CHART_WIDTH  # half of five digits of 7 units
    dots = dot_plot([DotRow("long <name> " * 20, [0.9], 0.9)], x_label="Dice", description="d")
    assert re.search(r"long &lt;name&gt; long[^<]*…: 0.900</text>", dots)
    assert f"<title>{'long &lt;name&gt; ' * 20}</title>" in dots


def test_a_dot_plot_shows_one_dot_a_case_and_its_mean():
    rows = [DotRow("sdseg", [0.9, 1.0, math.nan], 0.95, (0.9, 1.0)), DotRow("none", [], math.nan)]
    svg = dot_plot(rows, x_label="Dice", description="d")
    root = ElementTree.fromstring(svg)  # noqa: S314  (our own drawing)
    assert len(root.findall("circle")) == 2
    labels = [text.text for text in root.findall("text") if text.get("class") == "label"]
    assert labels == ["sdseg: 0.950", "none: none"]

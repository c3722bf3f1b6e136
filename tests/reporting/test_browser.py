"""The report page in a real browser: no console error, no request, and every control does its work."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from sdseg_cli.core.engine.report_parts import slice_view
from sdseg_cli.core.reporting.charts import DotRow, Series, dot_plot, line_chart, line_legend
from sdseg_cli.core.reporting.page import CaseTable, Chart, Figure, GalleryCase, Page, render_page

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (dependency group dev)")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser on PATH (looked for {', '.join(NAMES)})")

QUIET = "--no-first-run --disable-gpu --disable-quic --disable-background-networking"
QUIET += " --disable-component-update --disable-sync --disable-extensions"
HOSTILE = "<img src=x onerror=document.title='hit'>\"'&</script><script>document.title='hit'</script>"


@pytest.fixture(scope="module")
def browser():
    # A container's root has no sandbox to give.
    options = [*QUIET.split(), *(["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else [])]
    with api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=BROWSER, args=options)
        yield launched
        launched.close()


def example() -> Page:
    """A page with a case of five slices, one with a hostile name, and 40 rows."""

    def view(number: int):
        mask = np.zeros((24, 32), np.uint8)
        mask[4 : 8 + number, 6:20] = 1
        image = np.full((24, 32, 3), 60 + 20 * number, np.uint8)
        return slice_view(f"slice {number}", image, mask, truth=mask, uncertainty=mask / 4)

    rows = [(f"case-{number:02d}", f"{number / 40:.3f}", f"{number % 7}.5", "scored") for number in range(37)]
    rows += [
        (HOSTILE, "0.950", "∞", "missed"),
        ("empty", "–", "–", "absent"),
        ("last", "1.000", "12.5", "scored"),
    ]
    dots = dot_plot([DotRow("polyp", [0.1, 0.9], 0.5, (0.2, 0.8))], x_label="Dice", description="Dice")
    lines = [Series(name, [1, 2], [0.1, 0.2 * number]) for number, name in enumerate(("a", HOSTILE), 1)]
    curves = line_chart(lines, x_label="step", y_label="Dice", description="Dice")
    return Page(
        title="Report",
        lead=HOSTILE,
        figures=(Figure("Dice", "0.9"), Figure("IoU", "0.8")),
        gallery=(
            GalleryCase("case-03", "worst", "Dice 0.1", tuple(map(view, range(5))), first=2),
            GalleryCase(HOSTILE, "best", "Dice 1", (view(0),)),
        ),
        legend=(("polyp", "rgb(56, 190, 255)"),),
        charts=(Chart("Dice", "", dots),),
        convergence=(Chart("Dice by step", "", curves, line_legend(lines)),),
        cases=CaseTable("All cases", "", ("case", "Dice", "HD95", "outcome"), tuple(rows), limit_column=1),
        facts=(("Model", HOSTILE),),
    )


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_page(example()), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def page(browser, address):
    """The page, freshly opened; what it says on the console and what it asks for must be nothing."""
    context = browser.new_context(viewport={"width": 900, "height": 700})
    opened = context.new_page()
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on(
        "request", lambda request: said.append(request.url) if not request.url.startswith("data:") else None
    )
    opened.goto(address)
    yield opened
    assert [text for text in said if text != address] == []
    context.close()


def column(page, number: int) -> list[str]:
    return page.eval_on_selector_all(
        f"#cases tbody tr:not([hidden]) > :nth-child({number})",
        "cells => cells.map(cell => cell.textContent)",
    )


def set_slider(page, selector: str, value: int) -> None:
    page.eval_on_selector(
        selector,
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')) }",
        value,
    )


def test_a_hostile_name_is_text_and_nothing_else(page):
    assert page.title() == "Report"
    assert page.locator("h3", has_text="onerror").first.text_content() == HOSTILE
    assert HOSTILE in column(page, 1)
    assert page.locator("script").count() == 1
    assert page.locator("img[src=x]").count() == 0


def test_a_header_sorts_by_number_up_and_down_and_what_has_no_value_stays_last(page):
    header = page.locator("#cases th button", has_text="HD95")
    header.click()
    values = column(page, 3)
    assert values[-2:] == ["∞", "–"]
    assert [float(value) for value in values[:-2]] == sorted(float(value) for value in values[:-2])
    assert page.locator("#cases th[aria-sort=ascending]").text_content() == "HD95"
    header.click()
    assert column(page, 3)[0] == "∞"
    assert column(page, 3)[-1] == "–"
    page.locator("#cases th button", has_text="case").click()
    assert page.locator("#cases th[aria-sort]").count() == 1
    assert column(page, 1)[1:4] == ["case-00", "case-01", "case-02"]


def test_the_table_is_sorted_from_the_keyboard(page):
    page.locator("#cases th button", has_text="Dice").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Space")
    assert column(page, 2)[0] == "1.000"


def test_rows_are_filtered_by_text_and_by_a_threshold(page):
    count = page.locator("#cases output")
    assert count.text_content() == "40 of 40"
    page.fill("[data-find]", "CASE-1")
    assert column(page, 1) == [f"case-1{digit}" for digit in range(10)]
    page.fill("[data-limit]", "0.3")
    assert column(page, 1) == ["case-10", "case-11", "case-12"]
    assert count.text_content() == "3 of 40"
    page.fill("[data-find]", "")
    page.fill("[data-limit]", "")
    assert len(column(page, 1)) == 40


def test_a_row_leads_to_the_pictures_of_its_case(page):
    page.locator("#cases a", has_text="case-03").click()
    assert page.evaluate("location.hash") == "#case-1"


def test_the_opacity_sliders_fade_their_layers_and_no_others(page):
    def opacity(kind: str) -> str:
        return page.eval_on_selector(f"img.layer.{kind}", "layer => getComputedStyle(layer).opacity")

    assert [opacity(kind) for kind in ("prediction", "truth", "uncertainty")] == ["1", "1", "1"]
    set_slider(page, "input[data-layer=prediction]", 25)
    set_slider(page, "input[data-layer=uncertainty]", 0)
    assert [opacity(kind) for kind in ("prediction", "truth", "uncertainty")] == ["0.25", "1", "0"]
    assert page.locator("input[data-layer=prediction] + output").text_content() == "25 %"


def test_the_slice_slider_shows_one_slice_and_begins_at_the_worst(page):
    def shown() -> list[str]:
        return page.eval_on_selector_all(
            "#case-1 .view:not([hidden])", "views => views.map(v => v.dataset.name)"
        )

    assert shown() == ["slice 2"]
    slider = page.locator("#case-1 input[data-views]")
    slider.focus()
    page.keyboard.press("ArrowRight")
    assert shown() == ["slice 3"]
    assert slider.get_attribute("aria-valuetext") == "slice 3"
    set_slider(page, "#case-1 input[data-views]", 0)
    assert shown() == ["slice 0"]
    assert page.locator("#case-2 input[data-views]").count() == 0


def test_curves_and_their_legend_follow_light_and_dark(page):
    def seen(selector: str, of: str) -> list[str]:
        return page.eval_on_selector_all(selector, f"found => found.map(one => getComputedStyle(one).{of})")

    assert page.locator(".chart .legend span").all_text_contents() == ["a", HOSTILE]
    for scheme, tones, card, ink in (
        ("light", ["rgb(11, 122, 111)", "rgb(109, 79, 196)"], "rgb(255, 255, 255)", "rgb(86, 101, 98)"),
        ("dark", ["rgb(76, 201, 184)", "rgb(164, 139, 240)"], "rgb(21, 29, 28)", "rgb(148, 166, 162)"),
    ):
        page.emulate_media(color_scheme=scheme)
        assert seen(".chart > svg .curve", "stroke") == tones
        assert seen(".chart .key .curve", "stroke") == tones
        assert {*seen(".chart > svg .tick", "fill")} == {ink}
        assert {*seen(".chart", "backgroundColor")} == {card}
        assert {*seen(".chart > svg", "backgroundColor")} == {"rgba(0, 0, 0, 0)"}


def test_the_page_can_be_read_without_scripts_in_the_dark_and_on_a_phone(browser, address):
    context = browser.new_context(
        java_script_enabled=False, color_scheme="dark", viewport={"width": 390, "height": 800}
    )
    opened = context.new_page()
    opened.goto(address)
    assert opened.locator("#case-1 .view").filter(visible=True).count() == 5
    assert opened.locator("input").filter(visible=True).count() == 0
    assert opened.locator("#cases tbody tr").filter(visible=True).count() == 40
    wide = opened.locator("html").evaluate("element => element.scrollWidth")
    assert wide <= 390
    assert opened.locator("body").evaluate("b => getComputedStyle(b).backgroundColor") == "rgb(13, 19, 18)"
    context.close()


def test_print_shows_every_row_and_no_controls(page):
    page.emulate_media(media="print")
    assert page.locator("input").filter(visible=True).count() == 0
    height = page.eval_on_selector("#cases .scroll", "box => box.scrollHeight - box.clientHeight")
    assert height <= 1
    assert len(page.pdf()) > 10_000

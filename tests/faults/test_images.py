"""Rows 5 to 8, 23 and 25: pictures of every kind and in every state, through ``sdseg predict``."""

from __future__ import annotations

import os
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from sdseg_cli.core.data.images import make_upright, read_image, read_label_map


def picture(height: int = 24, width: int = 40, level: int = 255) -> np.ndarray:
    """Bright on the left half, black on the right; uint8 (H, W)."""
    pixels = np.zeros((height, width), np.uint8)
    pixels[:, : width // 2] = level
    return pixels


def is_left_half(mask: np.ndarray) -> bool:
    """Whether the foreground is the left half, up to the pixels beside the edge."""
    middle = mask.shape[1] // 2
    return bool(mask[:, : middle - 2].all()) and not mask[:, middle + 2 :].any()


def damaged(folder, suffix: str) -> dict[str, str]:
    """Files of one format, broken in every way of row 5: name -> what must be said."""
    whole = folder / f"whole.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(whole)
    content = whole.read_bytes()
    whole.unlink()
    (folder / f"empty.{suffix}").write_bytes(b"")
    (folder / f"half.{suffix}").write_bytes(content[: len(content) // 2])
    (folder / f"text.{suffix}").write_text("no picture")
    other = "bmp" if suffix != "bmp" else "png"
    Image.fromarray(noise).save(folder / f"other.{suffix}", format=other.upper())
    return {
        f"empty.{suffix}": "the file is empty (0 bytes). Fetch it again or leave it out",
        f"half.{suffix}": f"cannot be decoded as {suffix.upper()}",
        f"text.{suffix}": f"cannot be decoded as {suffix.upper()}",
        f"other.{suffix}": f"the name says {suffix.upper()}, the content is {other.upper()}. Rename it to",
    }


@pytest.mark.faults(5)
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp"])
def test_broken_pictures_fail_by_name_and_the_others_go_on(suffix, predict, scans, outcomes, written):
    expected = damaged(scans, suffix)
    Image.fromarray(picture()).save(scans / "good.png")
    ended = predict()
    assert ended.code == 3
    for name, reason in expected.items():
        assert ended.says(f"{name}: {reason}")
        assert outcomes()[name][0] == "failed"
        assert outcomes()[name][1].startswith(reason)
    assert ended.says("1 of 5 images done", "4 failed")
    assert outcomes()["good.png"] == ("done", "")
    assert written() == {"good.png"}


@pytest.mark.faults(4)
def test_pictures_that_claim_to_be_huge_are_refused_by_their_header(predict, scans, outcomes, monkeypatch):
    allocate, allocated = ImageFile.ImageFile.load_prepare, []

    def noted(raster):
        allocated.append(raster.size)
        allocate(raster)

    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", noted)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 2_000_000, 2_000_000, 16, 2, 0, 0, 0)  # 24 TB
    rows = zlib.compress(bytes(100))
    png = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    (scans / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + png)
    bmp = struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 54, 0, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0)
    (scans / "huge.bmp").write_bytes(bmp)
    Image.fromarray(picture()).save(scans / "good.png")
    ended = predict()
    assert ended.code == 3
    for name in ("huge.png", "huge.bmp"):
        assert ended.says(
            f"{name}: too large (", "at most 89478485 pixels are read. Scale it down or cut it."
        )
        assert outcomes()[name][0] == "failed"
    assert outcomes()["good.png"][0] == "done"
    assert allocated == [(40, 24)]


@pytest.mark.faults(6)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_pictures_are_scaled_not_clipped_and_it_is_said(suffix, predict, scans, masks, outcomes):
    levels = np.full((24, 40), 1200, np.uint16)  # clipped to 255, both halves would be white
    levels[:, :20] = 4000
    Image.fromarray(levels).save(scans / f"a.{suffix}")
    ended = predict()
    assert ended.code == 0
    assert ended.says(f"1 x 16-bit scaled from [1200, 4000] (a.{suffix})")
    assert is_left_half(read_label_map(masks / "a.png", num_classes=2))


MODES = {
    "RGBA": "png", "P": "png", "PA": "tif", "CMYK": "tif", "CMYK of a printer": "jpg", "1": "png",
    "LA": "png", "LAB": "tif", "YCbCr": "jpg", "I;16": "png", "I": "tif", "F": "tif",
}  # fmt: skip


def in_mode(mode: str) -> Image.Image:
    """The picture of :func:`picture` in a mode of Pillow's."""
    grey = Image.fromarray(picture())
    colour = grey.convert("RGB")
    if mode.startswith("CMYK"):
        return colour.convert("CMYK")
    if mode == "LAB":
        from PIL import ImageCms

        to_lab = ImageCms.buildTransform(
            ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
        )
        changed = ImageCms.applyTransform(colour, to_lab)
        assert changed is not None
        return changed
    if mode == "PA":
        return colour.convert("P").convert("PA")
    if mode == "P":  # the bright colour has the lower index
        indexed = Image.fromarray((picture() == 0).astype(np.uint8)).convert("P")
        indexed.putpalette([250, 250, 250, 5, 5, 5])
        return indexed
    if mode in ("RGBA", "LA"):  # what cannot be seen is bright, and must not be found
        seen = grey.convert(mode)
        hidden = np.array(seen)
        hidden[:, 20:, :-1] = 255
        hidden[:, 20:, -1] = 0
        return Image.fromarray(hidden, mode)
    return grey.convert("I").convert(mode) if mode == "I;16" else grey.convert(mode)


@pytest.mark.faults(7)
def test_pictures_of_every_mode_are_converted_the_same_way(predict, scans, masks, outcomes):
    for mode, suffix in MODES.items():
        in_mode(mode).save(scans / f"{mode}.{suffix}".replace(";", ""))
    ended = predict()
    assert ended.code == 0, ended.err
    assert {status for status, _ in outcomes().values()} == {"done"}
    for mode in MODES:
        mask = read_label_map(masks / f"{mode}.png".replace(";", ""), num_classes=2)
        assert is_left_half(mask), mode
    assert ended.says("2 x transparent pixels laid over black")


@pytest.mark.faults(7)
@pytest.mark.parametrize("kind", ["P", "P with a transparent colour", "PA", "L", "LA", "1"])
def test_masks_keep_their_indices_whatever_their_palette_shows(kind, sdseg, tmp_path):
    """The palette's colours are ones whose brightness would give other classes."""
    from sdseg_cli.core.data.prepared import PreparedDataset

    several = kind != "1"
    labels = np.zeros((20, 30), np.uint8)
    labels[4:9, 4:12] = 1
    labels[12:17, 15:25] = 2 if several else 1
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    for index in range(3):
        Image.fromarray(np.full((20, 30, 3), 60 * index, np.uint8)).save(tmp_path / f"images/{index}.png")
        mask = Image.fromarray(labels)
        if kind.startswith("P"):
            mask = mask.convert("P")
            mask.putpalette([255, 255, 0, 0, 0, 0, 0, 128, 255])
        if kind == "PA":
            mask = mask.convert("PA")
        if kind == "LA":
            mask = Image.merge("LA", [mask, Image.fromarray(labels * 90)])
        if kind == "1":
            mask = Image.fromarray(labels * 255).convert("1")
        options = {"transparency": 0} if "transparent" in kind else {}
        mask.save(tmp_path / f"masks/{index}.{'tif' if kind == 'PA' else 'png'}", **options)
    ended = sdseg(
        *("prepare", "folder", "--images", tmp_path / "images", "--masks", tmp_path / "masks", "--size", 32),
        *("--classes", "liver,kidney" if several else "liver", "--out", tmp_path / "out", "--workers", 1),
        *("--fractions", "0.34,0.33,0.33"),
    )
    assert ended.code == 0, ended.err
    (item,) = PreparedDataset.open(tmp_path / "out").split("train")
    assert np.array_equal(item.label_map, labels)


@pytest.mark.faults(8)
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_masks_lie_on_the_stored_grid_with_the_tag_of_their_picture(suffix, predict, scans, masks):
    stored = np.zeros((24, 40), np.uint8)
    stored[:12, :10] = 255  # one corner, so that every orientation looks different
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(stored).save(scans / f"{orientation}.{suffix}", exif=exif)
    ended = predict()
    assert ended.code == 0
    assert ended.says("1 x EXIF orientation 8 applied")
    for orientation in range(1, 9):
        with Image.open(masks / f"{orientation}.png") as mask:
            assert mask.size == (40, 24)
            assert mask.getexif().get(274, 1) == orientation
            on_the_grid = np.asarray(mask) > 0
        # A viewer that knows the tag, and one that does not, lay the mask on the picture.
        assert (on_the_grid != (stored > 127)).mean() < 0.05
        upright = make_upright(stored, orientation) > 127
        found = read_label_map(masks / f"{orientation}.png", num_classes=2) > 0
        assert found.shape == upright.shape == read_image(scans / f"{orientation}.{suffix}").pixels.shape[:2]
        assert (found != upright).mean() < 0.05


NAMES = [
    " blanks in front and behind ", "naïve – 内視鏡 🩺", "x" * 251, "é" * 125, "new\nline", "quote\"s & <b>'",
    "-starts-like-an-option", "dots.in.it", "%s {0} $HOME `id`",
]  # fmt: skip


@pytest.mark.faults(23)
def test_odd_names_make_the_round_trip_into_masks_and_scores(
    predict, scans, masks, outcomes, sdseg, tmp_path
):
    truth = tmp_path / "truth"
    truth.mkdir()
    for name in NAMES:
        Image.fromarray(picture()).save(scans / f"{name}.png")
        Image.fromarray(picture()).save(truth / f"{name}.png")
    ended = predict("--overlay", "--report")
    assert ended.code == 0, ended.err
    assert {f"{name}.png" for name in NAMES} == set(outcomes())
    for name in NAMES:
        assert is_left_half(read_label_map(masks / f"{name}.png", num_classes=2))
        assert (masks / "overlays" / f"{name}.png").exists()
    for extra in ("summary.csv", "prediction.json", "report.html"):
        (masks / extra).rename(tmp_path / extra)
    shutil.rmtree(masks / "overlays")
    ended = sdseg("evaluate", "--predictions", masks, "--ground-truth", truth, "--out", tmp_path / "scores")
    assert ended.code == 0, ended.err
    scored = (tmp_path / "scores" / "cases.csv").read_text(encoding="utf-8")
    for name in NAMES:
        assert name.replace('"', '""') in scored


@pytest.mark.faults(23)
def test_names_that_differ_in_their_suffix_alone_are_never_written_over_each_other(
    predict, scans, written, masks
):
    for name, level in (("a.png", 255), ("a.jpg", 0), ("a.png.bmp", 255), ("x" * 251 + ".png", 0)):
        Image.fromarray(picture(level=level)).save(scans / name)
    Image.fromarray(picture()).save(scans / ("x" * 251 + ".jpg"))
    raw = os.fsdecode(b"caf\xe9.png")  # no UTF-8
    Image.fromarray(picture()).save(tmp := scans / "tmp.png")
    tmp.rename(scans / raw)
    ended = predict()
    assert ended.code == 0, ended.err
    assert len(written()) == 6
    assert {"a.png.png", "a.jpg.png", "a.png.bmp.png", raw} <= written()
    assert read_label_map(masks / "a.png.png").any()
    assert not read_label_map(masks / "a.jpg.png").any()
    assert all(len(os.fsencode(name)) <= 255 for name in written())


@pytest.mark.faults(25)
def test_files_that_vanish_change_or_appear_during_the_prediction(
    predict, scans, masks, predictor, outcomes, written, monkeypatch
):
    from sdseg_cli.core.engine import prediction

    for index in range(12):
        Image.fromarray(picture()).save(scans / f"{index:02}.png")

    def meddle(case_id: str) -> None:
        if case_id == "00":  # eight pictures are read ahead
            (scans / "11.png").unlink()
            Image.fromarray(picture()).save(scans / "late.png")

    original = prediction.read_image

    def changing(path):
        loaded = original(path)
        if path.name == "10.png":
            with path.open("ab") as file:
                file.write(b"still being copied")
        return loaded

    predictor.on_case = meddle
    monkeypatch.setattr(prediction, "read_image", changing)
    ended = predict()
    assert ended.code == 3
    assert ended.says(
        "11.png: the file is gone since the start.",
        "10.png: the file changed while it was read. Predict it again once it is complete.",
        "10 of 12 images done",
    )
    assert [outcomes()[f"{index:02}.png"][0] for index in range(12)] == ["done"] * 10 + ["failed"] * 2
    assert written() == {f"{index:02}.png" for index in range(10)}


@pytest.mark.faults(25)
def test_a_folder_that_vanishes_during_the_prediction_is_all_failed_cases(
    predict, scans, predictor, outcomes
):
    for index in range(20):
        Image.fromarray(picture()).save(scans / f"{index:02}.png")
    predictor.on_case = lambda case_id: shutil.rmtree(scans, ignore_errors=True)
    ended = predict()
    assert ended.code == 3
    assert ended.says("the file is gone since the start.")
    statuses = [status for status, _ in outcomes().values()]
    assert 1 <= statuses.count("done") < 20
    assert statuses.count("done") + statuses.count("failed") == 20

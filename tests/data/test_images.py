import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from sdseg_cli.core.data import images
from sdseg_cli.core.data.images import (
    lay_on_stored_grid,
    list_images,
    make_upright,
    read_image,
    read_label_map,
    write_label_map,
    write_png,
)
from sdseg_cli.core.errors import DataError

CORNERS = np.array([[0, 1, 2], [3, 4, 5]], np.uint8)


def save(path, array, mode=None, **options):
    picture = Image.fromarray(array)
    (picture if mode is None else picture.convert(mode)).save(path, **options)
    return path


def oriented(path, array, orientation, **options):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(array).save(path, exif=exif, **options)
    return path


def wide_png(path, pixels, colour_type):
    """Write 16-bit channels, which Pillow cannot; colour type 2 is RGB, 4 grey and alpha."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


# Images: modes and depths


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_colours_come_back_as_they_were_stored(tmp_path, suffix):
    colours = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    loaded = read_image(save(tmp_path / f"a.{suffix}", colours))
    assert np.array_equal(loaded.pixels, colours)
    assert (loaded.orientation, loaded.notes) == (1, ())


def test_grey_becomes_three_equal_channels(tmp_path):
    pixels = read_image(save(tmp_path / "a.png", CORNERS)).pixels
    assert pixels.shape == (2, 3, 3)
    assert np.array_equal(pixels[..., 0], CORNERS)
    assert np.array_equal(pixels[..., 2], CORNERS)


@pytest.mark.faults(7)
def test_one_bit_becomes_black_and_white(tmp_path):
    array = np.array([[0, 255], [255, 0]], np.uint8)
    assert np.array_equal(read_image(save(tmp_path / "a.png", array, "1")).pixels[..., 1], array)


@pytest.mark.faults(7)
def test_palette_becomes_its_colours(tmp_path):
    picture = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").pixels.tolist() == [[[10, 20, 30], [40, 50, 60]]]


@pytest.mark.faults(7)
def test_cmyk_becomes_rgb(tmp_path):
    ink = np.zeros((1, 2, 4), np.uint8)
    ink[0, 1] = (0, 255, 255, 0)
    Image.fromarray(ink, "CMYK").save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif").pixels.tolist() == [[[255, 255, 255], [255, 0, 0]]]


@pytest.mark.faults(7)
def test_transparent_pixels_are_laid_over_black_and_it_is_said(tmp_path):
    rgba = np.array([[[200, 100, 50, 255], [200, 100, 50, 0]]], np.uint8)
    loaded = read_image(save(tmp_path / "a.png", rgba))
    assert loaded.pixels.tolist() == [[[200, 100, 50], [0, 0, 0]]]
    assert loaded.notes == ("transparent pixels laid over black",)


def test_opaque_alpha_changes_nothing_and_says_nothing(tmp_path):
    grey_alpha = np.array([[[7, 255], [9, 255]]], np.uint8)
    loaded = read_image(save(tmp_path / "a.png", grey_alpha))
    assert loaded.pixels[..., 0].tolist() == [[7, 9]]
    assert loaded.notes == ()


@pytest.mark.faults(6)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_is_scaled_not_clipped_and_said(tmp_path, suffix):
    values = np.array([[1000, 2000], [3000, 5000]], np.uint16)
    loaded = read_image(save(tmp_path / f"a.{suffix}", values))
    assert loaded.pixels[..., 0].tolist() == [[0, 64], [128, 255]]
    assert loaded.notes == ("16-bit scaled from [1000, 5000]",)


@pytest.mark.faults
def test_a_constant_16_bit_image_is_black(tmp_path):
    assert read_image(save(tmp_path / "a.png", np.full((2, 2), 900, np.uint16))).pixels.max() == 0


@pytest.mark.faults
def test_16_bit_colour_in_tiff_keeps_its_precision(tmp_path):
    import tifffile

    values = np.zeros((1, 3, 3), np.uint16)
    values[0, :, 0] = (0, 50, 250)  # all of it within the low byte, which a cut to the high byte loses
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb")
    loaded = read_image(tmp_path / "a.tif")
    assert loaded.pixels[0, :, 0].tolist() == [0, 51, 255]
    assert loaded.notes == ("16-bit scaled from [0, 250]",)


@pytest.mark.faults(6)
def test_16_bit_colour_in_png_keeps_its_precision(tmp_path):
    colours = np.zeros((3, 1, 3), np.uint16)
    colours[:, 0, 0] = (0, 50, 250)
    loaded = read_image(wide_png(tmp_path / "a.png", colours, colour_type=2))
    assert loaded.pixels[:, 0, 0].tolist() == [0, 51, 255]
    assert loaded.notes == ("16-bit scaled from [0, 250]",)


@pytest.mark.faults(6)
def test_16_bit_grey_and_alpha_is_cut_to_the_high_byte_and_it_is_said(tmp_path):
    pixels = np.array([[[0x1234, 0xFFFF], [0xABCD, 0xFFFF]]], np.uint16)
    loaded = read_image(wide_png(tmp_path / "a.png", pixels, colour_type=4))
    assert loaded.pixels[0, :, 0].tolist() == [0x12, 0xAB]
    assert loaded.notes == ("16-bit colour read by its high byte (0..65535 to 0..255)",)


@pytest.mark.faults(6)
def test_16_bit_planes_one_after_another_are_refused_rather_than_read_as_noise(tmp_path):
    import tifffile

    tifffile.imwrite(
        tmp_path / "a.tif", np.ones((3, 4, 5), np.uint16), photometric="rgb", planarconfig="separate"
    )
    with pytest.raises(DataError, match=r"a\.tif: a TIFF of 16-bit channels in separate planes"):
        read_image(tmp_path / "a.tif")


def test_float_tiff_is_scaled(tmp_path):
    loaded = read_image(save(tmp_path / "a.tif", np.array([[-1.0, 0.0, 1.0]], np.float32)))
    assert loaded.pixels[0, :, 0].tolist() == [0, 128, 255]
    assert loaded.notes == ("float scaled from [-1, 1]",)


@pytest.mark.faults
def test_nan_in_a_float_tiff_is_refused_with_its_count(tmp_path):
    file = save(tmp_path / "a.tif", np.array([[np.nan, np.inf, 1.0]], np.float32))
    with pytest.raises(DataError, match=r"a\.tif: 2 of 3 pixels are NaN or infinite"):
        read_image(file)


# Orientation


@pytest.mark.faults
@pytest.mark.parametrize("orientation", range(1, 9))
def test_laying_on_the_stored_grid_is_the_inverse_of_making_upright(orientation):
    assert np.array_equal(lay_on_stored_grid(make_upright(CORNERS, orientation), orientation), CORNERS)


@pytest.mark.faults
def test_orientation_6_turns_the_picture_clockwise():
    assert make_upright(CORNERS, 6).tolist() == [[3, 0], [4, 1], [5, 2]]


@pytest.mark.faults(8)
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_exif_orientation_is_applied_once(tmp_path, orientation, suffix):
    file = oriented(tmp_path / f"a.{suffix}", CORNERS * 40, orientation)
    loaded = read_image(file)
    assert loaded.orientation == orientation
    assert np.array_equal(loaded.pixels[..., 0], make_upright(CORNERS * 40, orientation))


@pytest.mark.faults(8)
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("num_classes", [2, 7])
def test_a_mask_lies_like_its_image_in_every_viewer(tmp_path, orientation, num_classes):
    upright = make_upright(CORNERS, orientation) % num_classes
    write_label_map(tmp_path / "m.png", upright, num_classes, orientation=orientation)
    with Image.open(tmp_path / "m.png") as stored:
        assert stored.size == (3, 2)  # the grid of the stored image
        assert stored.getexif().get(274, 1) == orientation
    assert np.array_equal(read_label_map(tmp_path / "m.png", num_classes=num_classes), upright)


@pytest.mark.faults
def test_a_nonsense_orientation_tag_counts_as_upright(tmp_path):
    loaded = read_image(oriented(tmp_path / "a.png", CORNERS, 99))
    assert (loaded.orientation, loaded.pixels.shape) == (1, (2, 3, 3))


# Damaged files


@pytest.mark.faults(5)
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp"])
def test_an_empty_file_fails_by_name(tmp_path, suffix):
    file = tmp_path / f"a.{suffix}"
    file.touch()
    with pytest.raises(DataError, match=rf"a\.{suffix}: the file is empty \(0 bytes\)"):
        read_image(file)


@pytest.mark.faults(5)
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_a_cut_file_fails_by_name(tmp_path, suffix, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    file = save(tmp_path / f"a.{suffix}", noise)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match=rf"a\.{suffix}: cannot be decoded as {suffix.upper()}"):
        read_image(file)


@pytest.mark.faults(5)
def test_one_flipped_byte_in_a_png_is_noticed(tmp_path):
    file = save(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8))
    payload = bytearray(file.read_bytes())
    payload[len(payload) // 2] ^= 4
    file.write_bytes(payload)
    with pytest.raises(DataError, match=r"a\.png: cannot be decoded"):
        read_image(file)


@pytest.mark.faults(5)
def test_text_under_an_image_name_fails_by_name(tmp_path):
    (tmp_path / "a.png").write_text("not a picture")
    with pytest.raises(DataError, match=r"a\.png: cannot be decoded as PNG"):
        read_image(tmp_path / "a.png")


@pytest.mark.faults(5)
def test_a_mislabelled_file_fails_with_the_right_name(tmp_path):
    save(tmp_path / "a.jpg", CORNERS).rename(tmp_path / "a.png")
    expected = r"a\.png: the name says PNG, the content is JPEG. Rename it to a\.jpeg"
    with pytest.raises(DataError, match=expected):
        read_image(tmp_path / "a.png")


@pytest.mark.faults
def test_missing_files_and_folders_fail_by_name(tmp_path):
    with pytest.raises(DataError, match=r"gone\.png: no such file"):
        read_image(tmp_path / "gone.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(DataError, match=r"folder\.png: expected an image file"):
        read_image(tmp_path / "folder.png")


@pytest.mark.faults(4)
@pytest.mark.parametrize("side", [20_000, 60_000])
def test_a_header_that_claims_too_many_pixels_is_refused_before_decoding(tmp_path, side):
    buffer = io.BytesIO()
    Image.new("1", (8, 8)).save(buffer, "PNG")
    payload = bytearray(buffer.getvalue())
    payload[16:24] = struct.pack(">II", side, side)
    payload[29:33] = struct.pack(">I", zlib.crc32(payload[12:29]))
    (tmp_path / "a.png").write_bytes(payload)
    with pytest.raises(DataError, match=r"a\.png: too large .*at most 89478485 pixels"):
        read_image(tmp_path / "a.png")


@pytest.mark.faults
def test_a_stack_of_pages_is_refused(tmp_path):
    pages = [Image.fromarray(CORNERS) for _ in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(DataError, match=r"a\.tif: holds 3 pages of 3 x 2 pixels; expected a single image"):
        read_image(tmp_path / "a.tif")


def test_a_preview_page_is_left_alone_and_it_is_said(tmp_path):
    page = Image.fromarray(CORNERS)
    page.save(tmp_path / "a.tif", save_all=True, append_images=[page.resize((1, 1))])
    assert read_image(tmp_path / "a.tif").notes == ("2 pages, the first was read",)


# Label maps


@pytest.mark.faults(7)
def test_palette_masks_keep_their_indices(tmp_path):
    picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    picture.putpalette([0, 0, 0, 9, 9, 9, 255, 0, 0])
    picture.save(tmp_path / "m.png")
    assert read_label_map(tmp_path / "m.png", num_classes=3).tolist() == [[0, 1, 2]]


def test_with_a_threshold_every_palette_colour_but_the_first_is_foreground(tmp_path):
    picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    picture.putpalette([0, 0, 0, 9, 9, 9, 255, 0, 0])
    picture.save(tmp_path / "m.png")
    assert read_label_map(tmp_path / "m.png", threshold=127).tolist() == [[0, 1, 1]]


def test_a_palette_that_is_a_grey_ramp_counts_as_brightness(tmp_path):
    save(tmp_path / "m.png", np.array([[0, 3, 255]], np.uint8), "P")
    picture = Image.fromarray(np.array([[0, 3, 255]], np.uint8)).convert("P")
    picture.putpalette([level for level in range(256) for _ in range(3)])
    picture.save(tmp_path / "m.png")
    assert read_label_map(tmp_path / "m.png", threshold=127).tolist() == [[0, 0, 1]]


def test_a_jpeg_mask_is_noise_proof(tmp_path):
    mask = np.zeros((32, 32), np.uint8)
    mask[5:21, 7:23] = 255
    file = save(tmp_path / "m.jpg", np.stack([mask] * 3, -1), quality=60)
    assert len(np.unique(np.asarray(Image.open(file)))) > 2
    for options in ({"threshold": 127}, {"num_classes": 2}):
        assert np.array_equal(read_label_map(file, **options), mask // 255)


def test_an_empty_jpeg_mask_stays_empty_in_spite_of_noise(tmp_path):
    mask = np.zeros((16, 16), np.uint8)
    mask[0, 0] = 1
    assert read_label_map(save(tmp_path / "m.jpg", mask), num_classes=2).sum() == 0


@pytest.mark.faults
def test_a_jpeg_of_several_classes_is_refused(tmp_path):
    file = save(tmp_path / "m.jpg", CORNERS)
    with pytest.raises(DataError, match=r"m\.jpg: a JPEG cannot hold a label map of several classes"):
        read_label_map(file, num_classes=6)


@pytest.mark.parametrize("stored", [[0, 1, 1], [0, 255, 255], [3, 200, 255]])
def test_two_classes_are_read_from_any_two_greys(tmp_path, stored):
    file = save(tmp_path / "m.png", np.array([stored], np.uint8))
    assert read_label_map(file, num_classes=2).tolist() == [[0, 1, 1]]


def test_a_16_bit_mask_is_read_from_its_own_numbers(tmp_path):
    file = save(tmp_path / "m.png", np.array([[0, 2, 65535]], np.uint16))
    assert read_label_map(file, threshold=1).tolist() == [[0, 1, 1]]
    assert read_label_map(file, num_classes=2).tolist() == [[0, 0, 1]]


@pytest.mark.parametrize(
    "options", [{"num_classes": 2}, {"threshold": 127}, {"label_values": {0: 0, 255: 1}}]
)
def test_a_one_bit_mask_is_read_as_0_and_255(tmp_path, options):
    file = save(tmp_path / "m.png", np.array([[0, 255]], np.uint8), "1")
    assert read_label_map(file, **options).tolist() == [[0, 1]]


@pytest.mark.faults
def test_two_classes_refuse_numbers_that_mean_nothing(tmp_path):
    file = save(tmp_path / "m.png", np.array([[0, 2, 100]], np.uint8))
    with pytest.raises(DataError, match=r"m\.png: unexpected mask values 0, 2, 100; expected 0 and 1, or 0"):
        read_label_map(file, num_classes=2)


@pytest.mark.faults
@pytest.mark.parametrize("channels", [1, 3])
def test_two_classes_refuse_a_photograph_unless_a_threshold_is_given(tmp_path, channels):
    photograph = np.random.default_rng(0).integers(0, 256, (32, 32, channels), np.uint8)
    file = save(tmp_path / "m.png", photograph.squeeze())
    with pytest.raises(DataError, match=r"m\.png: looks like a picture, .*images and masks are not swapped"):
        read_label_map(file, num_classes=2)
    assert set(np.unique(read_label_map(file, threshold=127))) == {0, 1}


def test_a_mask_with_blurred_edges_is_no_photograph(tmp_path):
    ramp = np.concatenate([np.zeros(60), np.linspace(0, 255, 40), np.full(60, 255)]).astype(np.uint8)
    file = save(tmp_path / "m.png", np.tile(ramp, (20, 1)))
    assert read_label_map(file, num_classes=2).sum() == 20 * 80


@pytest.mark.faults
def test_unknown_classes_are_listed(tmp_path):
    file = save(tmp_path / "m.png", np.array([[0, 3, 9]], np.uint8))
    with pytest.raises(DataError, match=r"m\.png: unexpected mask values 3, 9; expected 0 to 2"):
        read_label_map(file, num_classes=3)
    with pytest.raises(DataError, match=r"m\.png: unexpected mask values 9; expected 0, 3"):
        read_label_map(file, label_values={0: 0, 3: 1})


def test_label_values_translate_stored_numbers(tmp_path):
    file = save(tmp_path / "m.png", np.array([[255, 128, 0]], np.uint8))
    assert read_label_map(file, label_values={255: 0, 128: 1, 0: 2}).tolist() == [[0, 1, 2]]


@pytest.mark.faults
def test_a_colour_picture_is_no_label_map(tmp_path):
    file = save(tmp_path / "m.png", np.arange(18, dtype=np.uint8).reshape(2, 3, 3))
    with pytest.raises(DataError, match=r"m\.png: the mask is a colour picture \(RGB\)"):
        read_label_map(file, num_classes=4)


def test_threshold_and_label_values_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="exclude each other"):
        read_label_map(tmp_path / "m.png", threshold=1, label_values={0: 0})


# Writing


def test_a_binary_map_is_written_as_0_and_255(tmp_path):
    write_label_map(tmp_path / "m.png", np.array([[0, 1]], np.uint8), 2)
    with Image.open(tmp_path / "m.png") as picture:
        assert (picture.mode, np.asarray(picture).tolist()) == ("L", [[0, 255]])


def test_a_map_of_several_classes_is_a_palette_whose_indices_are_the_classes(tmp_path):
    write_label_map(tmp_path / "m.png", CORNERS, 6)
    with Image.open(tmp_path / "m.png") as picture:
        assert (picture.mode, np.asarray(picture).tolist()) == ("P", CORNERS.tolist())
        assert picture.getpalette("RGB")[:6] == [0, 0, 0, 128, 0, 0]


def test_a_map_with_too_large_a_class_is_a_bug(tmp_path):
    with pytest.raises(ValueError, match="label map holds 5, expected less than 3"):
        write_label_map(tmp_path / "m.png", CORNERS, 3)


def test_16_bit_planes_are_written_exactly(tmp_path):
    values = np.array([[0, 1, 65535]], np.uint16)
    write_png(tmp_path / "p.png", values)
    with Image.open(tmp_path / "p.png") as picture:
        assert np.array_equal(np.asarray(picture), values)


@pytest.mark.faults(18)
def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    write_png(tmp_path / "p.png", CORNERS)
    before = (tmp_path / "p.png").read_bytes()

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_png(tmp_path / "p.png", CORNERS + 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.png"]
    assert (tmp_path / "p.png").read_bytes() == before


@pytest.mark.faults(23)
@pytest.mark.parametrize("stem", ["with blank", "größe-ñ-医学", "n" * 251, ".hidden"])
def test_odd_file_names_make_the_round_trip(tmp_path, stem):
    path = tmp_path / f"{stem}.png"
    write_label_map(path, np.eye(3, dtype=np.uint8), 2)
    assert np.array_equal(read_label_map(path, num_classes=2), np.eye(3))


# Listing


def test_images_are_listed_in_natural_order_and_other_files_left_out(tmp_path):
    for name in ("10.png", "2.PNG", "1.jpeg", "notes.txt", ".hidden.png", "b/3.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [path.name for path in list_images(tmp_path)] == ["1.jpeg", "2.PNG", "10.png"]
    assert [path.name for path in list_images(tmp_path, recursive=True)] == [
        "1.jpeg",
        "2.PNG",
        "10.png",
        "3.tif",
    ]


@pytest.mark.faults
def test_listing_a_folder_that_is_not_there_says_so(tmp_path):
    with pytest.raises(DataError, match="expected a folder of images, but there is nothing of that name"):
        list_images(tmp_path / "gone")


def test_every_listed_suffix_can_be_read(tmp_path):
    formats = {".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".dib": "DIB"}
    for suffix in images.IMAGE_SUFFIXES:
        file = save(tmp_path / f"a{suffix}", CORNERS, format=formats.get(suffix))
        assert read_image(file).pixels.shape == (2, 3, 3)


# What other programs write


@pytest.mark.faults(6)
def test_a_16_bit_negative_is_turned_round_like_one_of_8_bits(tmp_path):
    import tifffile

    for dtype, most in ((np.uint8, 255), (np.uint16, 65535)):
        values = np.array([[0, most // 5, most]], dtype)
        tifffile.imwrite(tmp_path / "a.tif", values, photometric="miniswhite")
        assert read_image(tmp_path / "a.tif").pixels[0, :, 0].tolist() == [255, 204, 0]
        as_labels = np.array([[0, 3, 7]], np.uint16)
    tifffile.imwrite(tmp_path / "m.tif", as_labels, photometric="miniswhite")
    assert read_label_map(tmp_path / "m.tif").tolist() == as_labels.tolist()


@pytest.mark.faults(5)
@pytest.mark.parametrize("dtype", ["float64", "uint64", "complex64"])
def test_numbers_of_a_kind_that_is_not_read_are_named_as_such(tmp_path, dtype):
    import tifffile

    tifffile.imwrite(tmp_path / "a.tif", np.ones((8, 8), dtype))
    with pytest.raises(
        DataError, match=r"a\.tif: .*of a kind that is not read: 8 or 16 bits a channel are"
    ) as error:
        read_image(tmp_path / "a.tif")
    assert "BufferedReader" not in str(error.value)


@pytest.mark.faults(5, 25)
@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (
            ValueError("conversion from LAB to RGB not supported"),
            "cannot be decoded as PNG .conversion from LAB",
        ),
        (MemoryError(), "too large for the memory of this machine"),
    ],
)
def test_what_fails_after_decoding_is_a_failure_of_that_file_too(tmp_path, monkeypatch, problem, message):
    file = save(tmp_path / "a.png", CORNERS)

    def fails(*_):
        raise problem

    monkeypatch.setattr(Image.Image, "convert", fails)
    with pytest.raises(DataError, match=rf"a\.png: {message}"):
        read_image(file)


@pytest.mark.faults(6)
def test_numbers_with_and_without_a_sign_are_not_mistaken_for_each_other(tmp_path):
    import tifffile

    for dtype, values in ((np.uint32, [0, 10**9, 4 * 10**9]), (np.int32, [-(10**9), -5 * 10**8, 10**9])):
        tifffile.imwrite(tmp_path / "a.tif", np.array([values], dtype))
        loaded = read_image(tmp_path / "a.tif")
        assert loaded.pixels[0, :, 0].tolist() == [0, 64, 255]
        assert loaded.notes == (f"32-bit scaled from [{values[0]:g}, {values[2]:g}]",)
    tifffile.imwrite(tmp_path / "a.tif", np.array([[-100, 0, 100]], np.int8))
    with pytest.raises(DataError, match=r"a\.tif: a TIFF of signed 8-bit numbers cannot be read"):
        read_image(tmp_path / "a.tif")

"""The one door for 2-D image files: PNG, JPEG, TIFF and BMP of any pixel mode and orientation.

Everything that comes in is upright (the EXIF orientation applied); everything that goes out lies on the
grid the file was stored in, with the same orientation tag, so that every viewer lays both the same way.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageMode, UnidentifiedImageError

from sdseg_cli.core.errors import DataError
from sdseg_cli.core.files import visible_files, write_whole

IMAGE_SUFFIXES: frozenset[str] = frozenset(
    {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".tif", ".tiff", ".bmp", ".dib"}
)
MAX_PIXELS = 89_478_485
"""Images with more pixels are refused by their header, before anything is allocated."""

_JPEG = frozenset({"JPEG", "MPO"})
_FORMATS: dict[str, frozenset[str]] = {
    ".png": frozenset({"PNG"}),
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".jpe": _JPEG,
    ".jfif": _JPEG,
    ".tif": frozenset({"TIFF"}),
    ".tiff": frozenset({"TIFF"}),
    ".bmp": frozenset({"BMP", "DIB"}),
    ".dib": frozenset({"BMP", "DIB"}),
}
_ORIENTATION_TAG = 274
_PHOTOMETRIC_TAG = 262
_BITS_TAG = 258
_SAMPLE_FORMAT_TAG = 339
# A binary mask with more pixels and values than these in the middle half of its range is none: blurred edges
# and the noise of JPEG stay far below.
_PICTURE_SHARE = 0.25
_PICTURE_VALUES = 32

# MAX_PIXELS refuses with an error where Pillow warns; a filter set once is safe with threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class LoadedImage:
    """An image as the model wants it.

    Attributes:
        pixels: uint8, (H, W, 3), range [0, 255], upright.
        orientation: EXIF orientation of the stored file, 1 to 8.
        notes: what was changed on the way in, for the log.
    """

    pixels: np.ndarray
    orientation: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Stored:
    """A decoded file before any conversion of its values; ``raster`` is upright."""

    raster: Image.Image
    wide: np.ndarray | None  # upright values of more than 8 bits a channel, else None
    wide_bits: str
    file_format: str
    orientation: int
    notes: tuple[str, ...]
    is_negative: bool  # in a wide image 0 is white, which says nothing about a mask


# ---- reading --------------------------------------------------------------------------------------------


def read_image(path: str | Path) -> LoadedImage:
    """Read an image of any mode as upright 8-bit RGB.

    16-bit, 32-bit and float images are scaled from their own range to 0..255 (never clipped);
    transparent pixels are laid over black; palette, CMYK, 1-bit and grey images become RGB.

    Raises:
        DataError: the file is missing, empty, cut short, mislabelled, too large, holds several pages
            or values that are not finite.
    """
    path = Path(path)
    with _failures_of(path):
        stored = _decode(path)
        notes = list(stored.notes)
        if stored.wide is not None:
            pixels = _scale_to_bytes(path, stored.wide, stored.wide_bits, notes)
            if stored.is_negative:
                pixels = 255 - pixels
                notes.append("a negative (0 is white): turned round")
        else:
            pixels = _as_colours(stored.raster, notes)
        return LoadedImage(np.ascontiguousarray(pixels), stored.orientation, tuple(notes))


def read_label_map(
    path: str | Path,
    *,
    num_classes: int | None = None,
    label_values: Mapping[int, int] | None = None,
    threshold: int | None = None,
) -> np.ndarray:
    """Read a label map; palette files keep their indices.

    Args:
        path: the file.
        num_classes: classes that may occur, background included; None accepts any value up to 255.
            With 2 classes the file may hold 0 and 1, or a dark and a bright grey (split at 127).
        label_values: stored value -> class; a value that is not listed is an error.
        threshold: a stored value above it is foreground (class 1), any other background. Colour files are
            made grey first; the bright value of a 1-bit file counts as 255.

    Returns:
        uint8, (H, W), upright, class indices.

    Raises:
        DataError: the file cannot be read, or holds values that are no classes.
    """
    if threshold is not None and label_values is not None:
        raise ValueError("threshold and label_values exclude each other")
    path = Path(path)
    with _failures_of(path):
        stored = _decode(path)
        values, is_index = _label_values(stored, grey=threshold is not None or num_classes == 2)
    if values is None:
        raise DataError(
            f"{path}: the mask is a colour picture ({stored.raster.mode}); expected one channel of class "
            "numbers (grey or palette). Save it as such, or give --threshold if only brightness matters."
        )
    if threshold is not None:
        return (values > (0 if is_index else threshold)).astype(np.uint8)
    if stored.file_format in _JPEG and (num_classes is None or num_classes > 2):
        raise DataError(
            f"{path}: a JPEG cannot hold a label map of several classes, its compression changes the "
            "numbers. Export it again as PNG, or give --threshold for a single class."
        )
    if label_values is not None:
        return _translate(path, values, label_values, is_jpeg=stored.file_format in _JPEG)
    if num_classes == 2:
        return _binary(path, values, is_index=is_index, is_jpeg=stored.file_format in _JPEG)
    limit = 256 if num_classes is None else num_classes
    _refuse_unknown(path, values, known=range(limit))
    return values.astype(np.uint8)


def read_orientation(path: str | Path) -> int:
    """Read the EXIF orientation of an image file, 1 to 8; 1 where it has none.

    Raises:
        DataError: the file cannot be read.
    """
    with _failures_of(Path(path)):
        return _decode(Path(path)).orientation


def list_images(folder: str | Path, recursive: bool = False) -> list[Path]:
    """List the image files of a folder in natural order (``2`` before ``10``).

    Hidden files and files with other suffixes are left out.

    Args:
        folder: where to look.
        recursive: look into subfolders too.

    Raises:
        DataError: the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        found = "it is a file" if folder.exists() else "there is nothing of that name"
        raise DataError(f"{folder}: expected a folder of images, but {found}. Check the path.")
    entries = visible_files(folder, recursive=recursive)
    files = [entry for entry in entries if entry.suffix.lower() in IMAGE_SUFFIXES]
    return sorted(files, key=lambda entry: natural_key(entry.relative_to(folder).as_posix()))


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Make a sort key in which numbers inside names count as numbers; ties fall back to the text."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    key = tuple((0, int(part), "") if part[0] in "0123456789" else (1, 0, part) for part in parts)
    return (*key, (2, 0, name))


# ---- writing --------------------------------------------------------------------------------------------


def write_label_map(
    path: str | Path, label_map: np.ndarray, num_classes: int, *, orientation: int = 1
) -> None:
    """Write a label map as PNG, whole or not at all.

    Two classes give 8-bit grey with 0 and 255; more give a palette image whose indices are the classes.

    Args:
        path: the file, ending in ``.png``.
        label_map: uint8, (H, W), upright, values below ``num_classes``.
        num_classes: background included.
        orientation: EXIF orientation of the image the map belongs to; the map is laid on that file's
            stored grid and carries the same tag.

    Raises:
        OSError: the file cannot be written; nothing is left under its name.
    """
    if label_map.dtype != np.uint8 or label_map.ndim != 2:
        raise ValueError(f"label map must be uint8 (H, W), got {label_map.dtype} {label_map.shape}")
    if label_map.size and int(label_map.max()) >= num_classes:
        raise ValueError(f"label map holds {int(label_map.max())}, expected less than {num_classes}")
    stored = lay_on_stored_grid(label_map, orientation)
    if num_classes <= 2:
        picture = Image.fromarray(stored * np.uint8(255))
    else:
        picture = Image.fromarray(stored).convert("P")
        picture.putpalette(_class_palette())
    write_whole(Path(path), _png_bytes(picture, orientation))


def write_png(path: str | Path, array: np.ndarray, *, orientation: int = 1) -> None:
    """Write a picture as PNG, whole or not at all.

    Args:
        path: the file.
        array: uint8 (H, W) or (H, W, 3), or uint16 (H, W); upright.
        orientation: EXIF orientation of the stored grid to lay it on; the file carries the same tag.

    Raises:
        OSError: the file cannot be written; nothing is left under its name.
    """
    write_whole(Path(path), encode_png(array, orientation=orientation))


def encode_png(array: np.ndarray, *, orientation: int = 1) -> bytes:
    """Encode a picture losslessly; see :func:`write_png`."""
    is_wide = array.dtype == np.uint16 and array.ndim == 2
    if not is_wide and (array.dtype != np.uint8 or array.ndim not in (2, 3)):
        raise ValueError(f"expected uint8 or one plane of uint16, got {array.dtype} {array.shape}")
    return _png_bytes(Image.fromarray(lay_on_stored_grid(array, orientation)), orientation)


def lay_on_stored_grid(upright: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation: the array as it lies in the file.

    Args:
        upright: any dtype, (H, W) or (H, W, C).
        orientation: EXIF orientation, 1 to 8.
    """
    # Orientations 6 and 8 are each other's inverse; every other one is its own.
    return make_upright(upright, {6: 8, 8: 6}.get(orientation, orientation))


def make_upright(stored: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation to an array as it lies in the file.

    Args:
        stored: any dtype, (H, W) or (H, W, C).
        orientation: EXIF orientation, 1 to 8.
    """
    return np.ascontiguousarray(_UPRIGHT[orientation](stored))


_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: stored[::-1].swapaxes(0, 1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: stored.swapaxes(0, 1)[::-1],
}


# ---- decoding -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _failures_of(path: Path) -> Iterator[None]:
    """Make a DataError that names the file of whatever a decoder or a conversion raises."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file.") from error
    except PermissionError as error:
        raise DataError(f"{path}: may not be read. Check the file's permissions.") from error
    except MemoryError as error:
        raise DataError(
            f"{path}: too large for the memory of this machine. Scale it down or cut it."
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_large(path, str(error)) from error
    except Exception as error:  # decoders raise almost anything on damaged files
        found = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            found = "no known format, or numbers of a kind that is not read: 8 or 16 bits a channel are"
        raise DataError(
            f"{path}: cannot be decoded as {path.suffix.lstrip('.').upper() or 'an image'} "
            f"({found}). It is damaged, cut short or not an image: fetch or export it again, or leave it out."
        ) from error


def _decode(path: Path) -> _Stored:
    size = path.stat().st_size
    if not path.is_file():
        raise DataError(f"{path}: expected an image file, found a folder or device.")
    if size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes). Fetch it again or leave it out.")
    with path.open("rb") as file:
        raster: Image.Image = Image.open(file)
        file_format = raster.format or "?"
        expected = _FORMATS.get(path.suffix.lower())
        if expected is not None and file_format not in expected:
            raise DataError(
                f"{path}: the name says {path.suffix.lstrip('.').upper()}, the content is {file_format}. "
                f"Rename it to {path.with_suffix('.' + file_format.lower()).name} or export it again."
            )
        if raster.width * raster.height > MAX_PIXELS:
            raise _too_large(path, f"{raster.width} x {raster.height} pixels")
        if file_format == "PNG":
            raster.verify()  # the checksums of all chunks, which loading alone does not look at
            file.seek(0)
            raster = Image.open(file)
        _refuse_planes_of_16_bit(path, raster)
        is_unsigned = _is_unsigned(path, raster)
        # Pillow turns negatives of 8 bits round, and leaves wider ones as they are.
        is_negative = getattr(raster, "tag_v2", {}).get(_PHOTOMETRIC_TAG) == 0
        notes = _pages(path, raster)
        # Looked at first: asking a PNG for its orientation decodes it and drops the list of tiles.
        is_wide_colour = ";16" in str(getattr(raster, "tile", ""))
        is_wide_colour &= len(raster.getbands()) > 1
        orientation = raster.getexif().get(_ORIENTATION_TAG, 1)
        orientation = orientation if orientation in range(1, 9) else 1
        raster.load()
        # Pillow turns TIFFs upright itself and drops their tag; other formats are left as stored.
        remaining = raster.getexif().get(_ORIENTATION_TAG, 1)
        wide: np.ndarray | None = None
        if is_wide_colour:
            wide = _wide_colour(file, np.asarray(raster), notes)
        bits = "16-bit"
        if remaining in range(2, 9):
            raster = _transpose(raster, remaining)
            wide = None if wide is None else make_upright(wide, remaining)
        if _is_wide(raster.mode):
            wide = np.asarray(raster)
            wide = wide.view(np.uint32) if is_unsigned and raster.mode == "I" else wide
            bits = {"F": "float"}.get(raster.mode, "16-bit" if "16" in raster.mode else "32-bit")
    if orientation != 1:
        notes.append(f"EXIF orientation {orientation} applied")
    return _Stored(raster, wide, bits, file_format, orientation, tuple(notes), is_negative)


def _pages(path: Path, raster: Image.Image) -> list[str]:
    """Refuse stacks; accept the previews that some TIFFs and phone JPEGs carry behind the picture."""
    count = getattr(raster, "n_frames", 1)
    if count == 1:
        return []
    first = raster.size
    raster.seek(1)
    second = raster.size
    raster.seek(0)
    if raster.format == "TIFF" and first == second:
        raise DataError(
            f"{path}: holds {count} pages of {first[0]} x {first[1]} pixels; expected a single image. "
            "Save each page as a file of its own."
        )
    return [f"{count} pages, the first was read"]


def _refuse_planes_of_16_bit(path: Path, raster: Image.Image) -> None:
    """Pillow reads 16-bit colour TIFFs whose channels lie one after another as noise, without a word."""
    tags = getattr(raster, "tag_v2", {})
    bits, planar = tags.get(_BITS_TAG, (8,)), tags.get(284, 1)
    if planar == 2 and len(raster.getbands()) > 1 and max(bits) > 8:
        raise DataError(
            f"{path}: a TIFF of {max(bits)}-bit channels in separate planes cannot be read. Save it with "
            "interleaved channels, or as PNG."
        )


def _is_unsigned(path: Path, raster: Image.Image) -> bool:
    """Whether its numbers have no sign. Pillow takes signed bytes for unsigned, and long ones for signed."""
    tags = getattr(raster, "tag_v2", {})
    bits, formats = tags.get(_BITS_TAG, (8,)), tags.get(_SAMPLE_FORMAT_TAG, (1,))
    if 2 in formats and max(bits) == 8:
        raise DataError(
            f"{path}: a TIFF of signed 8-bit numbers cannot be read. Save it with 8 unsigned bits, or 16."
        )
    return set(formats) == {1}


def _too_large(path: Path, found: str) -> DataError:
    return DataError(
        f"{path}: too large ({found}); at most {MAX_PIXELS} pixels are read. Scale it down or cut it."
    )


def _transpose(raster: Image.Image, orientation: int) -> Image.Image:
    turns = Image.Transpose
    return raster.transpose(
        {
            2: turns.FLIP_LEFT_RIGHT,
            3: turns.ROTATE_180,
            4: turns.FLIP_TOP_BOTTOM,
            5: turns.TRANSPOSE,
            6: turns.ROTATE_270,
            7: turns.TRANSVERSE,
            8: turns.ROTATE_90,
        }[orientation]
    )


def _is_wide(mode: str) -> bool:
    return mode in ("I", "F") or mode.startswith("I;16")


def _wide_colour(file: IO[bytes], high: np.ndarray, notes: list[str]) -> np.ndarray | None:
    """Decode 16-bit colour, of which Pillow keeps the high byte only.

    Read again with the byte order turned round, it gives the low bytes.

    Args:
        file: the open image.
        high: uint8, (H, W, C): what Pillow made of it.
        notes: gets a line where that is all there is.

    Returns:
        uint16, (H, W, 3), or None.
    """
    file.seek(0)
    raster = Image.open(file)
    raster.tile = [tile._replace(args=_turned_round(tile.args)) for tile in raster.tile]
    try:
        raster.load()
    except (OSError, ValueError):  # this layout has no opposite
        notes.append("16-bit colour read by its high byte (0..65535 to 0..255)")
        return None
    values = high.astype(np.uint16) << 8 | np.asarray(raster)
    if values.shape[2] == 2:  # grey and alpha
        return np.repeat(values[..., :1], 3, axis=2)
    return values[..., :3]


def _turned_round(arguments: Any) -> Any:
    """The decoder's arguments with the other byte order for 16-bit channels."""
    if isinstance(arguments, tuple):
        return tuple(_turned_round(argument) for argument in arguments)
    if not isinstance(arguments, str) or ";16" not in arguments:
        return arguments
    layout, order = arguments[:-1], arguments[-1]
    if order == "N":
        order = "L" if sys.byteorder == "little" else "B"
    return layout + {"L": "B", "B": "L"}.get(order, order)


def _scale_to_bytes(path: Path, values: np.ndarray, bits: str, notes: list[str]) -> np.ndarray:
    """Map the image's own range to 0..255; uint8 (H, W, 3)."""
    scaled = values.astype(np.float64)
    bad = int(scaled.size - np.isfinite(scaled).sum())
    if bad:
        raise DataError(
            f"{path}: {bad} of {scaled.size} pixels are NaN or infinite. Export the image again without them."
        )
    low, high = float(scaled.min()), float(scaled.max())
    span = high - low or 1.0
    notes.append(f"{bits} scaled from [{low:g}, {high:g}]")
    as_bytes = np.rint((scaled - low) * (255.0 / span)).astype(np.uint8)
    return as_bytes if as_bytes.ndim == 3 else np.repeat(as_bytes[..., None], 3, axis=2)


def _as_colours(raster: Image.Image, notes: list[str]) -> np.ndarray:
    """uint8 (H, W, 3) of a picture with at most 8 bits a channel; what shows through is black."""
    if _has_transparency(raster):
        raster = raster.convert("RGBA")
        if raster.getchannel("A").getextrema() != (255, 255):
            notes.append("transparent pixels laid over black")
            black = Image.new("RGBA", raster.size, (0, 0, 0, 255))
            raster = Image.alpha_composite(black, raster)
    return np.array(raster.convert("RGB"))


def _has_transparency(raster: Image.Image) -> bool:
    return raster.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in raster.info


# ---- labels ---------------------------------------------------------------------------------------------


def _label_values(stored: _Stored, *, grey: bool) -> tuple[np.ndarray | None, bool]:
    """The numbers a label file holds, and whether they are palette indices rather than brightness."""
    if stored.wide is not None:
        wide = stored.wide
        if wide.ndim == 3 and not grey and (wide != wide[..., :1]).any():
            return None, False
        return (wide[..., 0] if wide.ndim == 3 else wide), False
    raster = stored.raster
    if raster.mode in ("P", "PA"):
        indices = np.asarray(raster if raster.mode == "P" else raster.getchannel("P"))
        return indices, not _is_grey_ramp(raster)
    if raster.mode == "1":
        return np.asarray(raster.convert("L")), False
    if ImageMode.getmode(raster.mode).basemode == "L":
        return np.asarray(raster.getchannel(0)), False
    if grey:
        return np.asarray(raster.convert("RGB").convert("L")), False
    colours = np.asarray(raster.convert("RGB"))
    if (colours != colours[..., :1]).any():
        return None, False
    return colours[..., 0], False


def _is_grey_ramp(raster: Image.Image) -> bool:
    """Whether a palette only says that index i is grey i, as some writers of grey images do."""
    colours = np.array(raster.getpalette("RGB") or [], dtype=np.int64).reshape(-1, 3)
    return len(colours) > 2 and bool((colours == np.arange(len(colours))[:, None]).all())


def _translate(
    path: Path, values: np.ndarray, label_values: Mapping[int, int], *, is_jpeg: bool
) -> np.ndarray:
    if is_jpeg:  # two classes at most: the nearer of the two stored values
        listed = np.array(sorted(label_values))
        values = listed[np.abs(values[..., None].astype(np.int64) - listed).argmin(axis=-1)]
    _refuse_unknown(path, values, known=label_values)
    label_map = np.zeros(values.shape, np.uint8)
    for value, label in label_values.items():
        label_map[values == value] = label
    return label_map


def _binary(path: Path, values: np.ndarray, *, is_index: bool, is_jpeg: bool) -> np.ndarray:
    if is_index:
        _refuse_unknown(path, values, known=range(2))
        return values.astype(np.uint8)
    highest = values.max(initial=0)
    if highest <= 1 and not is_jpeg:
        _refuse_unknown(path, values, known=range(2))
        return values.astype(np.uint8)
    half = 127 if highest <= 255 else 32767
    if highest <= half and not is_jpeg:
        raise DataError(
            f"{path}: unexpected mask values {_listing(np.unique(values))}; expected 0 and 1, or 0 and 255. "
            "Say what they mean with --threshold or --label-values."
        )
    _refuse_pictures(path, values, half)
    return (values > half).astype(np.uint8)


def _refuse_pictures(path: Path, values: np.ndarray, half: int) -> None:
    """A photograph has a dark and a bright half as well: images and masks are easily swapped."""
    between = values[(values > half // 2) & (values < half + half // 2)]
    share = between.size / max(1, values.size)
    if share > _PICTURE_SHARE and len(np.unique(between)) > _PICTURE_VALUES:
        raise DataError(
            f"{path}: looks like a picture, not like a mask: {share:.0%} of its pixels are neither dark nor "
            "bright; expected two values. Check that images and masks are not swapped, or give --threshold "
            "if only brightness matters."
        )


def _refuse_unknown(path: Path, values: np.ndarray, known: range | Mapping[int, int]) -> None:
    present = np.unique(values)
    unknown = [value for value in present if value not in known]
    if not unknown:
        return
    expected = (
        f"0 to {known[-1]}" if isinstance(known, range) else ", ".join(str(value) for value in sorted(known))
    )
    raise DataError(
        f"{path}: unexpected mask values {_listing(np.array(unknown))}; expected {expected}. "
        "List every stored value with --label-values, or give --threshold for a single class."
    )


def _listing(values: np.ndarray) -> str:
    shown = ", ".join(f"{value:g}" for value in values[:8])
    return shown + (f" and {len(values) - 8} more" if len(values) > 8 else "")


# ---- encoding -------------------------------------------------------------------------------------------


def _png_bytes(picture: Image.Image, orientation: int) -> bytes:
    buffer = io.BytesIO()
    if orientation == 1:
        picture.save(buffer, "PNG")
    else:
        exif = Image.Exif()
        exif[_ORIENTATION_TAG] = orientation
        picture.save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def _class_palette() -> list[int]:
    """256 colours: black for the background, then colours that differ from their neighbours."""
    # Bits of the index spread over the channels from the top: the usual colour map of label images.
    palette: list[int] = []
    for index in range(256):
        channels = [0, 0, 0]
        for bit in range(8):
            channels[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
        palette += channels
    return palette

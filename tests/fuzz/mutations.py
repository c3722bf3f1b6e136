"""Damage done to files: bits, lengths, header fields, and what a checksum or a compression would hide.

Every function draws from the ``random.Random`` it is given and from nothing else, so that an input can be
made again from (parser, seed, number).
"""

from __future__ import annotations

import gzip
import io
import json
import lzma
import random
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable

Mutation = Callable[[bytes, random.Random], bytes]

HEAD = 512  # bytes in which most headers say what they have to say
INTEGERS = (
    0,
    1,
    2,
    3,
    127,
    128,
    255,
    256,
    32767,
    32768,
    65535,
    65536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    -1,
)
NUMBERS = (
    *("0", "1", "-1", "2", "255", "256", "65536", "2147483648", "4294967296", "99999999999999999999"),
    *("0.0", "-0.5", "1e-30", "1e308", "1e999", "nan", "inf", "", "a", "0x10", "1 1"),
)
NAMES = ("../escaped", "/tmp/escaped", "a/../../escaped", "..\\escaped", "C:\\escaped", "a\0b", "é" * 200, "")


def damage(payload: bytes, draw: random.Random) -> bytes:
    """Do one to three kinds of damage to bytes whose meaning is not looked at."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        payload = draw.choice(_BLIND)(payload, draw)
    return payload


def _place(payload: bytes, draw: random.Random) -> int:
    limit = min(len(payload), HEAD) if draw.random() < 0.6 else len(payload)
    return draw.randrange(limit) if limit else 0


def _flip_bits(payload: bytes, draw: random.Random) -> bytes:
    found = bytearray(payload)
    for _ in range(draw.choice((1, 1, 2, 8))):
        if found:
            found[_place(payload, draw)] ^= 1 << draw.randrange(8)
    return bytes(found)


def _set_bytes(payload: bytes, draw: random.Random) -> bytes:
    start, count = _place(payload, draw), draw.choice((1, 2, 4, 16))
    value = draw.choice((b"\0", b"\xff", b"\x7f", b"\x80", b" ", b"\n"))
    return payload[:start] + value * min(count, len(payload) - start) + payload[start + count :]


def _set_number(payload: bytes, draw: random.Random) -> bytes:
    form = draw.choice("bhiq")
    width = struct.calcsize(form)
    if len(payload) < width:
        return payload
    start = min(_place(payload, draw), len(payload) - width)
    value = draw.choice(INTEGERS) & (2 ** (8 * width) - 1)
    return payload[:start] + value.to_bytes(width, draw.choice(("little", "big"))) + payload[start + width :]


def _set_float(payload: bytes, draw: random.Random) -> bytes:
    form = draw.choice(("<f", ">f", "<d"))
    width = struct.calcsize(form)
    if len(payload) < width:
        return payload
    start = min(_place(payload, draw), len(payload) - width) // 4 * 4
    value = draw.choice((0.0, -1.0, 1e-30, 3e38, float("nan"), float("inf")))
    return payload[:start] + struct.pack(form, value) + payload[start + width :]


def _truncate(payload: bytes, draw: random.Random) -> bytes:
    return payload[: draw.randrange(len(payload) + 1)]


def _append(payload: bytes, draw: random.Random) -> bytes:
    return payload + draw.choice((b"\0" * 64, draw.randbytes(64), payload[:64], payload))


def _cut_out(payload: bytes, draw: random.Random) -> bytes:
    start = _place(payload, draw)
    return payload[:start] + payload[start + draw.choice((1, 4, 64, 1024)) :]


def _repeat(payload: bytes, draw: random.Random) -> bytes:
    start, count = _place(payload, draw), draw.choice((1, 4, 64, 1024))
    return payload[: start + count] + payload[start:]


def _swap(payload: bytes, draw: random.Random) -> bytes:
    first, second = sorted((_place(payload, draw), _place(payload, draw)))
    return payload[:first] + payload[second:] + payload[first:second]


_BLIND: tuple[Mutation, ...] = (
    *(_flip_bits, _flip_bits, _set_bytes, _set_number, _set_number, _set_float),
    *(_truncate, _append, _cut_out, _repeat, _swap),
)


# Text ---------------------------------------------------------------------------------------------------


def damage_text(payload: bytes, draw: random.Random) -> bytes:
    """Change a number, a name or a line of a text, or its bytes."""
    kind = draw.randrange(5)
    numbers = list(re.finditer(rb"-?\d+(?:\.\d+)?(?:e-?\d+)?", payload[: 8 * HEAD]))
    if kind == 0 and numbers:
        chosen = draw.choice(numbers)
        return payload[: chosen.start()] + draw.choice(NUMBERS).encode() + payload[chosen.end() :]
    lines = payload.split(b"\n")
    index = draw.randrange(min(len(lines), 200))
    if kind == 1:
        del lines[index]
    elif kind == 2:
        lines.insert(draw.randrange(len(lines) + 1), lines[index])
    elif kind == 3:
        words = re.split(rb"(\W+)", lines[index])
        new = draw.choice(
            (*NAMES, *NUMBERS, "null", "true", "[]", "{}", "[" * 50, "&a *a", "!!python/name:os")
        )
        words[draw.randrange(len(words))] = new.encode()
        lines[index] = b"".join(words)
    else:
        return damage(payload, draw)
    return b"\n".join(lines)


def damage_head(payload: bytes, draw: random.Random) -> bytes:
    """Damage the text in front of binary data (NRRD, MetaImage), or any byte."""
    if draw.random() < 0.35:
        return damage(payload, draw)
    ends = [payload.find(mark) for mark in (b"\n\n", b"LOCAL\n")]
    end = max((place + 6 for place in ends if place >= 0), default=HEAD)
    return damage_text(payload[:end], draw) + payload[end:]


def damage_json(payload: bytes, draw: random.Random) -> bytes:
    """Change one value, however deep, of a JSON text; sometimes its characters."""
    if draw.random() < 0.3:
        return damage_text(payload, draw)
    try:
        content = json.loads(payload)
    except ValueError:
        return damage(payload, draw)
    _change_inside(content, draw)
    return json.dumps(content).encode()


def _change_inside(content: object, draw: random.Random) -> None:
    for _ in range(12):
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))  # type: ignore[arg-type,call-overload]
        if not keys:
            return
        key = draw.choice(keys)
        inner = content[key]  # type: ignore[index]
        if isinstance(inner, dict | list) and inner and draw.random() < 0.7:
            content = inner
            continue
        if draw.random() < 0.2:
            del content[key]  # type: ignore[attr-defined]
        else:
            content[key] = draw.choice(_VALUES)  # type: ignore[index]
        return


_VALUES: tuple[object, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 0.5, 1e308, float("nan"), float("inf"), "", "a"),
    *([], [0], [[]], {}, {"a": 1}, {"a": {"a": []}}, *NAMES, "x" * 5000, "\ud800", [None] * 20, ["a", "a"]),
)


# Formats with checksums or compression ----------------------------------------------------------------------


def damage_png(payload: bytes, draw: random.Random) -> bytes:
    """Damage a PNG and, half the time, mend its checksums, so that the decoder sees what is in it."""
    if draw.random() < 0.4:
        return damage(payload, draw)
    chunks = []
    place = 8
    while place + 12 <= len(payload):
        (length,) = struct.unpack_from(">I", payload, place)
        chunks.append([payload[place + 4 : place + 8], payload[place + 8 : place + 8 + length]])
        place += 12 + length
    index = draw.randrange(len(chunks))
    action = draw.randrange(4)
    if action == 0 and chunks[index][0] == b"IDAT":
        chunks[index][1] = zlib.compress(damage(zlib.decompress(chunks[index][1]), draw))
    elif action == 1:
        chunks.insert(draw.randrange(len(chunks)), chunks[index])
    elif action == 2:
        name = draw.choice((b"PLTE", b"tRNS", b"eXIf", b"acTL", b"fdAT", b"iCCP", b"zTXt", b"iTXt", b"IDAT"))
        chunks.insert(index, [name, draw.randbytes(draw.choice((0, 1, 3, 6, 40, 768)))])
    else:
        chunks[index][1] = damage(chunks[index][1], draw)
    written = payload[:8]
    for name, content in chunks:
        checksum = zlib.crc32(name + content)
        written += struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)
    return written


def through_gzip(inner: Mutation) -> Mutation:
    """Damage what was packed, and pack it again; sometimes the stream itself."""

    def mutate(payload: bytes, draw: random.Random) -> bytes:
        if draw.random() < 0.35:
            return damage(payload, draw)
        return gzip.compress(inner(gzip.decompress(payload), draw), 1, mtime=0)

    return mutate


def through_xz(inner: Mutation) -> Mutation:
    """As :func:`through_gzip`, for xz."""

    def mutate(payload: bytes, draw: random.Random) -> bytes:
        if draw.random() < 0.35:
            return damage(payload, draw)
        return lzma.compress(inner(lzma.decompress(payload), draw), preset=0)

    return mutate


def damage_tar(payload: bytes, draw: random.Random) -> bytes:
    """Damage a header of a tar and mend its checksum, or any byte."""
    heads = [place for place in range(0, len(payload), 512) if payload[place + 257 : place + 262] == b"ustar"]
    if not heads or draw.random() < 0.3:
        return damage(payload, draw)
    place = draw.choice(heads)
    head = bytearray(payload[place : place + 512])
    action = draw.randrange(4)
    if action == 0:
        head[:100] = draw.choice(NAMES).encode()[:100].ljust(100, b"\0")
    elif action == 1:
        head[156:157] = draw.choice(b"0123456789gxKLSV").to_bytes(1, "little")  # kind of member
    elif action == 2:
        head[124:136] = draw.choice(
            (b"77777777777\0", b"00000000000\0", b"\x80" + b"\xff" * 11, b"-1".ljust(12))
        )
    else:
        head = bytearray(damage(bytes(head), draw)[:512].ljust(512, b"\0"))
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return payload[:place] + bytes(head) + payload[place + 512 :]


def through_zip(inner: Mutation) -> Mutation:
    """Damage a member of a zip, or its name, and write right checksums; sometimes the file itself."""

    def mutate(payload: bytes, draw: random.Random) -> bytes:
        if draw.random() < 0.35:
            return damage(payload, draw)
        with zipfile.ZipFile(io.BytesIO(payload)) as pack:
            members = [(info, pack.read(info)) for info in pack.infolist()]
        index, action = draw.randrange(len(members)), draw.randrange(6)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as pack, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a name given twice
            for number, (info, content) in enumerate(members):
                if number == index and action == 0:
                    info.filename = draw.choice(NAMES).replace("\0", "") or "a"
                elif number == index and action == 1:
                    info.external_attr = draw.choice((0o120777, 0o060644, 0o010644, 0o040755)) << 16
                elif number == index and action == 2:
                    continue
                elif number == index:
                    content = inner(content, draw)  # noqa: PLW2901
                pack.writestr(info, content)
                if number == index and action == 5:
                    pack.writestr(info, content)
        return buffer.getvalue()

    return mutate


def damage_safetensors(payload: bytes, draw: random.Random) -> bytes:
    """Change the JSON in front of the tensors and keep its length true; sometimes any byte."""
    if draw.random() < 0.4:
        return damage(payload, draw)
    (length,) = struct.unpack_from("<Q", payload)
    head = damage_json(payload[8 : 8 + length], draw)
    return struct.pack("<Q", len(head)) + head + payload[8 + length :]


def damage_nifti(payload: bytes, draw: random.Random) -> bytes:
    """Change a field of a NIfTI-1 header, or any byte."""
    if draw.random() < 0.35:
        return damage(payload, draw)
    shorts = (*range(40, 56, 2), 70, 72, 252, 254)  # dim, datatype, bitpix, qform_code, sform_code
    floats = (*range(76, 108, 4), 108, 112, 116, *range(256, 280, 4), *range(280, 328, 4))
    found = bytearray(payload)
    for _ in range(draw.choice((1, 1, 2))):
        if draw.random() < 0.5:
            value = draw.choice((*INTEGERS[:11], 4, 5, 7, 8, 16, 32, 64, 512, 768, 1792, -1)) & 0xFFFF
            struct.pack_into("<H", found, draw.choice(shorts), value)
        else:
            value = draw.choice((0.0, -1.0, 1e-40, 1e-20, 3e38, float("nan"), float("inf"), 352.0, 348.5))
            struct.pack_into("<f", found, draw.choice(floats), value)
    return bytes(found)


def damage_dicom(payload: bytes, draw: random.Random) -> bytes:
    """Give an element of a DICOM file another value, or remove it; often any byte."""
    import pydicom

    if draw.random() < 0.45:
        return damage(payload, draw)
    data = pydicom.dcmread(io.BytesIO(payload))
    numeric = (
        "Rows",
        "Columns",
        "BitsAllocated",
        "BitsStored",
        "HighBit",
        "SamplesPerPixel",
        "NumberOfFrames",
    )
    numeric += ("PixelRepresentation", "PlanarConfiguration", "SmallestImagePixelValue")
    texts = ("PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient", "RescaleSlope", "Modality")
    texts += ("RescaleIntercept", "PhotometricInterpretation", "SeriesDescription", "SeriesInstanceUID")
    texts += ("SliceThickness", "SpacingBetweenSlices", "SOPClassUID", "SpecificCharacterSet", "PatientName")
    name = draw.choice(numeric + texts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if draw.random() < 0.2:
                delattr(data, name)
            elif name in numeric:
                setattr(data, name, draw.choice((0, 1, 2, 3, 4, 7, 8, 12, 16, 17, 32, 64, 255, 4096, 65535)))
            else:
                text = draw.choice(
                    (*NUMBERS, *NAMES[:4], "1\\1", "0\\0\\0", "1\\0\\0\\1\\0\\0", "nan\\nan\\nan")
                )
                setattr(data, name, text.split("\\"))
            if draw.random() < 0.2:
                data.PixelData = damage(data.PixelData, draw)
            buffer = io.BytesIO()
            data.save_as(buffer, enforce_file_format=True)
            return buffer.getvalue()
        except Exception:  # a value that the library will not even write
            return damage(payload, draw)

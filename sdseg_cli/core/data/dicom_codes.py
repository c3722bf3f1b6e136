"""What a class is called in DICOM: codes for segments, by the name of the class or as the user states them.

The codes themselves are pydicom's, which takes them from the DICOM standard (PS3.16); here are only its names
for them, and the one for a polyp wherever it is, which the standard's lists lack.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdseg_cli.core.errors import UsageError
from sdseg_cli.core.strict_yaml import parse_yaml

_STRUCTURE, _ABNORMAL, _TISSUE = "AnatomicalStructure", "MorphologicallyAbnormalStructure", "Tissue"

# Class name, in small letters and without its side -> (category, type): keywords of pydicom's, or a code.
# The standard has no code for the optic cup, nor for the portal and the splenic vein together.
_CODES: dict[str, tuple[str, str]] = {
    "spleen": (_STRUCTURE, "Spleen"),
    "kidney": (_STRUCTURE, "Kidney"),
    "kidneys": (_STRUCTURE, "Kidney"),
    "gallbladder": (_STRUCTURE, "Gallbladder"),
    "esophagus": (_STRUCTURE, "Esophagus"),
    "oesophagus": (_STRUCTURE, "Esophagus"),
    "liver": (_STRUCTURE, "Liver"),
    "stomach": (_STRUCTURE, "Stomach"),
    "aorta": (_STRUCTURE, "Aorta"),
    "inferior vena cava": (_STRUCTURE, "InferiorVenaCava"),
    "portal vein": (_STRUCTURE, "PortalVein"),
    "splenic vein": (_STRUCTURE, "SplenicVein"),
    "portal and splenic veins": (_STRUCTURE, "Vein"),
    "portal and splenic vein": (_STRUCTURE, "Vein"),
    "portal vein and splenic vein": (_STRUCTURE, "Vein"),
    "pancreas": (_STRUCTURE, "Pancreas"),
    "adrenal gland": (_STRUCTURE, "AdrenalGland"),
    "adrenal glands": (_STRUCTURE, "AdrenalGland"),
    "organ": (_STRUCTURE, "Organ"),
    "organs": (_STRUCTURE, "Organ"),
    "tooth": (_STRUCTURE, "Tooth"),
    "teeth": (_STRUCTURE, "Tooth"),
    "optic disc": (_STRUCTURE, "OpticNerveHead"),
    "optic disk": (_STRUCTURE, "OpticNerveHead"),
    "polyp": (_ABNORMAL, "SCT:41329004:Polyp"),
    "polyps": (_ABNORMAL, "SCT:41329004:Polyp"),
    "colon polyp": (_ABNORMAL, "PolypOfColon"),
    "colonic polyp": (_ABNORMAL, "PolypOfColon"),
    "polyp of colon": (_ABNORMAL, "PolypOfColon"),
    "lesion": (_ABNORMAL, "Lesion"),
    "tumor": (_ABNORMAL, "Tumor"),
    "tumour": (_ABNORMAL, "Tumor"),
    "lung": (_STRUCTURE, "Lung"),
    "lungs": (_STRUCTURE, "Lung"),
    "heart": (_STRUCTURE, "Heart"),
    "brain": (_STRUCTURE, "Brain"),
}
_UNKNOWN = (_TISSUE, _TISSUE)


_KEYS = ("type", "category", "side", "region")  # of a class in a file of codes; a code alone is its type
_LONGEST = {"scheme": 16, "code": 16, "meaning": 64}  # characters that DICOM allows
_PERMUTATION = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)  # of Verhoeff's check digit


@dataclass(frozen=True)
class SegmentCode:
    """The codes of one segment, as pydicom has them.

    Attributes:
        category: what kind of thing it is.
        property_type: what it is.
        side: right or left, where the name says so or the user does.
        is_known: whether the name was found, or the user said what it is; otherwise the codes say "tissue"
            and no more.
        region: where in the body it is, where the user says so.
    """

    category: Any
    property_type: Any
    side: Any | None
    is_known: bool
    region: Any | None = None

    def __str__(self) -> str:
        side = "" if self.side is None else f", {self.side.meaning.lower()}"
        region = "" if self.region is None else f" in {_shown(self.region)}"
        return _shown(self.property_type, side) + region

    @property
    def with_category(self) -> str:
        """All of it in words: two that differ anywhere differ here."""
        return f"{_shown(self.category)}: {self}"


def segment_code(class_name: str) -> SegmentCode:
    """Find the codes of a class by its name, whatever its case and the signs between its words."""
    words = re.findall(r"[^\W_]+", class_name.casefold())
    sides = [word for word in words if word in ("left", "right")]
    name = " ".join(word for word in words if word not in sides)
    is_known = name in _CODES and len(sides) < 2
    category, property_type = _CODES[name] if is_known else _UNKNOWN
    side = _standard(sides[0].capitalize()) if is_known and sides else None
    return SegmentCode(_standard(category), _standard(property_type), side, is_known)


def read_segment_codes(path: Path, classes: Sequence[str] = ()) -> dict[str, SegmentCode]:
    """Read a YAML file that says how classes are coded.

    Every key is a class, its value the code of its type, SCHEME:CODE:MEANING, or a section with ``type`` and,
    as far as they are wanted, ``category`` (by default that of the class's name, which must be known then),
    ``side`` (left or right) and ``region`` (where in the body).

    Args:
        path: the file.
        classes: names that may be coded, the background first; empty where they are not known yet.

    Raises:
        UsageError: it cannot be read, or is none; every mistake is told with its line.
    """
    try:
        document = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--segment-codes {path} cannot be read ({error}).") from error
    mistakes = [(mistake.line, mistake.text) for mistake in document.mistakes]
    found: dict[str, SegmentCode] = {}
    if not mistakes and (not isinstance(document.values, dict) or not document.values):
        mistakes.append((1, "expected a class a line, such as polyp: SCT:41329004:Polyp"))
    elif not mistakes:
        for name, value in document.values.items():
            try:
                if classes:
                    _refuse_unknown(str(name), classes)
                found[str(name)] = _stated(str(name), value)
            except ValueError as error:
                mistakes.append((document.lines.get((str(name),)), f"{name}: {error}"))
    if mistakes:
        lines = [f"{'' if line is None else f'line {line}: '}{text}" for line, text in mistakes]
        raise UsageError(f"--segment-codes {path}: " + "; ".join(lines) + ".")
    return found


def codes_of(classes: Sequence[str], stated: Mapping[str, SegmentCode]) -> dict[str, SegmentCode]:
    """Give every foreground class its codes: those that are stated, or those of its name.

    Args:
        classes: names, the background first.
        stated: from :func:`read_segment_codes`.

    Raises:
        UsageError: a class is stated that the model does not have.
    """
    mistakes = []
    for name in stated:
        try:
            _refuse_unknown(name, classes)
        except ValueError as error:
            mistakes.append(f"{name}: {error}")
    if mistakes:
        raise UsageError(f"--segment-codes: {'; '.join(mistakes)}.")
    return {name: stated.get(name) or segment_code(name) for name in classes[1:]}


def coding_remarks(found: Mapping[str, SegmentCode]) -> list[str]:
    """Say which code every class gets, and which classes have none of their own; from :func:`codes_of`."""
    known = [f"{name} is {code}" for name, code in found.items() if code.is_known]
    remarks = [f"segments are coded so: {'; '.join(known)}"] if known else []
    unknown = [name for name, code in found.items() if not code.is_known]
    if unknown:
        remarks.append(
            f"no code is known for {', '.join(unknown)}: coded as general tissue, with the name of the class "
            "as label; say a better one with --segment-codes"
        )
    return remarks


def _standard(name: str) -> Any:
    """A code of pydicom's by its keyword, or one that is written out."""
    from pydicom.sr.codedict import codes

    return _code(name) if ":" in name else getattr(codes.SCT, name)


def _refuse_unknown(name: str, classes: Sequence[str]) -> None:
    """Raise a ValueError where a name is none of the classes, the first of which is the background."""
    if name not in classes[1:]:
        expected = ", ".join(classes[1:])
        raise ValueError(f"the model has no class of this name, expected {expected}; mend it or leave it out")


def _stated(name: str, value: Any) -> SegmentCode:
    """The codes of one class of a file; a ValueError says what is wrong with them."""
    given = value if isinstance(value, dict) else {"type": value}
    unknown = [str(key) for key in given if key not in _KEYS]
    if unknown or "type" not in given:
        found = f"found {', '.join(unknown)}" if unknown else "there is no type"
        raise ValueError(f"{found}; expected type and, where wanted, category, side and region")
    by_name = segment_code(name)
    if "category" not in given and not by_name.is_known:
        raise ValueError(f"the name is not known, so its category must be said too, one of {_categories()}")
    side = by_name.side
    if "side" in given:
        if given["side"] not in ("left", "right"):
            raise ValueError(f"side: found {given['side']!r}, expected left or right")
        side = _standard(given["side"].capitalize())
    return SegmentCode(
        category=_code(given["category"]) if "category" in given else by_name.category,
        property_type=_code(given["type"]),
        side=side,
        is_known=True,
        region=_code(given["region"]) if "region" in given else None,
    )


def _code(text: Any) -> Any:
    """Read SCHEME:CODE:MEANING; a ValueError says what is wrong with it."""
    from pydicom.sr.coding import Code

    parts = [part.strip() for part in text.split(":", 2)] if isinstance(text, str) else []
    if len(parts) != 3 or not all(parts):
        raise ValueError(f"found {text!r}, expected SCHEME:CODE:MEANING, such as SCT:41329004:Polyp")
    for part, (kind, longest) in zip(parts, _LONGEST.items(), strict=True):
        if len(part) > longest or "\\" in part or not part.isprintable():
            raise ValueError(
                f"{part!r} is no {kind} of DICOM: expected at most {longest} characters on one line, without "
                "backslashes"
            )
    scheme, value, meaning = parts
    if scheme == "SCT" and not _is_snomed_ct(value):
        raise ValueError(
            f"{value} is no code of SNOMED CT: its last digit does not fit the others. Look it up again, at "
            "browser.ihtsdotools.org for instance"
        )
    return Code(value, scheme, meaning)


def _is_snomed_ct(value: str) -> bool:
    """Whether a number ends with the check digit that every SNOMED CT code has.

    Source: Verhoeff (1969), Error detecting decimal codes; products of the dihedral group of order ten.
    """
    if not (value.isascii() and value.isdecimal() and len(value) >= 6):
        return False
    check = 0
    for place, character in enumerate(reversed(value)):
        digit = int(character)
        for _ in range(place % 8):
            digit = _PERMUTATION[digit]
        turned = check + digit if check < 5 else check - digit
        check = turned % 5 + 5 * ((check < 5) == (digit >= 5))
    return check == 0


def _categories() -> str:
    from pydicom.sr.codedict import codes

    found = (getattr(codes.cid7150, name) for name in codes.cid7150.dir())
    return ", ".join(f"{code.scheme_designator}:{code.value}:{code.meaning}" for code in found)


def _shown(code: Any, more: str = "") -> str:
    return f"{code.meaning}{more} ({code.scheme_designator} {code.value})"

"""What a class is called in DICOM: SNOMED CT codes for segments, found by the name of the class.

The codes themselves are pydicom's, which takes them from the DICOM standard (PS3.16); here are only its names
for them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_STRUCTURE, _ABNORMAL, _TISSUE = "AnatomicalStructure", "MorphologicallyAbnormalStructure", "Tissue"

# Class name, in small letters and without its side -> (category, type), keywords of pydicom's codes.
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
    "polyp": (_ABNORMAL, "PolypOfColon"),
    "lesion": (_ABNORMAL, "Lesion"),
    "tumor": (_ABNORMAL, "Tumor"),
    "tumour": (_ABNORMAL, "Tumor"),
    "lung": (_STRUCTURE, "Lung"),
    "lungs": (_STRUCTURE, "Lung"),
    "heart": (_STRUCTURE, "Heart"),
    "brain": (_STRUCTURE, "Brain"),
}
_UNKNOWN = (_TISSUE, _TISSUE)


@dataclass(frozen=True)
class SegmentCode:
    """The codes of one segment, as pydicom has them.

    Attributes:
        category: what kind of thing it is.
        property_type: what it is.
        side: right or left, where the name says so.
        is_known: whether the name was found; otherwise the codes say "tissue" and no more.
    """

    category: Any
    property_type: Any
    side: Any | None
    is_known: bool

    def __str__(self) -> str:
        side = "" if self.side is None else f", {self.side.meaning.lower()}"
        return f"{self.property_type.meaning}{side} (SCT {self.property_type.value})"


def segment_code(class_name: str) -> SegmentCode:
    """Find the codes of a class by its name, whatever its case and the signs between its words."""
    from pydicom.sr.codedict import codes

    words = re.findall(r"[^\W_]+", class_name.casefold())
    sides = [word for word in words if word in ("left", "right")]
    name = " ".join(word for word in words if word not in sides)
    category, property_type = _CODES.get(name, _UNKNOWN)
    is_known = name in _CODES and len(sides) < 2
    if not is_known:
        category, property_type = _UNKNOWN
    side = getattr(codes.SCT, sides[0].capitalize()) if is_known and sides else None
    return SegmentCode(getattr(codes.SCT, category), getattr(codes.SCT, property_type), side, is_known)


def coding_remarks(classes: Sequence[str]) -> list[str]:
    """Say which code every foreground class gets, and which classes have none of their own.

    Args:
        classes: names, the background first.
    """
    found = {name: segment_code(name) for name in classes[1:]}
    known = [f"{name} is {code}" for name, code in found.items() if code.is_known]
    remarks = [f"segments are coded by the names of their classes: {'; '.join(known)}"] if known else []
    unknown = [name for name, code in found.items() if not code.is_known]
    if unknown:
        remarks.append(
            f"no SNOMED CT code is known for {', '.join(unknown)}: coded as general tissue, with the name of "
            "the class as label"
        )
    return remarks

"""Label volumes as DICOM Segmentation objects that refer to the slices they were made from."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdseg_cli import __version__
from sdseg_cli.core.data.dicom import DicomSeries, sorted_headers, without_values
from sdseg_cli.core.data.dicom_codes import segment_code
from sdseg_cli.core.errors import DataError, UsageError
from sdseg_cli.core.files import write_whole


def require_highdicom() -> None:
    """Raise a UsageError where the library that writes DICOM-SEG is not installed."""
    if importlib.util.find_spec("highdicom") is None:
        raise UsageError(
            "--format dicom-seg needs the library highdicom. Install it with: pip install 'sdseg[dicom]', or "
            "choose --format nifti."
        )


def write_dicom_seg(path: Path, labels: np.ndarray, series: DicomSeries, classes: Sequence[str]) -> None:
    """Write labels as a binary DICOM-SEG with a segment for each foreground class, whole or not at all.

    Args:
        path: the file, ``.dcm``.
        labels: uint8, (columns, rows, slices) as :func:`~sdseg_cli.core.data.dicom.read_series` orders them.
        series: the slices the labels belong to; patient and study are taken from them.
        classes: names, the background first.

    Raises:
        DataError: the slices lack what a segmentation must refer to.
        OSError: the file cannot be written; nothing is left under its name.
    """
    require_highdicom()
    import highdicom
    from pydicom.uid import ExplicitVRLittleEndian

    frames = np.ascontiguousarray(labels.transpose(2, 1, 0))
    masks = np.stack([frames == label for label in range(1, len(classes))], axis=-1)
    segments = [_description(number, name) for number, name in enumerate(classes[1:], start=1)]
    try:
        document = highdicom.seg.Segmentation(
            source_images=sorted_headers(series),
            pixel_array=masks,
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=segments,
            series_instance_uid=highdicom.UID(),
            series_number=9000,
            series_description=f"sdseg: {', '.join(classes[1:])}"[:64],
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="sdseg",
            manufacturer_model_name="sdseg",
            software_versions=__version__,
            device_serial_number="none",
            transfer_syntax_uid=ExplicitVRLittleEndian,
            omit_empty_frames=bool(masks.any()),
        )
    except (AttributeError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{series.folder}: series {series.name!r} cannot be referred to by a DICOM-SEG ({error}). Choose "
            "--format nifti."
        ) from error
    buffer = io.BytesIO()
    document.save_as(buffer, enforce_file_format=True)
    write_whole(path, buffer.getvalue())


def read_dicom_seg(path: Path, series: DicomSeries) -> np.ndarray:
    """Read back what :func:`write_dicom_seg` wrote.

    Args:
        path: the file.
        series: the slices it was made from.

    Returns:
        uint8, (columns, rows, slices), class indices.

    Raises:
        DataError: the file is no segmentation of these slices.
    """
    require_highdicom()
    import highdicom

    try:
        document = highdicom.seg.segread(path)
        frames = document.get_pixels_by_source_instance(
            [header.SOPInstanceUID for header in sorted_headers(series)],
            combine_segments=True,
            assert_missing_frames_are_empty=True,
        )
    except DataError:
        raise
    except Exception as error:  # a damaged file raises almost anything
        raise DataError(
            f"{path}: cannot be read as a DICOM-SEG of {series.name!r} ({without_values(error)}). Make it "
            "again, or name the series that it was made of."
        ) from error
    return np.asarray(frames).astype(np.uint8).transpose(2, 1, 0)


def _description(number: int, name: str) -> Any:
    """highdicom's description of a segment; its codes follow from the name of its class."""
    import highdicom
    from pydicom.sr.codedict import codes

    code = segment_code(name)
    description = highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=code.category,
        segmented_property_type=code.property_type,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="sdseg", version=__version__, family=codes.DCM.ArtificialIntelligence
        ),
    )
    if code.side is not None:
        side = highdicom.sr.CodedConcept.from_code(code.side)
        (property_type,) = description.SegmentedPropertyTypeCodeSequence
        property_type.SegmentedPropertyTypeModifierCodeSequence = [side]
    return description

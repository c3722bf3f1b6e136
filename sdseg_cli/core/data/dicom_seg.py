"""Label volumes as DICOM Segmentation objects that refer to the slices they were made from."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdseg_cli import __version__
from sdseg_cli.core.data.dicom import DicomSeries, sorted_headers, without_values
from sdseg_cli.core.data.dicom_codes import SegmentCode
from sdseg_cli.core.data.geometry import VolumeGeometry
from sdseg_cli.core.data.volume_files import MAX_VOXELS
from sdseg_cli.core.data.volumes import Volume
from sdseg_cli.core.errors import DataError, UsageError
from sdseg_cli.core.files import write_whole


def require_highdicom() -> None:
    """Raise a UsageError where the library that reads and writes DICOM-SEG is not installed."""
    if importlib.util.find_spec("highdicom") is None:
        raise UsageError(
            "DICOM-SEG needs the library highdicom. Install it with: pip install 'sdseg[dicom]', or use "
            "NIfTI (--format nifti)."
        )


def write_dicom_seg(
    path: Path, labels: np.ndarray, series: DicomSeries, codes: Mapping[str, SegmentCode]
) -> None:
    """Write labels as a binary DICOM-SEG with a segment for each foreground class, whole or not at all.

    Args:
        path: the file, ``.dcm``.
        labels: uint8, (columns, rows, slices) as :func:`~sdseg_cli.core.data.dicom.read_series` orders them.
        series: the slices the labels belong to; patient and study are taken from them.
        codes: what each foreground class is, in the order of their labels.

    Raises:
        DataError: the slices lack what a segmentation must refer to.
        OSError: the file cannot be written; nothing is left under its name.
    """
    require_highdicom()
    import highdicom
    from pydicom.uid import ExplicitVRLittleEndian

    frames = np.ascontiguousarray(labels.transpose(2, 1, 0))
    masks = np.stack([frames == label for label in range(1, len(codes) + 1)], axis=-1)
    segments = [_description(number, *item) for number, item in enumerate(codes.items(), start=1)]
    try:
        document = highdicom.seg.Segmentation(
            source_images=sorted_headers(series),
            pixel_array=masks,
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=segments,
            series_instance_uid=highdicom.UID(),
            series_number=9000,
            series_description=f"sdseg: {', '.join(codes)}"[:64],
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
            f"{series.folder}: series {series.name!r} cannot be referred to by a DICOM-SEG "
            f"({without_values(error)}). Choose --format nifti."
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
        slices = [header.SOPInstanceUID for header in sorted_headers(series)]
        _refuse_other_slices(path, document, series, slices)
        frames = document.get_pixels_by_source_instance(
            slices,
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


def read_dicom_seg_alone(path: Path) -> Volume:
    """Read a DICOM-SEG without the slices it was made from, as a label volume.

    Slices that hold nothing are mostly left out of such a file, so that its volume may begin and end within
    that of the scan.

    Raises:
        DataError: it is no DICOM-SEG, or its slices form no block of voxels.
    """
    require_highdicom()
    import highdicom

    try:
        document = highdicom.seg.segread(path)
        _refuse_no_block(document)
        found = document.get_volume(combine_segments=True)
        frames = np.asarray(found.array)
        # Its array counts slices, rows and columns, and its affine LPS+.
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(found.affine)[:, [2, 1, 0, 3]]
    except Exception as error:  # a damaged file raises almost anything
        reason = str(error) if isinstance(error, DataError) else type(error).__name__
        raise DataError(f"{path}: cannot be read as a DICOM-SEG ({reason}).") from error
    labels = frames.astype(np.uint8).transpose(2, 1, 0)
    columns, rows, slices = labels.shape
    return Volume(labels, VolumeGeometry((columns, rows, slices), affine), "dicom", path, ())


def _refuse_no_block(document: Any) -> None:
    """See that the slices form a block, and how large it is, before anything of that size is made."""
    geometry = document.get_volume_geometry()
    if geometry is None:
        raise DataError("its slices are unevenly spaced or shifted, and form no block of voxels")
    if math.prod(geometry.spatial_shape) > MAX_VOXELS:
        raise DataError(f"it claims {geometry.spatial_shape} voxels; at most {MAX_VOXELS} are read")


def _refuse_other_slices(path: Path, document: Any, series: DicomSeries, slices: Sequence[str]) -> None:
    """A slice that a segmentation does not refer to counts as empty; it may refer to none of them."""
    elsewhere = {uid for _, _, uid in document.get_source_image_uids()} - {*slices}
    if elsewhere:
        raise DataError(
            f"{path}: refers to {len(elsewhere)} slices that are not in series {series.name!r} of "
            f"{series.folder}. Give the segmentation of that series."
        )


def _description(number: int, name: str, code: SegmentCode) -> Any:
    """highdicom's description of a segment."""
    import highdicom
    from pydicom.sr.codedict import codes

    description = highdicom.seg.SegmentDescription(
        segment_number=number,
        segment_label=name,
        segmented_property_category=code.category,
        segmented_property_type=code.property_type,
        algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
        algorithm_identification=highdicom.AlgorithmIdentificationSequence(
            name="sdseg", version=__version__, family=codes.DCM.ArtificialIntelligence
        ),
        anatomic_regions=None if code.region is None else [code.region],
    )
    if code.side is not None:
        side = highdicom.sr.CodedConcept.from_code(code.side)
        (property_type,) = description.SegmentedPropertyTypeCodeSequence
        property_type.SegmentedPropertyTypeModifierCodeSequence = [side]
    return description

"""Label volumes as DICOM Segmentation objects that refer to the slices they were made from."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdseg_cli import __version__
from sdseg_cli.core.data.dicom import DICOM_SUFFIXES, DicomSeries, sorted_slices, without_values
from sdseg_cli.core.data.dicom_codes import SegmentCode
from sdseg_cli.core.data.geometry import VolumeGeometry, geometry_from_lps
from sdseg_cli.core.data.volume_files import MAX_VOXELS, volume_suffix
from sdseg_cli.core.data.volumes import Volume
from sdseg_cli.core.errors import DataError, UsageError
from sdseg_cli.core.files import write_whole


def is_label_volume(path: Path) -> bool:
    """Whether a file is a label volume by its name: a volume, or what may be a DICOM-SEG."""
    return volume_suffix(path) is not None or is_dicom_seg(path)


def is_dicom_seg(path: Path) -> bool:
    """Whether a file of labels is a DICOM-SEG by its name."""
    return path.suffix.lower() in DICOM_SUFFIXES


def require_highdicom() -> None:
    """Raise a UsageError where the library that reads and writes DICOM-SEG is not installed."""
    if importlib.util.find_spec("highdicom") is None:
        raise UsageError(
            "DICOM-SEG needs the library highdicom. Install it with: pip install 'sdseg[dicom]', or "
            "convert it to NIfTI."
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
            source_images=sorted_slices(series)[0],
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


def read_dicom_seg(path: Path, series: DicomSeries, *, num_classes: int = 256) -> np.ndarray:
    """Read a DICOM-SEG onto the slices of a series, wherever its own axes begin and whichever way they count.

    Args:
        path: the file.
        series: the slices it was made from.
        num_classes: background included.

    Returns:
        uint8, (columns, rows, slices) as :func:`~sdseg_cli.core.data.dicom.read_series` orders them, class
        indices.

    Raises:
        DataError: the file is no segmentation of these slices, or has segments that are no classes.
    """
    with _readable(path):
        document = _opened(path)
        headers, grid = sorted_slices(series)
        slices = [header.SOPInstanceUID for header in headers]
        _refuse_other_slices(path, document, series, slices)
        block = None
        if (own := _geometry(document)) is not None:
            block = own.inside(grid)
        if block is not None and block.fits(grid.shape):
            return block.laid_in(grid.shape, _class_indices(path, _block(document)[0], num_classes))
        # Sheared, or with gaps of unstated width, it forms no block, and may still lie slice on slice.
        differences = _plane_differences(document, dict(zip(slices, headers, strict=True)))
        if differences:
            place = "in no block of voxels" if own is None else own.describe()
            raise DataError(
                f"{path} ({place}) does not lie on series {series.name!r} of {series.folder} "
                f"({grid.describe()}). {differences} Give the segmentation of that series."
            )
        frames = document.get_pixels_by_source_instance(
            slices, combine_segments=True, assert_missing_frames_are_empty=True
        )
        return _class_indices(path, np.asarray(frames), num_classes).transpose(2, 1, 0)


def read_dicom_seg_alone(path: Path, *, num_classes: int = 256) -> Volume:
    """Read a DICOM-SEG without the slices it was made from, as a label volume.

    Slices that hold nothing are mostly left out of such a file, so that its volume may begin and end within
    that of the scan.

    Args:
        path: the file.
        num_classes: background included.

    Raises:
        DataError: it is no DICOM-SEG, its slices form no block of voxels, or it has segments that are no
            classes.
    """
    with _readable(path):
        document = _opened(path)
        if _geometry(document) is None:
            raise DataError(
                f"{path}: cannot be read as a DICOM-SEG (its slices are unevenly spaced or shifted, and form "
                "no block of voxels). Convert it to NIfTI."
            )
        voxels, geometry = _block(document)
        return Volume(_class_indices(path, voxels, num_classes), geometry, "dicom", path, ())


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever the libraries raise of a file makes a DataError; its values are not told."""
    try:
        yield
    except (DataError, UsageError):
        raise
    except Exception as error:  # a damaged file raises almost anything
        raise DataError(
            f"{path}: cannot be read as a DICOM-SEG ({without_values(error)}). Expected a DICOM "
            "Segmentation, binary or label map, whose segments do not overlap. Make it again or "
            "convert it to NIfTI."
        ) from error


def _opened(path: Path) -> Any:
    require_highdicom()
    import highdicom

    return highdicom.seg.segread(path)


def _geometry(document: Any) -> VolumeGeometry | None:
    """Where the block of voxels lies that the slices form, or None; before anything of its size is made."""
    found = document.get_volume_geometry()
    if found is None:
        return None
    if math.prod(found.spatial_shape) > MAX_VOXELS:
        raise ValueError(f"it claims {found.spatial_shape} voxels; at most {MAX_VOXELS} are read")
    return _turned(found)


def _block(document: Any) -> tuple[np.ndarray, VolumeGeometry]:
    """Segment numbers (columns, rows, slices) and their geometry."""
    found = document.get_volume(combine_segments=True)
    return np.asarray(found.array).transpose(2, 1, 0), _turned(found)


def _turned(found: Any) -> VolumeGeometry:
    """highdicom counts slices, rows and columns, and its affine is LPS+."""
    slices, rows, columns = found.spatial_shape
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(found.affine)[:, [2, 1, 0, 3]]
    return VolumeGeometry((columns, rows, slices), affine)


def _class_indices(path: Path, numbers: np.ndarray, num_classes: int) -> np.ndarray:
    """Segment numbers as uint8, once all of them are known to be classes."""
    largest = int(numbers.max(initial=0))
    if largest >= num_classes:
        raise DataError(
            f"{path}: segment {largest} found, expected 1 to {num_classes - 1}. Name a class for every "
            "segment with --classes."
        )
    return numbers.astype(np.uint8)


def _plane_differences(document: Any, headers: Mapping[str, Any]) -> str:
    """What keeps a frame from lying on the slice it refers to; empty where all do."""
    (shared,) = document.SharedFunctionalGroupsSequence
    for number, own in enumerate(document.PerFrameFunctionalGroupsSequence, start=1):
        groups = {element.keyword: element.value for group in (shared, own) for element in group}
        plane = _plane(
            document,
            groups["PlanePositionSequence"][0].ImagePositionPatient,
            groups["PlaneOrientationSequence"][0].ImageOrientationPatient,
            groups["PixelMeasuresSequence"][0].PixelSpacing,
        )
        uids = [
            source.ReferencedSOPInstanceUID
            for derivation in groups.get("DerivationImageSequence", ())
            for source in derivation.get("SourceImageSequence", ())
        ]
        if not uids:
            return f"Frame {number} refers to no slice."
        for header in map(headers.__getitem__, uids):
            place = header.ImagePositionPatient, header.ImageOrientationPatient
            differences = _plane(header, *place, header.PixelSpacing).differences(plane)
            if differences:
                return f"Frame {number} is not where its slice is: {' '.join(differences)}"
    return ""


def _plane(
    image: Any, position: Sequence[Any], orientation: Sequence[Any], spacing: Sequence[Any]
) -> VolumeGeometry:
    """Where a single slice lies, with a thickness of 1 mm."""
    across, down = np.reshape([float(value) for value in orientation], (2, 3))
    direction = np.stack([across, down, np.cross(across, down)], axis=1)
    return geometry_from_lps(
        (int(image.Columns), int(image.Rows), 1),
        tuple(float(value) for value in position),
        (float(spacing[1]), float(spacing[0]), 1.0),
        tuple(direction.ravel()),
    )


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

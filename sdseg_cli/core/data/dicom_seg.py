"""Label volumes as DICOM Segmentation objects that refer to the slices they were made from."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
        _refuse_other_frame(path, document, series, headers[0])
        block = None
        if (own := _geometry(document)) is not None:
            block = own.inside(grid)
        if block is not None and block.fits(grid.shape):
            return block.laid_in(grid.shape, _class_indices(path, _segment_numbers(document), num_classes))
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


@dataclass(frozen=True)
class LoneDicomSeg:
    """A DICOM-SEG without the slices it was made from.

    Attributes:
        path: the file.
        document: highdicom's.
        geometry: where the block of voxels lies that its slices form; None where they form none, or may do so
            once it is known how far apart they are.
        lacks_spacing: whether it could say how far apart slices are, and does not.
        frame_of_reference: FrameOfReferenceUID; places in another one mean nothing here. Empty if not stated.
        slices: SOPInstanceUID of those it was made from.
    """

    path: Path
    document: Any = field(repr=False)
    geometry: VolumeGeometry | None
    lacks_spacing: bool
    frame_of_reference: str
    slices: frozenset[str] = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> LoneDicomSeg:
        """Open a file; its voxels are not read yet.

        Raises:
            DataError: it is no DICOM-SEG.
            UsageError: the library that reads it is not installed.
        """
        with _readable(path):
            document = _opened(path)
            measures = _shared_measures(document)
            return cls(
                path,
                document,
                _geometry(document),
                measures is not None and "SpacingBetweenSlices" not in measures,
                str(document.get("FrameOfReferenceUID") or ""),
                _references(document),
            )

    def volume(self, *, num_classes: int = 256, scan: VolumeGeometry | None = None) -> Volume:
        """Read the label volume.

        Slices that hold nothing are mostly left out of such a file, so that it may begin and end within the
        volume of the scan.

        Args:
            num_classes: background included.
            scan: what is known of the scan's grid; its slices are as far apart as the file's where that does
                not say it.

        Raises:
            DataError: the slices form no block of voxels, or there are segments that are no classes.
        """
        with _readable(self.path):
            document, geometry = self.document, self.geometry
            if scan is not None and self.lacks_spacing:
                distance = _spacing_along(scan, _normal(document))
                # Thicker slices than that lie side by side without gaps, on a coarser grid than the scan's.
                if _thickness(document) < 1.01 * distance:
                    spaced = _opened(self.path, distance)
                    if (found := _geometry(spaced)) is not None:
                        document, geometry = spaced, found
            if geometry is None:
                raise DataError(
                    f"{self.path}: cannot be read as a DICOM-SEG (its slices are unevenly spaced or shifted, "
                    "and form no block of voxels). Convert it to NIfTI."
                )
            labels = _class_indices(self.path, _segment_numbers(document), num_classes)
            return Volume(labels, geometry, "dicom", self.path, ())


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


def _opened(path: Path, spacing_mm: float | None = None) -> Any:
    """Open a file, with the distance between its slices where it does not state it."""
    require_highdicom()
    import highdicom
    import pydicom

    if spacing_mm is None:
        return highdicom.seg.segread(path)
    document = pydicom.dcmread(path)
    _shared_measures(document).SpacingBetweenSlices = float(f"{spacing_mm:.9g}")
    return highdicom.seg.Segmentation.from_dataset(document, copy=False)


def _geometry(document: Any) -> VolumeGeometry | None:
    """Where the block of voxels lies that the slices form, or None; before anything of its size is made."""
    found = document.get_volume_geometry()
    if found is None:
        return None
    if math.prod(found.spatial_shape) > MAX_VOXELS:
        raise ValueError(f"it claims {found.spatial_shape} voxels; at most {MAX_VOXELS} are read")
    return _turned(found)


def _segment_numbers(document: Any) -> np.ndarray:
    """Segment numbers of the block of voxels (columns, rows, slices)."""
    return np.asarray(document.get_volume(combine_segments=True).array).transpose(2, 1, 0)


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
    for number, groups in enumerate(_groups(document), start=1):
        plane = _plane_of(document, groups)
        uids = _sources(groups)
        if not uids:
            return f"Frame {number} refers to no slice."
        for header in map(headers.__getitem__, uids):
            place = header.ImagePositionPatient, header.ImageOrientationPatient
            differences = _plane(header, *place, header.PixelSpacing).differences(plane)
            if differences:
                return f"Frame {number} is not where its slice is: {' '.join(differences)}"
    return ""


def _groups(document: Any) -> Iterator[Mapping[str, Any]]:
    """The functional groups of every frame by their keywords: those of its own beside the shared ones."""
    (shared,) = document.SharedFunctionalGroupsSequence
    for own in document.PerFrameFunctionalGroupsSequence:
        yield {element.keyword: element.value for group in (shared, own) for element in group}


def _shared_measures(document: Any) -> Any:
    """What says how far apart pixels and slices of all frames are; None where each frame has its own."""
    (shared,) = document.SharedFunctionalGroupsSequence
    return next(iter(shared.get("PixelMeasuresSequence") or ()), None)


def _thickness(document: Any) -> float:
    """Of the slices, in mm; 0 where it is not said."""
    return float(_shared_measures(document).get("SliceThickness") or 0)


def _references(document: Any) -> frozenset[str]:
    """SOPInstanceUID of the slices that a segmentation or one of its frames refers to."""
    return frozenset(str(uid) for _, _, uid in document.get_source_image_uids()).union(
        *map(_sources, _groups(document))
    )


def _sources(groups: Mapping[str, Any]) -> list[str]:
    """SOPInstanceUID of the slices that a frame refers to."""
    return [
        str(source.ReferencedSOPInstanceUID)
        for derivation in groups.get("DerivationImageSequence", ())
        for source in derivation.get("SourceImageSequence", ())
    ]


def _normal(document: Any) -> np.ndarray:
    """Direction from slice to slice, RAS+."""
    return _plane_of(document, next(_groups(document))).affine[:3, 2]


def _spacing_along(grid: VolumeGeometry, direction: np.ndarray) -> float:
    """Distance in mm between the voxels of a grid along that axis which is closest to a direction, RAS+."""
    axes = grid.affine[:3, :3] / np.array(grid.spacing_mm)
    return grid.spacing_mm[int(np.abs(direction @ axes).argmax())]


def _plane_of(document: Any, groups: Mapping[str, Any]) -> VolumeGeometry:
    """Where a frame lies."""
    return _plane(
        document,
        groups["PlanePositionSequence"][0].ImagePositionPatient,
        groups["PlaneOrientationSequence"][0].ImageOrientationPatient,
        groups["PixelMeasuresSequence"][0].PixelSpacing,
    )


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
    elsewhere = _references(document) - {*slices}
    if elsewhere:
        raise DataError(
            f"{path}: refers to {len(elsewhere)} slices that are not in series {series.name!r} of "
            f"{series.folder}. Give the segmentation of that series."
        )


def _refuse_other_frame(path: Path, document: Any, series: DicomSeries, header: Any) -> None:
    """Without a reference the place alone binds a segmentation to slices, and within one frame only.

    Where it does refer to them, that binds it: another frame is then a slip of whoever wrote the tag.
    """
    frames = {str(each.get("FrameOfReferenceUID") or "") for each in (document, header)} - {""}
    if len(frames) > 1 and not _references(document):
        raise DataError(
            f"{path}: refers to no slices, and its FrameOfReferenceUID is not that of series {series.name!r} "
            f"of {series.folder}, so that its place means nothing there. Give the segmentation of that "
            "series; if it is (identifiers may have been replaced), convert it to NIfTI."
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

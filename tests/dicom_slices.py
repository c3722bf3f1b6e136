"""CT slices as a scanner writes them, made of an array."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pydicom
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid


def ct_slice(values: np.ndarray, position: Sequence[float], **fields: object) -> pydicom.Dataset:
    """Make a CT slice that is not part of a series yet.

    Args:
        values: int16, (rows, columns), as stored.
        position: x, y, z of the first pixel's centre, mm.
        fields: further attributes by their DICOM keyword, SeriesInstanceUID among them; they go before those
            that stand here.
    """
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, generate_uid()
    data.PatientName, data.PatientID, data.PatientBirthDate, data.PatientSex = "Test^A", "7", "", ""
    data.StudyID, data.StudyDate, data.StudyTime, data.AccessionNumber = "1", "20200101", "120000", ""
    data.ReferringPhysicianName, data.Manufacturer, data.Laterality = "", "none", ""
    data.Modality, data.SeriesNumber, data.PositionReferenceIndicator = "CT", 1, ""
    data.PatientPosition, data.InstanceNumber = "HFS", 1
    data.ImagePositionPatient, data.ImageOrientationPatient = list(position), [1, 0, 0, 0, 1, 0]
    data.PixelSpacing, data.SliceThickness = [0.8, 0.6], 2.0
    data.Rows, data.Columns, data.SamplesPerPixel = *values.shape, 1
    data.PhotometricInterpretation, data.PixelRepresentation = "MONOCHROME2", 1
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
    data.PixelData = values.astype(np.int16).tobytes()
    for name, value in fields.items():
        setattr(data, name, value)
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID
    return data

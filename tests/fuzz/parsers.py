"""What is fuzzed: for every parser its sound files, the damage that suits them, and how a user comes to it.

Images, volumes and DICOM series go through the whole of ``predict`` with a stub in place of the network:
what is read well enough must also be cut, written and named without harm.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.mutations import (
    Mutation,
    damage,
    damage_dicom,
    damage_head,
    damage_json,
    damage_nifti,
    damage_png,
    damage_safetensors,
    damage_tar,
    damage_text,
    through_gzip,
    through_xz,
    through_zip,
)

Files = dict[str, bytes]  # path inside the input's folder -> content
DATA = Path(os.environ.get("SDSEG_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
SIDE = 16


@dataclass(frozen=True)
class Parser:
    """One way into sdseg.

    Attributes:
        read: called with the input's folder and an empty folder for outputs.
        seeds: makes the sound files, several sets.
        damaged: name's end -> mutation; files with another end are left as they are.
        made: instead of seeds: the strategy of hypothesis that makes the sets.
        share: inputs of this parser for one of the others; slow ones take less.
    """

    read: Callable[[Path, Path], None]
    seeds: Callable[[], Sequence[Files]] = tuple
    damaged: dict[str, Mutation] = field(default_factory=dict)
    made: Callable[[], Any] | None = None
    share: float = 1.0

    def make(self, draw: random.Random) -> Files:
        """One damaged set of files."""
        files = dict(draw.choice(_seeds(self.seeds)))
        chosen = [name for name in files if self._mutation(name)]
        for name in draw.sample(chosen, 1 if draw.random() < 0.8 else min(2, len(chosen))):
            mutate = self._mutation(name)
            assert mutate is not None
            files[name] = mutate(files[name], draw)
        if "dataset.json" in files and draw.random() < 0.7:
            files["dataset.json"] = _with_true_sizes(files)
        return files

    def _mutation(self, name: str) -> Mutation | None:
        return next((mutate for end, mutate in self.damaged.items() if name.endswith(end)), None)


@cache
def _seeds(make: Callable[[], Sequence[Files]]) -> Sequence[Files]:
    return make()


# Sound files -----------------------------------------------------------------------------------------


def _pixels(channels: int, dtype: type = np.uint8) -> np.ndarray:
    shape = (SIDE, SIDE + 3, channels) if channels > 1 else (SIDE, SIDE + 3)
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape).astype(dtype)


def _encoded(picture: Any, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _pictures(kind: str) -> list[Any]:
    from PIL import Image

    colour, grey = Image.fromarray(_pixels(3)), Image.fromarray(_pixels(1))
    found = [colour, grey, grey.convert("1")]
    if kind != "JPEG":
        found += [colour.convert("P"), colour.convert("RGBA")]
    if kind in ("PNG", "TIFF"):
        found += [Image.fromarray(_pixels(1, np.uint16)), grey.convert("LA")]
    return [one.convert("L") if kind == "JPEG" and one.mode == "1" else one for one in found]


def png_seeds() -> list[Files]:
    from PIL import Image

    exif = Image.Exif()
    exif[274] = 6
    found = [{"a.png": _encoded(one, "PNG")} for one in _pictures("PNG")]
    found.append({"a.png": _encoded(_pictures("PNG")[0], "PNG", exif=exif)})
    wide = io.BytesIO(found[0]["a.png"])  # 16-bit colour, which Pillow does not write
    with Image.open(wide) as _:
        found.append({"a.png": _png_of_16_bit_colour()})
    return found


def _png_of_16_bit_colour() -> bytes:
    import struct
    import zlib

    rows = _pixels(3, np.uint16).astype(">u2")
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], 16, 2, 0, 0, 0))]
    chunks += [(b"IDAT", packed), (b"IEND", b"")]
    written = b"\x89PNG\r\n\x1a\n"
    for name, content in chunks:
        written += struct.pack(">I", len(content)) + name + content
        written += struct.pack(">I", zlib.crc32(name + content))
    return written


def jpeg_seeds() -> list[Files]:
    from PIL import Image

    exif = Image.Exif()
    exif[274] = 8
    found = [{"a.jpg": _encoded(one, "JPEG", quality=80)} for one in _pictures("JPEG")]
    found.append({"a.jpg": _encoded(_pictures("JPEG")[0], "JPEG", exif=exif, progressive=True)})
    found.append({"a.jpg": _encoded(_pictures("JPEG")[0].convert("CMYK"), "JPEG")})
    archive = DATA / "kvasir-seg-320.zip"
    if archive.is_file():
        with zipfile.ZipFile(archive) as pack:
            names = sorted(name for name in pack.namelist() if name.lower().endswith((".jpg", ".jpeg")))
            found += [{"a.jpg": pack.read(name)} for name in (*names[:2], *names[-2:])]
    return found


def tiff_seeds() -> list[Files]:
    import tifffile

    found = [{"a.tif": _encoded(one, "TIFF")} for one in _pictures("TIFF")]
    colour, grey, bits = _pictures("TIFF")[:3]
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        found.append({"a.tif": _encoded(colour, "TIFF", compression=compression)})
    found.append({"a.tif": _encoded(bits, "TIFF", compression="group4")})
    found.append({"a.tif": _encoded(grey, "TIFF", save_all=True, append_images=[grey])})
    for array in (_pixels(3, np.uint16), _pixels(1).astype(np.float32), _pixels(1).astype(np.int32)):
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, array, tile=(16, 16), photometric="rgb" if array.ndim == 3 else "minisblack")
        found.append({"a.tif": buffer.getvalue()})
    return found


def bmp_seeds() -> list[Files]:
    return [{"a.bmp": _encoded(one, "BMP")} for one in _pictures("BMP")]


def _scan(dtype: type) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 100, (7, 6, 5)).astype(dtype)


def nifti_seeds(*, packed: bool) -> list[Files]:
    import nibabel

    affine = np.array([[1.5, 0.1, 0, -9], [-0.1, 1.5, 0, 4], [0, 0, 2.5, 7], [0, 0, 0, 1]])
    found = []
    for kind, dtype in ((nibabel.Nifti1Image, np.int16), (nibabel.Nifti1Image, np.float32)):
        image = kind(_scan(dtype), affine)
        image.set_qform(affine, code=1)
        image.header.set_slope_inter(2, -5) if dtype is np.int16 else None
        found.append(image.to_bytes())
    found.append(nibabel.Nifti2Image(_scan(np.uint8), affine).to_bytes())
    return [{"a.nii.gz": gzip.compress(one, 1, mtime=0)} if packed else {"a.nii": one} for one in found]


def itk_seeds(suffix: str) -> list[Files]:
    import tempfile

    import SimpleITK as sitk

    found = []
    for dtype in (np.int16, np.float32, np.uint8):
        for packed in (False, True):
            image = sitk.GetImageFromArray(_scan(dtype))
            image.SetSpacing((0.7, 0.8, 2.0))
            with tempfile.TemporaryDirectory() as folder:
                sitk.WriteImage(image, f"{folder}/a{suffix}", packed)
                found.append({path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())})
    return found


def dicom_seeds() -> list[Files]:
    """A series of three slices in several transfer syntaxes, JPEG lossless and JPEG 2000 among them."""
    import tempfile

    import SimpleITK as sitk
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless

    from tests.dicom_slices import ct_slice

    fields = {
        "SeriesInstanceUID": "1.2.4",
        "StudyInstanceUID": "1.2.5",
        "FrameOfReferenceUID": "1.2.7",
        "SeriesDescription": "CT thin",
        "RescaleSlope": 2,
        "RescaleIntercept": -1024,
    }
    series: list[Files] = []
    for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless):
        files = {}
        for k in range(3):
            data = ct_slice(_scan(np.int16).T[k], [0, 0, 2.0 * k], InstanceNumber=k + 1, **fields)
            data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{k + 1}"
            if syntax.is_implicit_VR:
                data.file_meta.TransferSyntaxUID = syntax
            if syntax == RLELossless:
                data.compress(RLELossless)
            buffer = io.BytesIO()
            data.save_as(buffer, enforce_file_format=True)
            files[f"{k}.dcm"] = buffer.getvalue()
        series.append(files)
    for compressor in ("JPEG", "JPEG2000"):
        # The encoder crashes on images of a few pixels; it is no part of sdseg, the decoder is.
        image = sitk.GetImageFromArray(
            np.random.default_rng(2).integers(0, 900, (1, 32, 32)).astype(np.int16)
        )
        for tag, value in {"0008|0060": "CT", "0020|000e": "1.2.6", "0008|103e": "packed"}.items():
            image.SetMetaData(tag, value)
        with tempfile.TemporaryDirectory() as folder:
            writer = sitk.ImageFileWriter()
            writer.SetFileName(f"{folder}/0.dcm")
            writer.UseCompressionOn()
            writer.SetCompressor(compressor)
            writer.KeepOriginalImageUIDOn()
            writer.Execute(image)
            series.append({"0.dcm": Path(folder, "0.dcm").read_bytes()})
    return series


def recipe_seeds() -> list[Files]:
    from sdseg_cli.core.recipe import resources_root

    return [{"a.yaml": path.read_bytes()} for path in sorted(resources_root().glob("*.yaml"))]


def split_seeds() -> list[Files]:
    from sdseg_cli.core.recipe import resources_root

    short = b"name: own\ntrain:\n- '007'\n- b c\nvalidation: [x, y]\ntest: []\n"
    files = sorted((resources_root() / "splits").glob("*.yaml"))
    return [{"a.yaml": short}, *({"a.yaml": path.read_bytes()[:4000]} for path in files)]


def segmentation_seeds() -> list[Files]:
    """A DICOM-SEG of two segments, which lacks the slice that holds nothing."""
    import tempfile

    from sdseg_cli.core.data.dicom import find_series
    from sdseg_cli.core.data.dicom_codes import codes_of
    from sdseg_cli.core.data.dicom_seg import write_dicom_seg

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, content in dicom_seeds()[0].items():
            (folder / file).write_bytes(content)
        (series,) = find_series(list(folder.iterdir())).series
        labels = np.zeros((7, 6, 3), np.uint8)
        labels[1:4, 1:3, :2], labels[5, 4, 1] = 1, 2
        write_dicom_seg(folder / "seg", labels, series, codes_of(("background", "liver", "x"), {}))
        return [{"a.dcm": (folder / "seg").read_bytes()}]


def codes_seeds() -> list[Files]:
    text = b"""polyp: SCT:41329004:Polyp
stone:
  type: "99CLINIC:K-7:Stone: large"
  category: SCT:49755003:Morphologically Abnormal Structure
  side: right
  region: SCT:64033007:Kidney
"""
    return [{"a.yaml": text}]


def dataset_seeds() -> list[Files]:
    """A prepared data set of a few phantoms."""
    import tempfile

    from sdseg_cli.commands.prepare import phantom

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        out = Path(folder) / "data"
        phantom(kind="organs", cases=6, size=2 * SIDE, seed=0, fractions="0.6,0.2,0.2", out=out, workers=1)
        found = {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    return [found]


def _with_true_sizes(files: Files) -> bytes:
    """The manifest with the sizes that the files now have: a damaged one then is no torn one."""
    try:
        manifest = json.loads(files["dataset.json"])
        manifest["files"] = {name: len(files[name]) for name in files if name != "dataset.json"}
        return json.dumps(manifest).encode()
    except (ValueError, TypeError):
        return files["dataset.json"]


def nnunet_seeds() -> list[Files]:
    second = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1}, "file_ending": ".png"}
    first = {"modality": {"0": "CT"}, "labels": {"0": "background", "1": "a"}, "name": "X"}
    files = {"imagesTr/a_0000.png": b"", "labelsTr/a.png": b"", "imagesTr/b_0000.nii.gz": b""}
    return [{"dataset.json": json.dumps(one).encode(), **files} for one in (first, second)]


def run_seeds() -> list[Files]:
    from sdseg_cli.core.recipe import resources_root

    record = {
        "recipe": "kseg-fast",
        "status": "finished",
        "started": "2026-01-01T00:00:00+00:00",
        "ended": "2026-01-01T01:00:00+00:00",
        "best": {"step": 4, "dice": 0.5},
        "processes": 1,
    }
    step = {"progress": {"step": 4}, "dataset": "0" * 64, "files": {"model.safetensors": "1" * 64}}
    return [
        {
            "run.json": json.dumps(record).encode(),
            "recipe.yaml": (resources_root() / "kseg-fast.yaml").read_bytes(),
            "metrics.jsonl": b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": NaN}\n{"step": 2, "va',
            "model/model_index.json": b"{}",
            "checkpoints/step-000004/manifest.json": json.dumps(step).encode(),
            "checkpoints/step-000004/model.safetensors": b"",
        }
    ]


def manifest_seeds() -> list[Files]:
    config, mask = b"{}", b"mask"
    sums = {"config.json": hashlib.sha256(config).hexdigest()}
    manifest = {"kind": "autoencoder", "files": sums, "bytes": {"config.json": len(config)}}
    lines: list[dict[str, Any]] = [
        {"call": "a", "time": 1.5, "command": ["sdseg"], "planned": ["a.png", "b.png"]},
        {"call": "a", "time": 2.5, "removed": ["b.png"]},
        {"call": "a", "time": 3, "files": {"a.png": hashlib.sha256(mask).hexdigest()}, "bytes": {"a.png": 4}},
    ]
    journal = "".join(json.dumps(line) + "\n" for line in lines).encode()
    return [
        {"manifest.json": json.dumps(manifest).encode(), "config.json": config},
        {"prediction.json": b"{}", "a.png": mask, "b.png": mask, "provenance/a.jsonl": journal},
    ]


def archive_seeds(kind: str) -> list[Files]:
    files = {"a/1.txt": b"one" * 20, "a/b/2.txt": b"two", "größe.txt": b"three"}
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as pack:
            for name, content in files.items():
                pack.writestr(name, content)
    else:
        with tarfile.open(fileobj=buffer, mode="w:" + kind.partition(".")[2]) as pack:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                pack.addfile(member, io.BytesIO(content))
    return [{f"a.{kind}": buffer.getvalue()}]


def safetensors_seeds() -> list[Files]:
    import torch
    from safetensors.torch import save

    draw = torch.Generator().manual_seed(0)
    state = {f"layer.{i}.weight": torch.randn(3, 2 + i, generator=draw) for i in range(3)}
    state["count"] = torch.tensor(5)
    return [{"a.safetensors": save(state, metadata={"format": "pt"})}]


@cache
def _published() -> dict[str, Any]:
    """Small checkpoints of every published kind, as tests of the conversion make them."""
    from tests.model import test_official as made

    whole = made.a_checkpoint()
    return {
        "sdseg": whole,
        "classes": made.a_checkpoint(classes=3),
        "ldm": {name: value for name, value in whole.items() if name.startswith("model")},
        "autoencoder": made.an_autoencoder()[1],
    }


def checkpoint_seeds() -> list[Files]:
    import torch

    found = []
    for state in _published().values():
        buffer = io.BytesIO()
        torch.save({"state_dict": state, "epoch": 3, "optimizer_states": [{"state": {}}]}, buffer)
        found.append({"a.ckpt": buffer.getvalue()})
    small = io.BytesIO()
    torch.save({"a": torch.zeros(3), "b": torch.ones(2, 2)}, small)
    old = io.BytesIO()
    torch.save({"a": torch.zeros(3), "b": torch.ones(2, 2)}, old, _use_new_zipfile_serialization=False)
    return [*found, *({"a.ckpt": small.getvalue()}, {"a.ckpt": old.getvalue()}) * 3]


def damage_checkpoint(payload: bytes, draw: random.Random) -> bytes:
    """Damage the file, its pickle behind right checksums, or names, shapes and types of the tensors."""
    import torch

    if draw.random() < 0.6:
        if not zipfile.is_zipfile(io.BytesIO(payload)):
            return damage(payload, draw)
        return through_zip(damage)(payload, draw)
    state = dict(draw.choice(list(_published().values())))
    for _ in range(draw.choice((1, 1, 3))):
        name = draw.choice(sorted(state))
        value = state[name]
        action = draw.randrange(7)
        if action == 0:
            del state[name]
        elif action == 1:
            state[draw.choice((name + ".x", "model.diffusion_model.input_blocks.99.0.weight", "é", ""))] = (
                value
            )
        elif action == 2:
            state[name] = torch.zeros(draw.choice(((), (0,), (1,), (3, 3), (1, 2, 3, 4, 5), (64, 64, 1, 1))))
        elif action == 3:
            state[name] = value.to(draw.choice((torch.int64, torch.bool, torch.float16, torch.complex64)))
        elif action == 4:
            state[name] = torch.full_like(value, float("nan")) if value.is_floating_point() else value - 9
        elif action == 5:
            state[name] = draw.choice((None, "text", 3, [value], {"a": value}))
        else:
            state[name] = torch.cat([value, value]) if value.ndim else value
    buffer = io.BytesIO()
    wrapped = draw.choice(({"state_dict": state}, state, {"state_dict": {"state_dict": state}}, [state]))
    torch.save(wrapped, buffer)
    return buffer.getvalue()


def model_seeds() -> list[Files]:
    """A model folder of the smallest networks."""
    import tempfile

    from sdseg_cli.core.engine.networks import build_networks
    from sdseg_cli.core.recipe import recipe_from_values

    tiny = {
        "image_encoder": "kl",
        "image_encoder_channels": [32, 32, 32, 32],
        "image_encoder_blocks": 1,
        "unet_channels": [32, 32],
        "unet_blocks": 1,
        "unet_heads": 4,
        "unet_attention_strides": [2],
    }
    recipe = recipe_from_values(
        {"name": "tiny", "data": {"dataset": "none", "image_size": 32}, "model": tiny}
    )
    manifest = _manifest()
    pipeline = build_networks(recipe, 2).pipeline(manifest, recipe, 1.0)
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_pretrained(folder)
        root = Path(folder)
        return [{str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}]


def _manifest() -> Any:
    from sdseg_cli.core.data.prepared import DatasetManifest

    return DatasetManifest(
        name="tiny",
        classes=("background", "a"),
        image_size=32,
        resize="squeeze",
        source="made",
        licence="none",
        splits={"train": 1, "validation": 0, "test": 0},
        preparation={"window": [0, 1], "axis": "axial"},
        sources={"a.png": "0" * 64},
        fingerprint="0" * 64,
        files={"train/a.arrow": 3},
    )


# Made by hypothesis ----------------------------------------------------------------------------------


def made_texts() -> Any:
    """YAML or JSON texts: values nested at will, written out, or plain characters."""
    import yaml
    from hypothesis import strategies as st

    words = st.sampled_from(
        ["data", "model", "train", "name", "validation", "test", "steps", "image_size", "dataset", "0", "-"]
    )
    leaves = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_subnormal=False),
        st.text(max_size=20),
        words,
        st.dates(),
    )
    values = st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.one_of(words, st.text(max_size=5)), inner, max_size=5)
        ),
        max_leaves=20,
    )
    marks = st.text("-?:[]{}&*!|>%@`'\"#, \n\t0a1e._~\\é\0\x85\u2028\ufeff", max_size=80)

    def dumped(value: Any) -> str:
        return yaml.safe_dump(value, allow_unicode=True)

    names = st.lists(st.text(max_size=8), max_size=4)
    splits = st.fixed_dictionaries({"train": names, "validation": names, "test": names}).map(dumped)
    recipes = st.dictionaries(words, values, max_size=3).map(lambda some: dumped({**_recipe(), **some}))
    texts = st.one_of(
        values.map(dumped), marks, st.text(max_size=200), _lines(words, marks), splits, recipes, recipes
    )
    return texts.map(lambda text: {"a.yaml": text.encode("utf-8", "surrogatepass")})


@cache
def _recipe() -> dict[str, Any]:
    from sdseg_cli.core.recipe import resources_root
    from sdseg_cli.core.strict_yaml import parse_yaml

    return parse_yaml((resources_root() / "kseg-fast.yaml").read_text(encoding="utf-8")).values


def _lines(words: Any, marks: Any) -> Any:
    from hypothesis import strategies as st

    line = st.builds(
        lambda depth, key, value: f"{'  ' * depth}{key}: {value}", st.integers(0, 3), words, marks
    )
    return st.lists(line, max_size=8).map("\n".join)


def made_manifests() -> Any:
    """A manifest with one to three fields of any JSON value."""
    from dataclasses import asdict, fields

    from hypothesis import strategies as st

    base = asdict(_manifest())
    names = st.sampled_from([entry.name for entry in fields(_manifest())])
    leaves = st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_subnormal=False), st.text(max_size=20)
    )
    values = st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=8,
    )
    changes = st.dictionaries(names, values, min_size=1, max_size=3)
    return changes.map(
        lambda some: {"dataset.json": json.dumps({**base, **some}).encode("utf-8", "surrogatepass")}
    )


# Ways in -----------------------------------------------------------------------------------------------


class Bright:
    """A stub in place of the network: bright pixels are foreground."""

    image_size, resize, classes, num_classes = 32, "squeeze", ("background", "<b>bright</b>"), 2

    def __call__(self, inputs: Iterable[Any]) -> Iterator[Any]:
        from sdseg_cli.core.engine.inference import SlicePrediction

        stream = iter(inputs)
        while batch := list(islice(stream, 16)):
            for one in batch:
                level = one.grid.probabilities_to_case(one.image.mean(axis=-1).astype(np.float32) / 255)
                yield SlicePrediction(
                    one.case_id,
                    one.slice_index,
                    (level > 0.5).astype(np.uint8),
                    np.stack([1 - level, level]),
                    np.zeros_like(level),
                    None,
                )


def predict(given: Path, out: Path, *, mask_format: str = "same") -> str:
    """All of ``predict`` but the network; what failed, or ""."""
    from sdseg_cli.core.engine.prediction import predict_files, write_summary
    from sdseg_cli.core.engine.prediction_plan import plan_predictions

    # Overlays take most of the time; one input in sixteen gets them.
    overlays = sum(path.stat().st_size for path in given.iterdir()) % 16 == 0
    tasks = plan_predictions(
        [given],
        out,
        overlays=overlays,
        probabilities=mask_format == "same",
        mask_format=mask_format,  # type: ignore[arg-type]
    )
    records = list(predict_files(tasks, Bright(), readers=1, writers=1))  # type: ignore[arg-type]
    assert len(records) == len(tasks)
    for task, record in zip(tasks, records, strict=True):
        assert task.is_done == (record.status == "done"), record
        assert record.status == "done" or record.error
    write_summary(out / "summary.csv", tasks, records, Bright.classes)
    return "; ".join(record.error for record in records if record.status == "failed")


def picture(given: Path, out: Path) -> None:
    from sdseg_cli.core.data.images import read_label_map, read_orientation
    from sdseg_cli.core.errors import SdsegError

    out.mkdir(exist_ok=True)
    failed = predict(given, out)
    file = next(given.iterdir())
    options: list[dict[str, Any]] = [{}, {"num_classes": 2}, {"threshold": 127}]
    options += [{"label_values": {0: 0, 255: 1}}, {"num_classes": 9}]
    for chosen in options:
        _allowed(partial(read_label_map, file, **chosen), SdsegError)
    _allowed(partial(read_orientation, file), SdsegError)
    _refuse(failed)


def volume(given: Path, out: Path) -> None:
    from sdseg_cli.core.data.volumes import read_label_volume, read_volume
    from sdseg_cli.core.errors import SdsegError

    out.mkdir(exist_ok=True)
    failed = predict(given, out)
    file = next(path for path in sorted(given.iterdir()) if path.suffix not in (".raw", ".zraw"))
    for chosen in ({}, {"num_classes": 2}, {"label_values": {0: 0, 1: 1}}):
        _allowed(partial(read_label_volume, file, **chosen), SdsegError)  # type: ignore[arg-type]
    _allowed(partial(read_volume, file, nan_fill=0.0), SdsegError)
    _refuse(failed)


def series(given: Path, out: Path) -> None:
    out.mkdir(exist_ok=True)
    _refuse(predict(given, out))


def series_to_segmentation(given: Path, out: Path) -> None:
    out.mkdir(exist_ok=True)
    _refuse(predict(given, out, mask_format="dicom-seg"))


def segmentation(given: Path, out: Path) -> None:
    from sdseg_cli.core.data.dicom_seg import LoneDicomSeg

    volume = LoneDicomSeg.open(given / "a.dcm").volume()
    assert volume.voxels.shape == volume.geometry.shape


def recipe(given: Path, out: Path) -> None:
    from sdseg_cli.core.recipe import load_recipe, recipe_to_yaml

    recipe_to_yaml(load_recipe(given / "a.yaml", ["train.seed=5"]))


def split(given: Path, out: Path) -> None:
    from sdseg_cli.core.data.splits import check_split, read_split, split_to_yaml
    from sdseg_cli.core.errors import SdsegError

    found = read_split(given / "a.yaml")
    again = out.with_suffix(".yaml")
    again.write_text(split_to_yaml(found, "header"), encoding="utf-8")
    assert read_split(again).parts() == found.parts()
    again.unlink()
    groups = {"007": "a", "b c": "b"}
    _allowed(partial(check_split, found, groups, where="here", may_share_groups=False), SdsegError)


def codes(given: Path, out: Path) -> None:
    from sdseg_cli.core.data.dicom_codes import codes_of, coding_remarks, read_segment_codes

    stated = read_segment_codes(given / "a.yaml")
    assert coding_remarks(codes_of(("background", *stated), stated))


def dataset(given: Path, out: Path) -> None:
    from sdseg_cli.core.data.prepared import PreparedDataset

    opened = PreparedDataset.open(given)
    opened.manifest.to_json()
    assert opened.manifest.num_classes >= 0
    for name in opened.manifest.splits:
        view = opened.split(name)
        assert len(view.case_ids) == len(view.groups) == len(view)
        for item in view:
            item.grid.labels_to_model(item.label_map)


def nnunet(given: Path, out: Path) -> None:
    from sdseg_cli.core.data.nnunet import find_nnunet, read_nnunet

    find_nnunet(read_nnunet(given), None)


def run_directory(given: Path, out: Path) -> None:
    from sdseg_cli.core.engine.checkpoints import _verify
    from sdseg_cli.core.errors import SdsegError
    from sdseg_cli.core.run_directory import RunDirectory, all_runs, newest_finished_run, resolve_model

    run = RunDirectory.open(given)
    steps: tuple[Callable[[], Any], ...] = (
        lambda: run.status,
        run.read_recipe,
        run.read_metrics,
        lambda: newest_finished_run(given.parent),
        lambda: [one.status for one in all_runs(given.parent)],
        lambda: resolve_model(str(given)),
        lambda: resolve_model(None, given.parent),
        lambda: [_verify(run, one) for one in run.all_checkpoints()],
    )
    said = [_allowed(step, SdsegError) for step in steps]
    _refuse("; ".join(filter(None, said[:3])))


def manifest(given: Path, out: Path) -> None:
    from sdseg_cli.core.errors import SdsegError
    from sdseg_cli.core.integrity import refuse_altered
    from sdseg_cli.core.manifest import unfinished
    from sdseg_cli.core.verification import find_parts

    refused = _allowed(lambda: refuse_altered(given), SdsegError)
    unfinished(given)
    parts = find_parts(given)
    found = [str(one) for part in parts for one in part.differences]
    found += [str(part.compare(name) or "") for part in parts for part, name in part.files()]
    _refuse("; ".join(filter(None, [refused, *found])))


def archive(given: Path, out: Path) -> None:
    from sdseg_cli.core.data.archives import is_archive, unpack

    (file,) = given.iterdir()
    is_archive(file)
    out.mkdir(exist_ok=True)
    unpack(file, out, max_bytes=2**20)


def weights(given: Path, out: Path) -> None:
    from sdseg_cli.core.model.official import load_published

    (file,) = given.iterdir()
    load_published(file)


def model(given: Path, out: Path) -> None:
    from sdseg_cli.core.model.weights import load_pipeline

    load_pipeline(str(given))


def _refuse(failed: str) -> None:
    from sdseg_cli.core.errors import DataError

    if failed:
        raise DataError(failed)


def _allowed(step: Callable[[], Any], kind: type[Exception]) -> str:
    """Do a step that may fail with errors of a kind; what it said, or ""."""
    try:
        step()
    except kind as error:
        return str(error)
    return ""


def _quiet(read: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    def quietly(given: Path, out: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(given, out)

    return quietly


PARSERS: dict[str, Parser] = {
    "recipe": Parser(recipe, recipe_seeds, {"": damage_text}),
    "recipe, made": Parser(recipe, made=made_texts),
    "split": Parser(split, split_seeds, {"": damage_text}),
    "split, made": Parser(split, made=made_texts),
    "codes": Parser(codes, codes_seeds, {"": damage_text}, share=0.3),
    "dataset": Parser(
        dataset, dataset_seeds, {".json": damage_json, ".arrow": damage, "split.yaml": damage}, share=1.5
    ),
    "dataset, made": Parser(dataset, made=made_manifests),
    "nnunet": Parser(nnunet, nnunet_seeds, {".json": damage_json}),
    "run": Parser(
        run_directory, run_seeds, {".json": damage_json, ".jsonl": damage_text, ".yaml": damage_text}
    ),
    "manifest": Parser(manifest, manifest_seeds, {".json": damage_json, ".jsonl": damage_text}),
    "png": Parser(picture, png_seeds, {"": damage_png}),
    "jpeg": Parser(picture, jpeg_seeds, {"": damage}),
    "tiff": Parser(picture, tiff_seeds, {"": damage}, share=1.5),
    "bmp": Parser(picture, bmp_seeds, {"": damage}),
    "nii": Parser(volume, partial(nifti_seeds, packed=False), {"": damage_nifti}),
    "nii.gz": Parser(volume, partial(nifti_seeds, packed=True), {"": through_gzip(damage_nifti)}),
    "nrrd": Parser(volume, partial(itk_seeds, ".nrrd"), {"": damage_head}),
    "nhdr": Parser(volume, partial(itk_seeds, ".nhdr"), {".nhdr": damage_text, "": damage}),
    "mha": Parser(volume, partial(itk_seeds, ".mha"), {"": damage_head}),
    "mhd": Parser(volume, partial(itk_seeds, ".mhd"), {".mhd": damage_text, "": damage}),
    "dicom": Parser(series, dicom_seeds, {"": damage_dicom}, share=2.0),
    "dicom-seg": Parser(series_to_segmentation, dicom_seeds, {"": damage_dicom}, share=0.3),
    "dicom-seg, read": Parser(segmentation, segmentation_seeds, {"": damage_dicom}, share=0.3),
    "zip": Parser(archive, partial(archive_seeds, "zip"), {"": through_zip(damage)}),
    "tar": Parser(archive, partial(archive_seeds, "tar"), {"": damage_tar}),
    "tar.gz": Parser(archive, partial(archive_seeds, "tar.gz"), {"": through_gzip(damage_tar)}),
    "tar.xz": Parser(archive, partial(archive_seeds, "tar.xz"), {"": through_xz(damage_tar)}, share=0.5),
    "safetensors": Parser(weights, safetensors_seeds, {"": damage_safetensors}),
    "checkpoint": Parser(weights, checkpoint_seeds, {"": damage_checkpoint}),
    "model": Parser(
        model, model_seeds, {".json": damage_json, ".safetensors": damage_safetensors}, share=0.2
    ),
}


def read_with(name: str, given: Path, out: Path) -> None:
    """Let a parser read an input; warnings of libraries are not looked at."""
    _quiet(PARSERS[name].read)(given, out)


def clean(folder: Path) -> None:
    """Remove what an input and its reading left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

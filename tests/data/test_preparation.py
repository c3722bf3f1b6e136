import json
import os
import pickle
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from sdseg_cli.core.data.arrow_tables import Tables
from sdseg_cli.core.data.gathering import Description
from sdseg_cli.core.data.pairs import pair_folders
from sdseg_cli.core.data.preparation import prepare
from sdseg_cli.core.data.prepared import DatasetManifest, PreparedDataset
from sdseg_cli.core.data.raw_cases import Geometry, Problem, RawCase
from sdseg_cli.core.data.splits import Split, make_split, read_split
from sdseg_cli.core.errors import DataError, UsageError
from sdseg_cli.core.files import sha256_of

DESCRIPTION = Description("small", ("background", "polyp"), "made up", "none")


def draw(index, size=(20, 30)):
    """A picture and its mask; a module-level function, so that other processes can call it."""
    random = np.random.default_rng(index)
    label_map = np.zeros(size, np.uint8)
    label_map[5:12, 5 + index % 7 : 15] = 1
    return random.integers(0, 256, (*size, 3), np.uint8), label_map


def drawn_cases(count=8):
    return [
        RawCase(f"c{index}", f"g{index // 2}", arrays=partial(draw, index, (20 + index, 30)))
        for index in range(count)
    ]


def split_of(cases, seed=0):
    return make_split({case.case_id: case.case_id for case in cases}, [0.5, 0.25, 0.25], seed=seed)


def run(cases, out, **options):
    options = {"description": DESCRIPTION, "geometry": Geometry(image_size=16), "workers": 1, **options}
    split = options.pop("split", None) or split_of(cases)
    return list(prepare(cases, split, out, **options))


def everything_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.fixture
def files(tmp_path):
    """Four image files and their masks, in two folders."""
    for index in range(4):
        image, label_map = draw(index)
        for folder, array in (("images", image), ("masks", label_map * 255)):
            (tmp_path / "raw" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(tmp_path / "raw" / folder / f"{index}.png")
    return tmp_path / "raw"


def pairs_of(files):
    return pair_folders(files / "images", files / "masks").cases


# What is written


def test_a_prepared_slice_is_the_image_on_the_model_grid_and_the_label_map_on_its_own(tmp_path):
    cases = drawn_cases()
    run(cases, tmp_path / "out")
    view = PreparedDataset.open(tmp_path / "out").split("train")
    first = view[0]
    index = int(first.case_id[1:])
    image, label_map = draw(index, (20 + index, 30))
    assert np.array_equal(first.label_map, label_map)
    assert np.array_equal(first.image, first.grid.image_to_model(image))
    assert (first.image.dtype, first.image.shape) == (np.uint8, (16, 16, 3))
    assert (first.grid.height, first.grid.width, first.grid.resize) == (20 + index, 30, "squeeze")
    assert (first.slice_index, first.group, first.spacing_mm) == (0, f"g{index // 2}", None)


def test_a_split_view_is_a_sequence(tmp_path):
    cases = drawn_cases()
    split = split_of(cases)
    run(cases, tmp_path / "out", split=split)
    dataset = PreparedDataset.open(tmp_path / "out")
    view = dataset.split("train")
    assert view.case_ids == list(split.train)
    assert [item.case_id for item in view] == list(split.train)
    assert view[-1].case_id == split.train[-1]
    assert [item.case_id for item in view[1:3]] == list(split.train[1:3])
    with pytest.raises(IndexError, match="split train has 4 slices, asked for number 4"):
        view[4]
    with pytest.raises(UsageError, match="no split 'all'; there are train, validation, test"):
        dataset.split("all")


def test_a_split_view_can_be_sent_to_another_process(tmp_path):
    run(drawn_cases(), tmp_path / "out")
    view = PreparedDataset.open(tmp_path / "out").split("train")
    first = view[0]
    sent = pickle.dumps(view)
    assert len(sent) < 1000
    assert np.array_equal(pickle.loads(sent)[0].image, first.image)  # noqa: S301


def test_the_folder_is_a_dataset_dict_of_the_datasets_library(tmp_path):
    run(drawn_cases(), tmp_path / "out")
    loaded = datasets.load_from_disk(str(tmp_path / "out"))
    assert {name: len(part) for name, part in loaded.items()} == {"train": 4, "validation": 2, "test": 2}
    row = loaded["train"][0]
    assert row["image"].size == (16, 16)
    assert row["label_map"].size == (row["width"], row["height"])


def test_an_empty_split_is_allowed(tmp_path):
    cases = drawn_cases(3)
    run(cases, tmp_path / "out", split=Split("all", tuple(case.case_id for case in cases), (), ()))
    dataset = PreparedDataset.open(tmp_path / "out")
    assert (len(dataset.split("train")), len(dataset.split("test"))) == (3, 0)
    assert dataset.split("test").case_ids == []


def test_the_split_that_was_used_lies_beside_the_data(tmp_path):
    cases = drawn_cases()
    split = split_of(cases)
    run(cases, tmp_path / "out", split=split)
    assert read_split(tmp_path / "out" / "split.yaml") == split


def test_the_manifest_says_what_the_data_is(tmp_path, files):
    run(pairs_of(files), tmp_path / "out", geometry=Geometry(image_size=16, resize="pad", threshold=127))
    manifest = PreparedDataset.open(tmp_path / "out").manifest
    assert (manifest.name, manifest.classes, manifest.num_classes) == ("small", ("background", "polyp"), 2)
    assert (manifest.image_size, manifest.resize) == (16, "pad")
    assert manifest.splits == {"train": 2, "validation": 1, "test": 1}
    assert manifest.preparation["threshold"] == 127
    assert manifest.preparation["statistics"]["train"]["polyp"]["slices"] == 2
    assert len(manifest.sources) == 8
    assert manifest.sources["masks/2.png"] == sha256_of(files / "masks" / "2.png")
    assert DatasetManifest.from_json(manifest.to_json()) == manifest


def test_the_fingerprint_follows_the_content_and_nothing_else(tmp_path):
    def fingerprint(name, cases, **options):
        run(cases, tmp_path / name, **options)
        return PreparedDataset.open(tmp_path / name).manifest.fingerprint

    cases = drawn_cases()
    first = fingerprint("a", cases)
    assert fingerprint("b", list(reversed(cases))) == first
    renamed = Description("other", DESCRIPTION.classes, "elsewhere", "free")
    assert fingerprint("c", cases, description=renamed) == first
    assert fingerprint("d", cases, split=split_of(cases, seed=1)) != first
    assert fingerprint("e", cases, geometry=Geometry(image_size=24)) != first
    assert fingerprint("f", [RawCase("c0", "g0", arrays=partial(draw, 99, (20, 30))), *cases[1:]]) != first


def test_several_processes_give_the_same_dataset_in_the_same_order(tmp_path):
    cases = drawn_cases()
    records = run(cases, tmp_path / "one")
    assert run(cases, tmp_path / "two", workers=2) == records
    one, two = (PreparedDataset.open(tmp_path / name) for name in ("one", "two"))
    assert one.manifest.fingerprint == two.manifest.fingerprint


def test_the_sheet_shows_cases_of_every_split_on_the_model_grid(tmp_path):
    shown = []

    def draw_sheet(items):
        shown.extend(items)
        return np.full((4, 5, 3), 9, np.uint8)

    run(drawn_cases(), tmp_path / "out", draw_sheet=draw_sheet)
    assert {title.split(":")[0] for title, _, _ in shown} == {"train", "validation", "test"}
    assert {(image.shape, label_map.shape) for _, image, label_map in shown} == {((16, 16, 3), (16, 16))}
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.size == (5, 4)


def test_16_bit_images_are_counted_in_the_manifest(tmp_path, files):
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)).save(files / "images" / "1.png")
    records = run(pairs_of(files), tmp_path / "out")
    assert [record.notes for record in records if record.notes] == [("16-bit scaled from [0, 599]",)]
    manifest = PreparedDataset.open(tmp_path / "out").manifest
    assert manifest.preparation["notes"] == {"16-bit scaled": 1}


# Bad cases


def spoil(files):
    """Four kinds of fault in four cases."""
    (files / "images" / "0.png").write_bytes(b"")
    whole = (files / "masks" / "1.png").read_bytes()
    (files / "masks" / "1.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((20, 31), np.uint8)).save(files / "masks" / "2.png")


@pytest.mark.faults(13)
def test_every_bad_case_is_listed_in_one_pass_and_nothing_is_written(tmp_path, files):
    spoil(files)
    before = everything_in(tmp_path)
    with pytest.raises(DataError) as caught:
        run(pairs_of(files), tmp_path / "out", problems=[Problem("9", "image 9.png has no mask")])
    message = str(caught.value)
    assert message.startswith("4 of 5 cases cannot be used; nothing was prepared:\n")
    assert "  9: image 9.png has no mask\n" in message
    assert "0.png: the file is empty (0 bytes)" in message
    assert "masks/1.png: cannot be decoded as PNG" in message
    assert "2: mask 2.png is 31x20 pixels, image 2.png is 30x20; both must be the same." in message
    assert "pass --exclude-bad to leave them out" in message
    assert everything_in(tmp_path) == before


@pytest.mark.faults(13)
def test_bad_cases_are_excluded_by_an_explicit_wish_and_recorded(tmp_path, files):
    spoil(files)
    problems = [Problem("9", "image 9.png has no mask")]
    records = run(pairs_of(files), tmp_path / "out", problems=problems, exclude_bad=True)
    assert sorted(record.case_id for record in records if record.problem) == ["0", "1", "2"]
    dataset = PreparedDataset.open(tmp_path / "out")
    assert sum(dataset.manifest.splits.values()) == 1
    assert set(dataset.manifest.preparation["excluded"]) == {"0", "1", "2", "9"}
    assert set(read_split(tmp_path / "out" / "split.yaml").of_case()) == {"3"}


@pytest.mark.faults
def test_bad_cases_are_found_in_other_processes_too(tmp_path, files):
    spoil(files)
    with pytest.raises(DataError, match="3 of 4 cases cannot be used"):
        run(pairs_of(files), tmp_path / "out", workers=2)


@pytest.mark.faults
def test_nothing_is_left_to_prepare(tmp_path, files):
    for file in (files / "images").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match=r"no case is left to prepare: 4 of 4 cases cannot be used"):
        run(pairs_of(files), tmp_path / "out", exclude_bad=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.faults
def test_masks_without_any_foreground_are_refused(tmp_path, files):
    for index in range(4):
        Image.fromarray(draw(index)[1] * 100).save(files / "masks" / f"{index}.png")
    with pytest.raises(DataError, match=r"not one of the 4 masks holds any foreground \(polyp\)"):
        run(pairs_of(files), tmp_path / "out", geometry=Geometry(image_size=16, threshold=127))


@pytest.mark.faults
def test_a_mask_on_the_stored_grid_of_a_turned_image_is_explained(tmp_path, files):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(draw(0)[0]).save(files / "images" / "0.png", exif=exif)
    with pytest.raises(DataError, match="The image carries EXIF orientation 6 and the mask does not"):
        run(pairs_of(files), tmp_path / "out")


@pytest.mark.faults
def test_a_turned_image_whose_mask_carries_no_tag_is_told(tmp_path, files):
    exif = Image.Exif()
    exif[274] = 3
    for name in ("images/0.png", "images/1.png", "masks/1.png"):
        Image.open(files / name).save(files / name, exif=exif)
    records = {record.case_id: record.notes for record in run(pairs_of(files), tmp_path / "out")}
    assert records["1"] == ("EXIF orientation 3 applied",)
    assert records["0"][1:] == (
        "turned by its EXIF orientation, its mask is not: taken as drawn on the turned image",
    )


@pytest.mark.faults
def test_a_file_that_vanishes_is_a_bad_case(tmp_path, files):
    cases = pairs_of(files)
    (files / "masks" / "3.png").unlink()
    with pytest.raises(DataError, match=r"3\.png: no such file"):
        run(cases, tmp_path / "out")


# The output folder


@pytest.mark.faults
def test_an_existing_dataset_is_replaced_only_by_an_explicit_wish(tmp_path):
    cases = drawn_cases()
    run(cases, tmp_path / "out")
    with pytest.raises(UsageError, match=r"the folder exists already\. Pass --overwrite"):
        run(cases, tmp_path / "out")
    run(cases, tmp_path / "out", overwrite=True, geometry=Geometry(image_size=24))
    assert PreparedDataset.open(tmp_path / "out").manifest.image_size == 24
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.faults
def test_a_folder_of_somebody_else_is_never_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="holds files that sdseg did not write"):
        run(drawn_cases(), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "out").mkdir()
    run(drawn_cases(), tmp_path / "out")
    assert len(PreparedDataset.open(tmp_path / "out").split("train")) == 4


@pytest.mark.faults
def test_a_run_that_is_stopped_leaves_nothing(tmp_path):
    cases = drawn_cases()
    records = prepare(
        cases, split_of(cases), tmp_path / "out", description=DESCRIPTION, geometry=Geometry(16)
    )
    next(records)
    assert len(list(tmp_path.iterdir())) == 1  # the temporary folder
    records.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.faults
def test_a_full_disk_leaves_the_old_dataset(tmp_path, monkeypatch):
    cases = drawn_cases()
    run(cases, tmp_path / "out")
    before = everything_in(tmp_path)

    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.DatasetDict, "save_to_disk", full)
    with pytest.raises(OSError, match="No space left"):
        run(cases, tmp_path / "out", overwrite=True)
    assert everything_in(tmp_path) == before
    assert len(PreparedDataset.open(tmp_path / "out").split("train")) == 4


@pytest.mark.faults
def test_an_interruption_between_the_two_renames_keeps_the_old_dataset(tmp_path, monkeypatch):
    cases = drawn_cases()
    run(cases, tmp_path / "out")
    before = everything_in(tmp_path)
    replace = Path.replace

    def interrupted(self, target):
        if self.suffix == ".partial" and self.is_dir() and target.name == "out":
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(cases, tmp_path / "out", overwrite=True)
    assert everything_in(tmp_path) == before
    assert len(PreparedDataset.open(tmp_path / "out").split("train")) == 4


@pytest.mark.faults
def test_a_sheet_is_drawn_though_all_the_cases_chosen_for_it_are_bad(tmp_path, monkeypatch, files):
    monkeypatch.setattr("sdseg_cli.core.data.preparation._evenly", lambda _split: frozenset({"0"}))
    (files / "images" / "0.png").write_bytes(b"")
    shown = []

    def draw_sheet(items):
        shown.extend(items)
        return np.zeros((4, 5, 3), np.uint8)

    run(pairs_of(files), tmp_path / "out", exclude_bad=True, draw_sheet=draw_sheet)
    assert len(shown) == 1


# Opening


@pytest.mark.faults
def test_opening_nothing_says_how_to_make_it(tmp_path):
    with pytest.raises(DataError, match=r"kseg: not a prepared .* no such folder.*sdseg prepare kseg"):
        PreparedDataset.open(tmp_path / "kseg")
    with pytest.raises(DataError, match=r"no dataset\.json\. Give the folder that .* --out FOLDER$"):
        PreparedDataset.open(tmp_path)


@pytest.mark.faults
def test_a_torn_dataset_names_the_file(tmp_path):
    run(drawn_cases(), tmp_path / "out")
    arrow = next((tmp_path / "out" / "train").glob("*.arrow"))
    os.truncate(arrow, 1000)
    with pytest.raises(DataError, match=r"the dataset is torn: train/data.*arrow has 1000 bytes, expected"):
        PreparedDataset.open(tmp_path / "out")
    arrow.unlink()
    with pytest.raises(DataError, match=r"train/data.*arrow is missing"):
        PreparedDataset.open(tmp_path / "out")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda _text: "{", "cannot be read"),
        (lambda _text: "[]", "expected an object"),
        (lambda text: text.replace('"classes"', '"klasses"'), "missing classes"),
        (lambda text: json.dumps({**json.loads(text), "version": 99}), "format version 99"),
    ],
)
def test_a_damaged_manifest_says_why(tmp_path, change, expected):
    run(drawn_cases(), tmp_path / "out")
    file = tmp_path / "out" / "dataset.json"
    file.write_text(change(file.read_text()))
    with pytest.raises(DataError, match=rf"dataset\.json: .*{expected}"):
        PreparedDataset.open(tmp_path / "out")


@pytest.mark.faults
def test_a_damaged_picture_inside_names_its_case(tmp_path):
    run(drawn_cases(), tmp_path / "out")
    arrow = next((tmp_path / "out" / "train").glob("*.arrow"))
    payload = bytearray(arrow.read_bytes())
    at = payload.index(b"IDAT")
    payload[at : at + 40] = bytes(40)
    arrow.write_bytes(payload)
    view = PreparedDataset.open(tmp_path / "out").split("train")
    with pytest.raises(DataError, match=rf"slice {view.case_ids[0]} of split train is damaged"):
        view[0]


@pytest.mark.faults
def test_after_a_failure_no_more_rows_are_written(tmp_path, monkeypatch):
    """The folder is thrown away: a full disk, say, must not be met a second time on the way out."""
    written = []
    monkeypatch.setattr(Tables, "_write", lambda tables, split: written.append(split))
    tables = Tables(tmp_path / "a")
    tables.__enter__()
    tables.add("train", {})
    tables.__exit__(KeyboardInterrupt, None, None)
    assert written == []
    with Tables(tmp_path / "b") as tables:
        tables.add("train", {})
    assert written == ["train"]

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdseg_cli.core.data.benchmarks import CVC, KSEG, find_cvc, find_kseg, phantom_cases
from sdseg_cli.core.data.sources import opened_source
from sdseg_cli.core.data.splits import check_split, read_split
from sdseg_cli.core.errors import DataError
from sdseg_cli.core.recipe import resources_root


def fill(folder, names):
    folder.mkdir(parents=True)
    for name in names:
        Image.fromarray(np.zeros((2, 2), np.uint8)).save(folder / name)


@pytest.mark.parametrize("above", ["", "Kvasir-SEG", "a/b/Kvasir-SEG"])
def test_kseg_is_found_under_its_folder_or_above_it(tmp_path, above):
    fill(tmp_path / above / "images", ["x.jpg", "y.jpg"])
    fill(tmp_path / above / "masks", ["x.jpg", "y.jpg"])
    pairs = find_kseg(tmp_path)
    assert [case.case_id for case in pairs.cases] == ["x", "y"]
    assert pairs.cases[0].image_name == "images/x.jpg"


def test_cvc_is_found_as_published_with_its_sequences(tmp_path):
    for name in ("Original", "Ground Truth"):
        fill(tmp_path / "CVC-ClinicDB" / name, ["1.tif", "26.tif", "612.tif"])
    pairs = find_cvc(tmp_path)
    assert [case.case_id for case in pairs.cases] == ["1", "26", "612"]
    assert [case.group for case in pairs.cases] == ["sequence-01", "sequence-02", "sequence-29"]


def test_cvc_is_found_in_the_mirror_with_both_formats(tmp_path):
    for kind in ("PNG", "TIF"):
        for name in ("Original", "Ground Truth"):
            fill(tmp_path / kind / name, [f"1.{kind.lower()}"])
    assert [case.image_path.suffix for case in find_cvc(tmp_path).cases] == [".png"]


@pytest.mark.faults
def test_another_layout_says_what_was_expected_and_found(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match=r"expected the folders Kvasir-SEG/images and .* found photos"):
        find_kseg(tmp_path)


@pytest.mark.faults
def test_a_frame_that_cvc_does_not_have_is_refused(tmp_path):
    for name in ("Original", "Ground Truth"):
        fill(tmp_path / name, ["polyp.png"])
    with pytest.raises(DataError, match="unexpected frame 'polyp'; frames are numbered 1 to 612"):
        find_cvc(tmp_path)


def test_a_benchmark_without_an_address_says_where_to_register():
    assert CVC.url is None
    assert "https://polyp.grand-challenge.org/CVCClinicDB/" in CVC.how_to_get


def test_phantom_cases_are_drawn_from_their_number():
    cases = phantom_cases("endoscopy", cases=11, seed=3, size=40)
    assert [case.case_id for case in cases[:2]] == ["endoscopy-00", "endoscopy-01"]
    image, label_map = cases[1].arrays()
    again = phantom_cases("endoscopy", cases=2, seed=3, size=40)[1].arrays()
    assert np.array_equal(image, again[0])
    assert np.array_equal(label_map, again[1])


@pytest.mark.fixtures
def test_the_shipped_split_fits_the_real_kvasir_seg(tmp_path):
    default = Path(__file__).resolve().parents[2].parent / "shared"
    archive = Path(os.environ.get("SDSEG_SHARED", default)) / "data" / "kvasir-seg-320.zip"
    if not archive.is_file():
        pytest.skip("the Kvasir-SEG archive is not at hand: set SDSEG_SHARED to the folder that holds data/")
    with opened_source(str(archive), beside=tmp_path, cache=tmp_path) as raw:
        pairs = find_kseg(raw.root)
    assert (len(pairs.cases), pairs.problems) == (1000, ())
    groups = {case.case_id: case.group for case in pairs.cases}
    split = read_split(resources_root() / "splits" / KSEG.splits["paper"])
    assert check_split(split, groups, where="kseg.yaml", may_share_groups=False) == []

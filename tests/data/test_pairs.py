import unicodedata

import pytest

from sdseg_cli.core.data.pairs import group_by_pattern, pair_folders
from sdseg_cli.core.engine.folder_evaluation import masks_by_name
from sdseg_cli.core.errors import DataError, UsageError


def folders(tmp_path, images, masks):
    for folder, names in (("images", images), ("masks", masks)):
        for name in names:
            file = tmp_path / folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    return tmp_path / "images", tmp_path / "masks"


def ids(pairs):
    return [case.case_id for case in pairs.cases]


def test_images_and_masks_pair_by_stem_in_natural_order(tmp_path):
    pairs = pair_folders(*folders(tmp_path, ["10.jpg", "2.jpg"], ["2.png", "10.png"]))
    assert ids(pairs) == ["2", "10"]
    assert pairs.cases[0].label_path == tmp_path / "masks" / "2.png"
    assert (pairs.cases[0].image_name, pairs.cases[0].label_name) == ("images/2.jpg", "masks/2.png")
    assert pairs.problems == ()


@pytest.mark.faults
@pytest.mark.parametrize("suffix", [".png", ".nii.gz", ".dcm"])
def test_hidden_files_and_those_in_hidden_folders_are_neither_images_nor_masks(suffix, tmp_path):
    names = ["b.nii.gz", f".x{suffix}", f".cache/b{suffix}", f"c/.d/b{suffix}"]
    pairs = pair_folders(*folders(tmp_path, names, names))
    assert ids(pairs) == ["b"]
    assert pairs.problems == ()
    assert [*masks_by_name(tmp_path / "masks", "masks")] == ["b"]


@pytest.mark.faults
def test_every_missing_mate_is_named_in_one_pass(tmp_path):
    pairs = pair_folders(*folders(tmp_path, ["a.png", "b.png", "c.png"], ["a.png", "d.png", "e.png"]))
    assert ids(pairs) == ["a"]
    assert [problem.case_id for problem in pairs.problems] == ["b", "c", "d", "e"]
    assert pairs.problems[0].reason == f"image b.png has no mask in {tmp_path / 'masks'}"
    assert pairs.problems[2].reason == f"mask d.png has no image in {tmp_path / 'images'}"


@pytest.mark.faults
def test_equal_stems_pair_by_their_whole_names(tmp_path):
    pairs = pair_folders(*folders(tmp_path, ["a.png", "a.jpg"], ["a.png", "a.jpg"]))
    assert ids(pairs) == ["a.jpg", "a.png"]
    assert [case.label_path.name for case in pairs.cases] == ["a.jpg", "a.png"]


@pytest.mark.faults
def test_equal_stems_that_nothing_settles_are_named(tmp_path):
    pairs = pair_folders(*folders(tmp_path, ["a.png", "a.jpg", "b.png"], ["a.tif", "b.png"]))
    assert ids(pairs) == ["b"]
    expected = "several files share this name (a.jpg, a.png, a.tif): which belong?"
    assert [problem.reason for problem in pairs.problems] == [expected]


@pytest.mark.faults
@pytest.mark.parametrize("stem", ["with blank", "n" * 251, "医学 größe", "a.b.c", "-dash"])
def test_odd_names_pair(tmp_path, stem):
    pairs = pair_folders(*folders(tmp_path, [f"{stem}.png"], [f"{stem}.png"]))
    assert ids(pairs) == [stem]


@pytest.mark.faults
def test_accents_are_compared_by_what_they_mean(tmp_path):
    spelled = [unicodedata.normalize(form, "größe") for form in ("NFC", "NFD")]
    pairs = pair_folders(*folders(tmp_path, [spelled[0] + ".png"], [spelled[1] + ".png"]))
    assert ids(pairs) == [spelled[0]]


def test_subfolders_become_part_of_the_case_id(tmp_path):
    pairs = pair_folders(*folders(tmp_path, ["p1/a.png", "p2/a.png"], ["p1/a.png", "p2/a.png"]))
    assert ids(pairs) == ["p1__a", "p2__a"]


@pytest.mark.faults
def test_two_files_with_one_case_id_are_named(tmp_path):
    names = ["b.png", "p/a.png", "p__a.png"]
    pairs = pair_folders(*folders(tmp_path, names, names))
    assert [(problem.case_id, problem.reason) for problem in pairs.problems] == [
        ("p__a", "2 images lead to this case id; rename them")
    ]
    assert ids(pairs) == ["b"], "what is listed as bad is not prepared as well"


def test_a_mask_suffix_is_taken_off(tmp_path):
    pairs = pair_folders(*folders(tmp_path, ["a.jpg"], ["a_mask.png", "a_other.png"]), mask_suffix="_mask")
    assert ids(pairs) == ["a"]
    assert pairs.problems == ()


@pytest.mark.faults
def test_a_mask_suffix_is_suggested_when_nothing_fits(tmp_path):
    with pytest.raises(DataError, match=r"no image in .* has a mask .* Did you mean --mask-suffix _mask\?"):
        pair_folders(*folders(tmp_path, ["a.jpg"], ["a_mask.png"]))


@pytest.mark.faults
def test_an_empty_folder_is_named(tmp_path):
    images, masks = folders(tmp_path, ["a.jpg"], ["notes.txt"])
    with pytest.raises(DataError, match=r"masks: no masks found; expected PNG, .*DICOM-SEG"):
        pair_folders(images, masks)


def test_groups_come_from_a_pattern(tmp_path):
    names = ["p1_a.png", "p1_b.png", "p2_a.png"]
    group_of = group_by_pattern(r"(p\d+)_")
    pairs = pair_folders(*folders(tmp_path, names, names), group_of=group_of)
    assert [case.group for case in pairs.cases] == ["p1", "p1", "p2"]


@pytest.mark.faults
def test_a_pattern_that_does_not_fit_names_the_case():
    with pytest.raises(UsageError, match="no group in case 'scan7'"):
        group_by_pattern(r"patient(\d+)")("scan7")
    with pytest.raises(UsageError, match="not a regular expression"):
        group_by_pattern("(")

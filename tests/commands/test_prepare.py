import csv
import json
import zipfile

import nibabel
import numpy as np
import pytest
from PIL import Image

from sdseg_cli.cli import main
from sdseg_cli.commands.prepare import parse_classes, parse_fractions, parse_label_values
from sdseg_cli.core.data.prepared import PreparedDataset
from sdseg_cli.core.errors import UsageError


@pytest.fixture
def sdseg(capsys):
    """Run a command line; gives (exit code, standard output, messages on one line)."""

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return end.value.code, output.out, " ".join(output.err.split())

    return run


@pytest.fixture
def raw(tmp_path):
    """Ten images of three patients and their masks."""
    for index in range(10):
        random = np.random.default_rng(index)
        mask = np.zeros((18, 24), np.uint8)
        mask[4:10, 3 : 8 + index] = 255
        for folder, array in (("images", random.integers(0, 256, (18, 24, 3), np.uint8)), ("masks", mask)):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / folder / f"p{index % 3}_{index}.png")
    return tmp_path


def folder_options(raw):
    return ["--images", raw / "images", "--masks", raw / "masks", "--out", raw / "out", "--size", 32]


def test_prepare_folder_makes_a_dataset_and_a_sheet(sdseg, raw):
    code, out, messages = sdseg("prepare", "folder", *folder_options(raw), "--classes", "polyp")
    assert code == 0, messages
    assert "out, 32 x 32, squeeze" in out
    assert "contact_sheet.png before you train on it" in messages
    manifest = PreparedDataset.open(raw / "out").manifest
    assert manifest.splits == {"train": 8, "validation": 1, "test": 1}
    assert manifest.classes == ("background", "polyp")
    with Image.open(raw / "out" / "contact_sheet.png") as sheet:
        assert min(sheet.size) > 32


def test_prepare_folder_keeps_groups_together(sdseg, raw):
    options = ["--group-by", r"^(p\d)_", "--fractions", "0.4,0.3,0.3"]
    code, _, messages = sdseg("prepare", "folder", *folder_options(raw), *options)
    assert code == 0, messages
    dataset = PreparedDataset.open(raw / "out")
    groups = [set(dataset.split(name).groups) for name in ("train", "validation", "test")]
    assert sorted(map(sorted, groups)) == [["p0"], ["p1"], ["p2"]]


def test_prepare_folder_takes_the_split_file_that_an_earlier_one_left(sdseg, raw):
    sdseg("prepare", "folder", *folder_options(raw), "--seed", 5)
    first = PreparedDataset.open(raw / "out").split("test").case_ids
    options = ["--images", raw / "images", "--masks", raw / "masks", "--out", raw / "again", "--size", 48]
    code, _, messages = sdseg("prepare", "folder", *options, "--split", raw / "out" / "split.yaml")
    assert code == 0, messages
    assert PreparedDataset.open(raw / "again").split("test").case_ids == first


def test_prepare_folder_reads_several_classes_from_an_archive(sdseg, raw, tmp_path):
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as pack:
        for index in range(5):
            file = raw / "masks" / f"p{index % 3}_{index}.png"
            mask = np.asarray(Image.open(file)) // 255 * 100
            mask[12:, 20:] = 200
            Image.fromarray(mask).save(file)
            pack.write(file, f"set/seg/{file.stem}_mask.png")
            pack.write(raw / "images" / file.name, f"set/img/{file.name}")
    options = ["--source", tmp_path / "all.zip", "--images", "set/img", "--masks", "set/seg"]
    options += [
        "--mask-suffix",
        "_mask",
        "--classes",
        "liver,kidney",
        "--label-values",
        "0=0,100=liver,200=2",
    ]
    code, _, messages = sdseg("prepare", "folder", *options, "--out", tmp_path / "out", "--size", "32")
    assert code == 0, messages
    manifest = PreparedDataset.open(tmp_path / "out").manifest
    assert manifest.classes == ("background", "liver", "kidney")
    assert manifest.preparation["statistics"]["train"]["kidney"]["slices"] == manifest.splits["train"]
    assert "set/img/p0_0.png" in manifest.sources
    assert len(manifest.preparation["archive_sha256"]) == 64
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["all.zip", "images", "masks", "out"]


def test_prepare_phantom_makes_the_same_dataset_from_the_same_seed(sdseg, tmp_path):
    options = ["--kind", "organs", "--cases", 5, "--size", 32]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        code, _, messages = sdseg("prepare", "phantom", *options, "--seed", seed, "--out", tmp_path / name)
        assert code == 0, messages
    first, second, third = (PreparedDataset.open(tmp_path / name).manifest for name in "abc")
    assert first.num_classes == 4
    assert first.fingerprint == second.fingerprint != third.fingerprint


def test_prepare_phantom_runs_on_several_processes(sdseg, tmp_path):
    options = ["--cases", 4, "--size", 32]
    for name, workers in (("a", 1), ("b", 2)):
        sdseg("prepare", "phantom", *options, "--workers", workers, "--out", tmp_path / name)
    one, two = (PreparedDataset.open(tmp_path / name).manifest.fingerprint for name in "ab")
    assert one == two


def make_cvc(folder):
    for index in range(1, 613):
        for name in ("Original", "Ground Truth"):
            (folder / name).mkdir(parents=True, exist_ok=True)
            array = np.full((8, 8), 40 if name == "Original" else 0, np.uint8)
            array[2:6, 2:6] = 200
            Image.fromarray(array).save(folder / name / f"{index}.png")
    return folder


def test_prepare_cvc_offers_the_paper_split_with_a_warning_and_the_honest_one(sdseg, tmp_path):
    source = make_cvc(tmp_path / "PNG")
    options = ["--source", source, "--size", 32, "--workers", 1]
    code, _, messages = sdseg("prepare", "cvc", *options, "--out", tmp_path / "paper")
    assert code == 0, messages
    assert "CVC-ClinicDB: Research and education only" in messages
    assert "puts frames of 29 video sequences into several splits" in messages
    code, _, messages = sdseg("prepare", "cvc", *options, "--out", tmp_path / "seq", "--split", "sequence")
    assert code == 0, messages
    assert "into several splits" not in messages
    for name in ("paper", "seq"):
        manifest = PreparedDataset.open(tmp_path / name).manifest
        assert manifest.splits == {"train": 492, "validation": 60, "test": 60}


# What goes wrong


@pytest.mark.faults
def test_prepare_cvc_without_a_source_says_where_to_register(sdseg, tmp_path):
    code, _, messages = sdseg("prepare", "cvc", "--out", tmp_path / "out")
    assert code == 2
    assert "--source is missing. CVC-ClinicDB needs a registration" in messages


@pytest.mark.faults
def test_prepare_kseg_with_other_images_says_that_the_split_does_not_fit(sdseg, raw):
    code, _, messages = sdseg("prepare", "kseg", "--source", raw, "--out", raw / "out")
    assert code == 1
    assert "1000 listed cases are not in the data" in messages
    assert "10 cases of the data are not listed (p0_0," in messages
    assert not (raw / "out").exists()


@pytest.mark.faults
def test_bad_pairs_end_with_1_and_a_list_and_are_excluded_on_request(sdseg, raw):
    (raw / "masks" / "p0_0.png").unlink()
    (raw / "images" / "p1_1.png").write_bytes(b"")
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(raw / "masks" / "p2_2.png")
    code, _, messages = sdseg("prepare", "folder", *folder_options(raw))
    assert code == 1
    assert "3 of 10 cases cannot be used; nothing was prepared" in messages
    for expected in (
        "p0_0: image p0_0.png has no mask",
        "p1_1.png: the file is empty",
        "p2_2.png is 5x5 pixels",
    ):
        assert expected in messages
    assert not (raw / "out").exists()
    code, _, messages = sdseg("prepare", "folder", *folder_options(raw), "--exclude-bad")
    assert code == 0, messages
    assert "3 cases left out (listed in dataset.json)" in messages
    manifest = json.loads((raw / "out" / "dataset.json").read_text())
    assert set(manifest["preparation"]["excluded"]) == {"p0_0", "p1_1", "p2_2"}


@pytest.mark.faults
def test_an_existing_folder_ends_with_2_before_anything_is_read(sdseg, raw):
    sdseg("prepare", "folder", *folder_options(raw))
    code, _, messages = sdseg("prepare", "folder", *folder_options(raw))
    assert code == 2
    assert "the folder exists already. Pass --overwrite" in messages
    assert sdseg("prepare", "folder", *folder_options(raw), "--overwrite")[0] == 0


@pytest.mark.faults
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--threshold", 5, "--classes", "a,b"], "--threshold makes one foreground class, --classes names 2"),
        (["--threshold", 5, "--label-values", "0=0"], "--threshold and --label-values exclude each other"),
        (["--label-values", "0=0,9=tumour"], "cannot use '9=tumour'; expected STORED=CLASS"),
        (["--classes", "a,,b"], "expected 1 to 254 different names by comma"),
        (["--fractions", "most"], "expected three numbers by comma"),
        (["--fractions", "0.5,0.5,0.5"], "three numbers from 0 to 1 that sum to 1"),
        (["--split", "s.yaml", "--fractions", "1,0,0"], "--split and --fractions exclude each other"),
        (["--split", "gone.yaml"], "gone.yaml: no such split file"),
        (["--group-by", "patient"], "no group in case 'p0_0'"),
        (["--size", 100], "--size 100: expected a multiple of 8, like 96"),
        (["--source", "gone.zip"], "gone.zip: no such file or folder"),
    ],
)
def test_wrong_options_end_with_2_and_say_what_is_expected(sdseg, raw, options, expected):
    code, _, messages = sdseg("prepare", "folder", *folder_options(raw), *options)
    assert code == 2
    assert expected in messages
    assert not (raw / "out").exists()


@pytest.mark.faults
def test_a_cut_archive_ends_with_1_and_leaves_nothing(sdseg, tmp_path):
    with zipfile.ZipFile(tmp_path / "k.zip", "w") as pack:
        pack.writestr("Kvasir-SEG/images/a.jpg", bytes(1000))
    (tmp_path / "k.zip").write_bytes((tmp_path / "k.zip").read_bytes()[:700])
    code, _, messages = sdseg("prepare", "kseg", "--source", tmp_path / "k.zip", "--out", tmp_path / "out")
    assert code == 1
    assert "not a whole zip archive, most likely cut short. Fetch it again" in messages
    assert [entry.name for entry in tmp_path.iterdir()] == ["k.zip"]


def test_16_bit_images_are_told(sdseg, raw):
    Image.fromarray(np.arange(18 * 24, dtype=np.uint16).reshape(18, 24)).save(raw / "images" / "p0_0.png")
    code, _, messages = sdseg("prepare", "folder", *folder_options(raw))
    assert code == 0, messages
    assert "16-bit scaled: 1 images (first p0_0: 16-bit scaled from [0, 431])" in messages


@pytest.mark.parametrize("command", ["", "kseg", "cvc", "folder", "phantom"])
def test_every_help_ends_with_worked_examples(sdseg, command):
    code, out, _ = sdseg("prepare", *([command] if command else []), "--help")
    assert code == 0
    assert f"sdseg prepare {command}".strip() in out.partition("Examples")[2]


# What the options say


def test_classes_get_the_background_in_front():
    assert parse_classes("liver, kidney") == ("background", "liver", "kidney")
    assert parse_classes("background,polyp") == ("background", "polyp")


def test_label_values_take_numbers_and_names():
    classes = ("background", "cup", "rim")
    assert parse_label_values("255=background, 0=cup,128=2", classes) == {255: 0, 0: 1, 128: 2}
    assert parse_label_values(None, classes) is None


@pytest.mark.faults
@pytest.mark.parametrize("text", ["", "1", "1=", "=1", "-1=0", "1=3", "1=0,1=1", "a=0"])
def test_senseless_label_values_are_refused(text):
    with pytest.raises(UsageError, match="--label-values"):
        parse_label_values(text, ("background", "cup", "rim"))


def test_fractions_are_three_numbers():
    assert parse_fractions("0.7, .2,0.1") == [0.7, 0.2, 0.1]


# Volumes and the public data sets that need a registration


def save_volume(path, voxels):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-2.0, -2.0, 5.0, 1.0])), path)


@pytest.fixture
def scans(tmp_path):
    """Three scans in BTCV's layout, and a split file that puts one into each split."""
    for number in (1, 5, 21):
        labels = np.zeros((32, 32, 3), np.uint8)
        labels[8:20, 8:24, 1:] = 6
        voxels = np.random.default_rng(number).integers(-200, 0, labels.shape) + labels * np.int64(40)
        save_volume(tmp_path / f"RawData/Training/img/img{number:04d}.nii.gz", voxels.astype(np.int16))
        save_volume(tmp_path / f"RawData/Training/label/label{number:04d}.nii.gz", labels)
    (tmp_path / "split.yaml").write_text("train: [0005]\nvalidation: [0021]\ntest: [0001]\n")
    return tmp_path


def prepare_btcv(sdseg, scans, *options):
    given = ["--source", scans, "--split", scans / "split.yaml", "--out", scans / "out", "--size", 32]
    return sdseg("prepare", "btcv", *given, *options)


def test_prepare_btcv_then_train_then_evaluate_scores_whole_volumes(sdseg, scans, monkeypatch):
    code, out, messages = prepare_btcv(sdseg, scans, "--organs", "binary")
    assert code == 0, messages
    assert "slices" in out
    manifest = PreparedDataset.open(scans / "out").manifest
    assert manifest.splits == {"train": 3, "validation": 3, "test": 3}
    assert (manifest.preparation["window"], manifest.preparation["organs"]) == ([-175, 250], "binary")
    monkeypatch.chdir(scans)
    tiny = {
        "data.dataset": "out", "data.image_size": 32, "data.workers": 0, "model.unet_channels": "[32, 32]",
        "model.unet_heads": 2, "model.unet_attention_strides": "[]", "train.steps": 2, "train.batch_size": 2,
        "train.warmup_steps": 0, "train.validate_every": 2, "train.checkpoint_every": 2,
        "train.trackers": "[]",
    }  # fmt: skip
    changes = [item for key, value in tiny.items() for item in ("--set", f"{key}={value}")]
    code, _, messages = sdseg("train", "--recipe", "demo", *changes, "--out", "run", "--device", "cpu")
    assert code == 0, messages
    written = json.loads(next((scans / "run").rglob("model_index.json")).read_text())["training_data"]
    assert (written["window"], written["axis"]) == ([-175, 250], "axial")
    code, _, messages = sdseg(
        "evaluate", "--run", "run", "--split", "test", "--device", "cpu", "--out", "scores"
    )
    assert code == 0, messages
    with next((scans / "scores").rglob("cases.csv")).open() as file:
        (row,) = csv.DictReader(file)
    assert (row["case"], row["slices"], row["class"]) == ("0001", "3", "organs")


@pytest.mark.parametrize("command", ["refuge", "btcv", "sts3d"])
def test_a_data_set_that_needs_a_registration_says_where(sdseg, command):
    code, _, messages = sdseg("prepare", command)
    assert code == 2
    assert "--source is missing" in messages
    assert "registration" in messages


def test_prepare_nnunet_reads_the_folder_as_it_is(sdseg, tmp_path):
    raw = tmp_path / "Dataset001_Mine"
    for number in range(3):
        labels = np.zeros((16, 16, 2), np.uint8)
        labels[4:8, 4:8] = 1
        save_volume(raw / f"imagesTr/c{number}_0000.nii.gz", labels.astype(np.int16) * 100 + number)
        save_volume(raw / f"labelsTr/c{number}.nii.gz", labels)
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1},
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(content))
    options = ["--fractions", "0.34,0.33,0.33", "--axis", "coronal", "--size", 32, "--out", tmp_path / "out"]
    code, _, messages = sdseg("prepare", "nnunet", raw, *options)
    assert code == 0, messages
    manifest = PreparedDataset.open(tmp_path / "out").manifest
    assert manifest.splits == {"train": 16, "validation": 16, "test": 16}
    assert (manifest.classes, manifest.preparation["axis"]) == (("background", "liver"), "coronal")


def test_prepare_folder_takes_volumes_with_a_window(sdseg, scans):
    home = scans / "RawData" / "Training"
    for path in (home / "label").iterdir():
        path.rename(path.with_name(path.name.replace("label", "img")))
    options = ["--images", home / "img", "--masks", home / "label", "--label-values", "0=0,6=1"]
    options += ["--size", 32, "--fractions", "0.34,0.33,0.33", "--out", scans / "out"]
    code, _, messages = sdseg("prepare", "folder", *options, "--window", "-175,250")
    assert code == 0, messages
    dataset = PreparedDataset.open(scans / "out")
    assert dataset.manifest.preparation["window"] == [-175, 250]
    assert dataset.split("test")[0].spacing_mm == (5.0, 2.0, 2.0)


@pytest.mark.faults
@pytest.mark.parametrize("window", ["250,-175", "soft", "1", "1,nan"])
def test_a_window_that_is_none_is_refused(sdseg, scans, window):
    code, _, messages = prepare_btcv(sdseg, scans, "--window", window)
    assert code == 2
    assert "expected two numbers LOW,HIGH, the lower first" in messages


@pytest.mark.faults
def test_options_of_volumes_are_refused_where_there_are_none(sdseg, raw):
    code, _, messages = sdseg("prepare", "folder", *folder_options(raw), "--window", "0,1")
    assert code == 2
    assert "--window: for volumes only" in messages

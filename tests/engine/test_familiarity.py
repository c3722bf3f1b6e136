"""Images unlike those of the training are noticed, each kind once; those alike are not."""

import json
from dataclasses import replace

import numpy as np
import pytest

from sdseg_cli.core.engine.familiarity import Look, look_at, observed, summarise_looks, unfamiliar
from sdseg_cli.core.engine.inference import SliceInput
from sdseg_cli.core.grid import Grid
from sdseg_cli.core.model.weights import load_pipeline

# Mean 110, standard deviation of the slices' means 10: strange below 70 and above 150.
COLOUR = {"count": 40, "colour": 1.0, "mean": 110.0, "std": 10.0, "side_px": 500.0}
LIKE = Look(110.0, True, 500)


def test_a_look_leaves_out_the_border_that_the_grid_added():
    image = np.zeros((8, 8, 3), np.uint8)
    image[2:6] = (10, 20, 30)
    assert look_at(image, Grid(10, 20, 8, "pad")) == Look(20.0, True, 20, (10.0, 20.0, 30.0))
    # Of a volume the last two spacings are those within the slice.
    of_volume = look_at(image, Grid(10, 20, 8, "pad"), (9.0, 0.5, 2.0))
    assert of_volume.pixel_mm == pytest.approx(1.0)
    assert of_volume.is_slice
    assert not look_at(image, Grid(10, 20, 8, "pad"), (0.5, 2.0)).is_slice


def test_an_image_with_the_faint_colours_of_a_jpeg_is_grey():
    image = np.full((4, 4, 3), 100, np.uint8)
    image[..., 1] += 2
    assert not look_at(image, Grid(4, 4, 4)).is_colour
    image[..., 1] += 1
    assert look_at(image, Grid(4, 4, 4)).is_colour


def test_the_summary_is_over_the_slices():
    looks = [
        Look(100.0, True, 300, (130.0, 100.0, 70.0), 0.5),
        Look(120.0, False, 400, (120.0, 120.0, 120.0)),
        Look(110.0, True, 900, (170.0, 110.0, 50.0), 0.9),
    ]
    assert summarise_looks(looks) == {
        "count": 3,
        "colour": 0.6667,
        "mean": 110.0,
        "std": 10.0,
        "channels": [140.0, 110.0, 80.0],
        "tint_std": [30.0, 0.0, 30.0],
        "side_px": 400.0,
        "pixel_mm": 0.7,
    }
    assert summarise_looks(looks[:1])["std"] == 0.0
    assert "pixel_mm" not in summarise_looks(looks[1:2])


def test_images_like_those_of_the_training_are_not_remarked_upon():
    assert unfamiliar(COLOUR, [LIKE, Look(70.0, True, 167), Look(150.0, True, 1499)]) == []


@pytest.mark.parametrize(
    ("strange", "words"),
    [
        (Look(110.0, False, 500), "3 of 4 images are grey; the model was trained on images in colour."),
        (Look(69.0, True, 500), "mean intensity 69, in training 110 +- 10"),
        (Look(151.0, True, 500), "mean intensity 151, in training 110 +- 10"),
        (Look(110.0, True, 160), "longer side 160 pixels, in training 500"),
        (Look(110.0, True, 1501), "longer side 1501 pixels, in training 500"),
    ],
)
def test_each_kind_is_told_once(strange, words):
    (remark,) = unfamiliar(COLOUR, [LIKE, strange, strange, strange])
    assert words in remark
    assert remark.startswith("3 of 4 images are ")


def test_colour_is_told_to_a_model_of_grey_images_and_not_to_one_of_both():
    assert "1 of 1 image is in colour" in unfamiliar({**COLOUR, "colour": 0.0}, [LIKE])[0]
    assert unfamiliar({**COLOUR, "colour": 0.5}, [LIKE, Look(110.0, False, 500)]) == []


def test_volumes_are_told_by_their_slices():
    dark, like = Look(0.0, True, 500, is_slice=True), replace(LIKE, is_slice=True)
    assert unfamiliar(COLOUR, [dark, like, like])[0].startswith("1 of 3 slices is darker")
    assert unfamiliar(COLOUR, [dark, dark, LIKE])[0].startswith("2 of 3 images are darker")  # a mixed folder


def test_the_odd_one_out_of_many_is_passed_over():
    assert unfamiliar(COLOUR, [LIKE] * 10 + [Look(0.0, True, 500)]) == []
    assert len(unfamiliar(COLOUR, [LIKE] * 9 + [Look(0.0, True, 500)])) == 1


def test_training_images_that_are_all_alike_leave_some_room():
    trained = {**COLOUR, "std": 0.0}
    assert unfamiliar(trained, [Look(130.0, True, 500)]) == []
    assert len(unfamiliar(trained, [Look(131.0, True, 500)])) == 1


TINTED = {**COLOUR, "channels": [140.0, 100.0, 90.0], "tint_std": [2.0, 2.0, 6.0], "pixel_mm": 0.7}


@pytest.mark.parametrize(
    ("channels", "is_strange"),
    [
        ((140.0, 100.0, 90.0), False),
        ((110.0, 70.0, 60.0), False),  # darker, of the same tint
        ((149.0, 105.0, 76.0), False),  # red + 9, blue - 14: within 20 levels, the least room
        ((110.0, 110.0, 110.0), True),
        ((90.0, 110.0, 130.0), True),
    ],
)
def test_another_tint_is_told_whatever_the_brightness(channels, is_strange):
    found = unfamiliar(TINTED, [Look(110.0, True, 500, channels)])
    assert len(found) == is_strange
    if is_strange:
        assert "red, green and blue" in found[0]
        assert "in training 140, 100 and 90 (of 255)" in found[0]


@pytest.mark.parametrize(
    ("pixel_mm", "is_strange"), [(0.7, False), (1.39, False), (1.41, True), (0.34, True), (None, False)]
)
def test_another_spacing_is_told_where_both_are_known(pixel_mm, is_strange):
    look = Look(110.0, True, 500, (140.0, 100.0, 90.0), pixel_mm)
    found = unfamiliar(TINTED, [look])
    assert len(found) == is_strange
    if is_strange:
        assert f"another spacing than what the model was trained on: {pixel_mm:.2f} mm between" in found[0]
    assert unfamiliar({**TINTED, "pixel_mm": None}, [look]) == []


@pytest.mark.faults
@pytest.mark.parametrize("spacing_mm", [(0.0, 0.7), (5.0, 0.7, 0.0), (-1.0, 0.7)])
def test_a_spacing_that_is_none_is_unknown(spacing_mm):
    look = look_at(np.zeros((8, 8, 3), np.uint8), Grid(8, 8, 8, "squeeze"), spacing_mm)
    assert look.pixel_mm is None
    assert "pixel_mm" not in summarise_looks([look])


def test_slices_pass_through_one_by_one_and_unchanged():
    image = np.full((4, 4, 3), 7, np.uint8)
    items = [SliceInput(name, 0, image, Grid(4, 4, 4)) for name in "ab"]
    looks: list[Look] = []
    stream = observed(iter(items), looks)
    assert looks == []
    assert next(stream) is items[0]
    assert looks == [Look(7.0, False, 4, (7.0, 7.0, 7.0))]
    assert list(observed(items, None)) == items


def test_a_model_keeps_figures_of_its_training_images_and_evaluate_and_predict_use_them(
    tiny_recipe, trained, tmp_path, capsys, monkeypatch
):
    from PIL import Image

    from sdseg_cli.cli import main

    run = trained(tiny_recipe(), tmp_path / "run").run
    kept = load_pipeline(str(run.model)).config.training_data
    assert kept["name"]
    assert kept["images"]["colour"] == 1.0
    assert 20 < kept["images"]["mean"] < 235
    assert kept["images"]["side_px"] < 60

    def sdseg(*args):
        with pytest.raises(SystemExit) as end:
            main([*map(str, args), "--model", str(run.root), "--device", "cpu"])
        assert not end.value.code
        return capsys.readouterr().err

    assert "the model was trained on" not in sdseg("evaluate", "--split", "train", "--overlays", "0")
    Image.fromarray(np.zeros((200, 100), np.uint8)).save(tmp_path / "dark.png")
    scores = json.loads((run.root / "evaluation" / "train" / "summary.json").read_text())
    assert scores["warnings"] == []
    told = sdseg("predict", tmp_path / "dark.png", "--out", tmp_path / "masks")
    assert len(json.loads((tmp_path / "masks" / "prediction.json").read_text())["warnings"]) == 3
    assert "1 of 1 image is grey" in told
    assert "mean intensity 0, in training" in told
    assert "longer side 200 pixels, in training" in told
    told = sdseg("stability", tmp_path, "--runs", "2", "--out", tmp_path / "stability")
    assert "1 of 1 image is grey" in told
    measured = json.loads((tmp_path / "stability" / "summary.json").read_text())
    assert "1 of 1 image is grey" in measured["warnings"][0]
    # A model from before these figures were kept says nothing.
    index = run.model / "model_index.json"
    config = json.loads(index.read_text())
    del config["training_data"]["images"]
    index.write_text(json.dumps(config))
    (run.model / "manifest.json").unlink()
    told = sdseg("predict", tmp_path / "dark.png", "--out", tmp_path / "masks", "--overwrite")
    assert "in training" not in told

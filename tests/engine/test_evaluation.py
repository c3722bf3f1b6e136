"""Evaluation with a predictor that answers from a list: pairing, order, grids, summaries."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from sdseg_cli.core.data.images import write_label_map
from sdseg_cli.core.data.prepared import PreparedSlice
from sdseg_cli.core.engine.evaluation import check_fit, evaluate_split
from sdseg_cli.core.engine.evaluation_page import SelectedCases, chosen_cases, with_middle_pictures
from sdseg_cli.core.engine.evaluation_records import CaseScores, FailedCase
from sdseg_cli.core.engine.evaluation_summary import (
    CASE_COLUMNS,
    case_rows,
    evaluation_table,
    keep_pictures,
    summarise_cases,
    worst_cases,
)
from sdseg_cli.core.engine.folder_evaluation import evaluate_folders, pair_folders
from sdseg_cli.core.engine.inference import SlicePrediction
from sdseg_cli.core.engine.report_parts import MOST_VIEWS
from sdseg_cli.core.errors import DataError
from sdseg_cli.core.grid import Grid
from sdseg_cli.core.metrics.calibration import expected_calibration_error
from sdseg_cli.core.reporting.tables import to_csv

BINARY = ("background", "polyp")
ORGANS = ("background", "liver", "kidney")


def drawn(*rows):
    return np.array(
        [[int(character) if character.isdigit() else 0 for character in row] for row in rows], np.uint8
    )


SQUARE = drawn("....", ".11.", ".11.", "....")
SHIFTED = drawn("....", "..11", "..11", "....")
EMPTY = np.zeros_like(SQUARE)


class Split(list):
    @property
    def case_ids(self):
        return [entry.case_id for entry in self]


def slice_of(case_id, label_map, slice_index=0, size=4, spacing=None):
    height, width = label_map.shape
    image = np.zeros((size, size, 3), np.uint8)
    return PreparedSlice(case_id, slice_index, case_id, image, label_map, Grid(height, width, size), spacing)


class Predictor:
    """Answers every slice with the label map of its (case, slice), in batches as the real one."""

    classes, num_classes, image_size, resize, threshold = BINARY, 2, 4, "squeeze", 0.5

    def __init__(self, answers, batch_size=3):
        self.answers = answers
        self.batch_size = batch_size
        self.seen = []

    def __call__(self, inputs):
        inputs = iter(inputs)
        while batch := [item for _, item in zip(range(self.batch_size), inputs, strict=False)]:
            for item in batch:
                self.seen.append(item.case_id)
                answer = self.answers[item.case_id, item.slice_index]
                probabilities = np.stack([1.0 - (answer == 1), answer == 1]).astype(np.float32)
                yield SlicePrediction(
                    item.case_id, item.slice_index, answer, probabilities, np.full(answer.shape, np.nan), None
                )


def evaluated(slices, answers, classes=BINARY, **options):
    return list(evaluate_split(Predictor(answers), Split(slices), classes, **options))


def test_every_case_gets_its_own_scores_in_the_order_of_the_split():
    slices = [slice_of(name, SQUARE) for name in ("c", "a", "b", "d")]
    answers = {("c", 0): SQUARE, ("a", 0): SHIFTED, ("b", 0): EMPTY, ("d", 0): SQUARE}
    records = evaluated(slices, answers)
    assert [record.case_id for record in records] == ["c", "a", "b", "d"]
    assert [record.dice for record in records] == pytest.approx([1, 0.5, 0, 1])
    shifted = records[1].classes[0]
    assert shifted.iou == pytest.approx(2 / 6)
    assert (shifted.hd95, shifted.assd) == pytest.approx((1.0, 0.5))
    assert records[2].classes[0].outcome == "missed"
    assert records[2].classes[0].hd95 == math.inf


def test_the_slices_of_a_case_are_scored_together():
    slices = [slice_of("a", SQUARE, 0), slice_of("a", SQUARE, 1), slice_of("b", SQUARE, 0)]
    answers = {("a", 0): SQUARE, ("a", 1): EMPTY, ("b", 0): SQUARE}
    volume, other = evaluated(slices, answers)
    assert volume.slices == 2
    assert volume.dice == pytest.approx(8 / 12)  # not the mean of 1 and 0
    assert math.isnan(volume.classes[0].hd95)  # the distance between slices is not known
    assert math.isnan(volume.classes[0].assd)
    assert other.dice == 1
    assert volume.picture is not None
    assert not volume.picture.prediction.any()  # the worse of its slices is the one to look at


def stacked(planes, spacing=(5.0, 2.0, 2.0)):
    return [slice_of("v", plane, index, spacing=spacing) for index, plane in enumerate(planes)]


def test_a_volume_is_scored_as_a_volume_with_the_distance_between_its_slices():
    # Truth: one voxel in slices 0 and 1. Prediction: that voxel in slice 1 and in slice 2.
    dot = np.zeros((4, 4), np.uint8)
    dot[1, 1] = 1
    answers = {("v", 0): EMPTY, ("v", 1): dot, ("v", 2): dot}
    (record,) = evaluated(stacked([dot, dot, EMPTY]), answers)
    entry = record.classes[0]
    assert (record.slices, record.unit) == (3, "mm")
    assert record.dice == pytest.approx(2 * 1 / (2 + 2))  # the mean over slices would be 1/3
    assert entry.assd == pytest.approx((0 + 5 + 0 + 5) / 4)  # slices are 5 mm apart
    assert entry.hd95 == pytest.approx(4.75)  # 95 % of the way from 0 to 5


def test_the_largest_component_of_a_volume_is_scored_not_one_of_each_slice():
    column = drawn("....", ".1..", "....", "....")
    stray = drawn("....", ".1..", "....", "...1")
    slices = [slice_of("v", column, index, spacing=(1.0, 1.0, 1.0)) for index in range(3)]
    answers = {("v", 0): column, ("v", 1): drawn("...1", "....", "....", "...."), ("v", 2): stray}
    predictor = Predictor(answers)
    predictor.largest_component = True
    (record,) = evaluate_split(predictor, Split(slices), BINARY)
    counts = record.classes[0].counts  # four pieces of one pixel each: the first of them stays
    assert (counts.true_positive, counts.false_positive, counts.false_negative) == (1, 0, 2)
    assert sum(int(view.prediction.sum()) for view in record.stack) == 1
    assert predictor.largest_component is True
    predictor.answers = {("a", 0): drawn("1...", "....", "..11", "..11")}
    (alone,) = evaluate_split(
        predictor, Split([slice_of("a", drawn("....", "....", "..11", "..11"))]), BINARY
    )
    assert alone.dice == 1.0


def test_slices_that_were_left_out_keep_their_place_in_the_volume():
    dot = np.zeros((4, 4), np.uint8)
    dot[1, 1] = 1
    slices = [slice_of("v", truth, index, spacing=(5.0, 2.0, 2.0)) for truth, index in ((dot, 3), (EMPTY, 7))]
    (record,) = evaluated(slices, {("v", 3): EMPTY, ("v", 7): dot})
    assert record.classes[0].assd == pytest.approx(20.0)


def test_on_the_models_grid_the_spacing_of_a_volume_grows_with_the_pixels():
    # 8 x 8 pixels of 2 mm on a grid of 4 x 4: 4 mm a pixel, and the slices stay 5 mm apart.
    truth, answer = np.zeros((8, 8), np.uint8), np.zeros((4, 4), np.uint8)
    truth[2:4, 2:4] = 1
    answer[1, 2] = 1
    slices = [slice_of("v", truth, index, spacing=(5.0, 2.0, 2.0)) for index in range(2)]
    (record,) = evaluated(slices, {("v", 0): answer, ("v", 1): answer}, grid="model")
    assert record.classes[0].assd == pytest.approx(4.0)


def test_a_crop_on_the_models_grid_has_the_spacing_of_the_crop():
    truth, answer = np.zeros((16, 16), np.uint8), np.zeros((4, 4), np.uint8)
    truth[6:8, 6:8] = 1
    answer[1, 2] = 1
    image = np.zeros((4, 4, 3), np.uint8)
    grid = Grid(16, 16, 4, crop=(4, 4, 8, 8))
    part = PreparedSlice("a", 0, "a", image, truth, grid, (2.0, 2.0))
    (record,) = evaluated([part], {("a", 0): answer}, grid="model")
    assert record.classes[0].assd == pytest.approx(4.0)


def test_a_volume_gives_every_organ_its_own_figures_and_misses_are_infinitely_far():
    truth = drawn("11..", "11..", "..22", "..22")
    liver_only = np.where(truth == 1, truth, 0).astype(np.uint8)
    answers = {("v", index): liver_only for index in range(2)}
    (record,) = evaluated(stacked([truth, truth]), answers, ORGANS)
    liver, kidney = record.classes
    assert (liver.class_name, liver.dice, liver.hd95) == ("liver", 1.0, 0.0)
    assert (kidney.class_name, kidney.outcome, kidney.hd95) == ("kidney", "missed", math.inf)


def test_distances_are_in_millimetres_where_the_spacing_is_known():
    (record,) = evaluated([slice_of("a", SQUARE, spacing=(2.0, 0.5))], {("a", 0): SHIFTED})
    assert record.unit == "mm"
    assert record.classes[0].hd95 == pytest.approx(0.5)
    (record,) = evaluated([slice_of("a", SQUARE)], {("a", 0): SHIFTED})
    assert record.unit == "px"


def test_the_model_grid_compares_on_the_model_grid_and_keeps_millimetres_true():
    truth = np.kron(SQUARE, np.ones((2, 4), np.uint8))  # 8 x 16 pixels, squeezed to 4 x 4
    (record,) = evaluated([slice_of("a", truth, spacing=(1.0, 1.0))], {("a", 0): SHIFTED}, grid="model")
    assert record.classes[0].counts.true == 4
    assert record.dice == pytest.approx(0.5)
    assert record.classes[0].hd95 == pytest.approx(4.0)  # one pixel to the side is four of the case's


def test_the_official_convention_reaches_the_scores():
    slices = [slice_of("empty", EMPTY), slice_of("invented", EMPTY)]
    answers = {("empty", 0): EMPTY, ("invented", 0): SQUARE}
    assert [record.dice for record in evaluated(slices, answers, convention="sdseg")] == [0, 1]
    standard = evaluated(slices, answers)
    assert math.isnan(standard[0].dice)
    assert standard[1].dice == 0
    assert [record.classes[0].outcome for record in standard] == ["absent", "false alarm"]


def test_several_classes_are_scored_each_and_as_their_mean():
    truth, prediction = drawn("1122", "1122"), drawn("1120", "1120")
    slices = [slice_of("a", truth), slice_of("b", truth)]
    answers = {("a", 0): prediction, ("b", 0): truth}
    summary = summarise_cases(evaluated(slices, answers, ORGANS), ORGANS)
    liver, kidney, mean = summary.classes
    assert (liver.class_name, kidney.class_name, mean.class_name) == ("liver", "kidney", "mean of classes")
    assert liver.metrics["dice"].mean == 1
    assert kidney.metrics["dice"].mean == pytest.approx((2 / 3 + 1) / 2)
    assert kidney.pooled_dice == pytest.approx(2 * 6 / 14)
    assert mean.metrics["dice"].mean == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)


def test_two_processes_score_every_case_once():
    slices = [slice_of(name, SQUARE) for name in "abcde"]
    answers = {(name, 0): SQUARE for name in "abcde"}
    seen = []
    for rank in (0, 1):
        share = SimpleNamespace(share=lambda items, rank=rank: list(items)[rank::2])
        seen.append([record.case_id for record in evaluated(slices, answers, processes=share)])
    assert seen == [["a", "c", "e"], ["b", "d"]]


@pytest.mark.faults(27)
def test_missed_structures_are_counted_beside_the_mean_they_drop_out_of():
    slices = [slice_of(name, SQUARE) for name in "abc"] + [slice_of("d", EMPTY), slice_of("e", EMPTY)]
    answers = {("a", 0): SHIFTED, ("b", 0): SQUARE, ("c", 0): EMPTY, ("d", 0): SQUARE, ("e", 0): EMPTY}
    summary = summarise_cases(evaluated(slices, answers), BINARY)
    (polyp,) = summary.classes
    assert (polyp.missed, polyp.false_alarms, polyp.absent) == (1, 1, 1)
    assert polyp.metrics["dice"].n == 4
    assert polyp.metrics["dice"].mean == pytest.approx((0.5 + 1 + 0 + 0) / 4)
    assert polyp.metrics["hd95"].mean == pytest.approx(0.5)
    assert polyp.metrics["hd95"].infinite == 2
    table = evaluation_table(summary, "test", "standard")
    hd95 = next(row for row in table.rows if row[1] == "HD95 (px)")
    assert hd95[-1] == "2 of 4"
    assert "polyp: 1 missed, 1 false alarm, 1 absent" in table.caption
    assert "Convention 'standard'" in table.caption


def test_rows_hold_one_line_per_case_and_class_and_name_the_outcome():
    truth = drawn("1122", "1122")
    records = evaluated([slice_of("a", truth)], {("a", 0): drawn("1100", "1100")}, ORGANS)
    text = to_csv(case_rows(records), CASE_COLUMNS)
    header, liver, kidney = text.splitlines()
    assert header.startswith("case,group,slices,class,dice,iou,precision,recall,hd95,assd,nsd,distance_unit")
    assert liver == "a,a,1,liver,1.0,1.0,1.0,1.0,0.0,0.0,1.0,px,4,4,4,scored,"
    assert kidney == "a,a,1,kidney,0.0,0.0,0.0,0.0,inf,inf,0.0,px,4,0,0,missed,"


def test_only_the_worst_cases_keep_their_pictures():
    slices = [slice_of(name, SQUARE) for name in "abcd"]
    answers = {("a", 0): SQUARE, ("b", 0): EMPTY, ("c", 0): SHIFTED, ("d", 0): SQUARE}
    records = keep_pictures(evaluated(slices, answers), 2, worst=0, best=0)
    assert [record.picture is not None for record in records] == [False, True, True, False]
    assert [record.case_id for record in worst_cases(records, 2)] == ["b", "c"]
    assert [record.case_id for record in worst_cases(records, 1)] == ["b"]
    assert all(
        record.picture is None for record in keep_pictures(evaluated(slices, answers), 0, worst=0, best=0)
    )


def test_the_worst_and_the_best_keep_their_slices_and_the_middle_is_scored_again():
    names = [f"{number:02d}" for number in range(12)]
    wide = np.zeros((4, 16), np.uint8)
    wide[1, :13] = 1
    answers = {}
    for number, name in enumerate(names):
        answers[name, 0] = wide.copy()
        answers[name, 0][1, number + 1 :] = 0  # case 00 is the worst, case 11 the best
    slices = [slice_of(name, wide, size=16) for name in reversed(names)]
    model = Predictor(answers)
    records = keep_pictures(evaluate_split(model, Split(slices), BINARY), 0)
    assert [record.case_id for record in records if record.stack] == [
        "11",
        "10",
        "05",
        "04",
        "03",
        "02",
        "01",
        "00",
    ]
    asked = []

    def again(case_ids):
        asked.extend(case_ids)
        return evaluate_split(model, SelectedCases(Split(slices), case_ids), BINARY)

    shown = chosen_cases(with_middle_pictures(records, again))
    assert [(badge, record.case_id) for badge, record in shown] == [
        *(("worst", name) for name in ("00", "01", "02")),
        *(("middle", name) for name in ("04", "05", "06")),
        *(("best", name) for name in ("10", "11")),
    ]
    assert asked == ["06"]
    assert all(record.stack for _, record in shown)


def test_of_many_slices_a_bounded_number_is_kept_and_the_worst_is_among_them():
    slices = [slice_of("a", SQUARE, index) for index in range(40)]
    answers = {("a", index): SQUARE for index in range(40)}
    answers["a", 17] = EMPTY
    (record,) = evaluated(slices, answers)
    kept = [picture.slice_index for picture in record.stack]
    assert len(kept) <= MOST_VIEWS
    assert kept == sorted(kept)
    assert {0, 17, 39} <= {*kept}
    assert record.picture.slice_index == 17


def test_draws_of_all_slices_together_predict_the_dice_of_the_case():
    shared = np.array([[[4, 2], [2, 4]]])

    class Drawing(Predictor):
        def __call__(self, inputs):
            for prediction in super().__call__(inputs):
                overlaps = shared if prediction.slice_index == 0 else 3 * shared
                yield replace(prediction, overlaps=overlaps, uncertainty=np.full((4, 4), 0.5))

    slices = [slice_of("a", SQUARE, 0), slice_of("a", SQUARE, 1)]
    model = Drawing({("a", 0): SQUARE, ("a", 1): SQUARE})
    (record,) = evaluate_split(model, Split(slices), BINARY)
    assert record.draw_agreement == pytest.approx(0.5)
    assert case_rows([record])[0]["draw_agreement"] == record.draw_agreement
    assert record.picture.uncertainty.tolist() == [[255] * 4] * 4
    counts = record.reliability[0]
    assert counts[:, 0].tolist() == [24, 0, 0, 0, 0, 0, 0, 0, 0, 8]  # the fake is sure, and right
    assert expected_calibration_error(counts) == 0


@pytest.mark.faults
def test_a_dataset_of_other_classes_or_size_is_refused_with_both_sides():
    manifest = SimpleNamespace(num_classes=3, image_size=8, resize="squeeze")
    message = r"data/x does not fit .*included\): dataset 3, model 2; image size: dataset 8, model 4\. Prep"
    with pytest.raises(DataError, match=message):
        check_fit(Predictor({}), manifest, "data/x")


# ---- folders --------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    truth, predictions = tmp_path / "truth", tmp_path / "masks"
    truth.mkdir()
    predictions.mkdir()
    for name, mask in {"a": SQUARE, "b": SQUARE, "c": EMPTY}.items():
        write_label_map(truth / f"{name}.png", mask, 2)
    write_label_map(predictions / "a.png", SQUARE, 2)
    write_label_map(predictions / "b.png", SHIFTED, 2)
    write_label_map(predictions / "c.png", EMPTY, 2)
    return predictions, truth


def scored(predictions, truth, classes=BINARY, **options):
    return list(evaluate_folders(pair_folders(predictions, truth, **options), classes))


def test_two_folders_are_paired_by_name_whatever_the_suffix(folders):
    predictions, truth = folders
    (truth / "b.png").unlink()
    from PIL import Image

    Image.fromarray(np.kron(SQUARE, np.ones((8, 8), np.uint8)) * 255).save(truth / "b.jpg", quality=90)
    write_label_map(predictions / "b.png", np.kron(SQUARE, np.ones((8, 8), np.uint8)), 2)
    records = scored(predictions, truth)
    assert [record.case_id for record in records] == ["a", "b", "c"]
    assert [record.dice for record in records[:2]] == [1, 1]
    assert records[2].classes[0].outcome == "absent"


def test_files_that_share_a_stem_are_paired_by_their_full_names(folders):
    predictions, truth = folders
    write_label_map(truth / "a.bmp.png", SQUARE, 2)
    (truth / "a.bmp.png").rename(truth / "a.tif")  # read by its content, not its suffix
    write_label_map(predictions / "a.tif.png", SHIFTED, 2)
    (predictions / "a.png").rename(predictions / "a.png.png")
    pairs = pair_folders(predictions, truth)
    assert {name: path.name for name, path, _ in pairs.pairs if name.startswith("a")} == {
        "a.png": "a.png.png",
        "a.tif": "a.tif.png",
    }


@pytest.mark.faults
def test_missing_predictions_are_all_named_and_nothing_is_scored(folders):
    predictions, truth = folders
    (predictions / "a.png").unlink()
    (predictions / "c.png").unlink()
    with pytest.raises(DataError, match=r"2 of 3 predictions are missing: a, c\..*--allow-missing"):
        pair_folders(predictions, truth)


@pytest.mark.faults
def test_a_missing_prediction_scores_as_empty_when_allowed(folders):
    predictions, truth = folders
    (predictions / "a.png").unlink()
    pairs = pair_folders(predictions, truth, allow_missing=True)
    assert pairs.missing == ("a",)
    first = next(iter(evaluate_folders(pairs, BINARY)))
    assert first.case_id == "a"
    assert first.classes[0].outcome == "missed"
    assert first.dice == 0


@pytest.mark.faults
def test_a_prediction_without_ground_truth_is_listed(folders):
    predictions, truth = folders
    write_label_map(predictions / "extra.png", SQUARE, 2)
    pairs = pair_folders(predictions, truth)
    assert [path.name for path in pairs.unmatched] == ["extra.png"]
    assert len(pairs.pairs) == 3


@pytest.mark.faults
def test_a_wrong_size_and_a_torn_file_fail_by_name_and_the_rest_is_scored(folders):
    predictions, truth = folders
    write_label_map(predictions / "a.png", np.zeros((4, 5), np.uint8), 2)
    (predictions / "b.png").write_bytes((predictions / "b.png").read_bytes()[:40])
    a, b, c = scored(predictions, truth)
    assert isinstance(a, FailedCase)
    assert "prediction is 5x4" in a.error
    assert "ground truth 4x4" in a.error
    assert isinstance(b, FailedCase)
    assert "b.png" in b.error
    assert isinstance(c, CaseScores)


@pytest.mark.faults
def test_a_label_beyond_the_named_classes_fails_by_name(folders):
    predictions, truth = folders
    write_label_map(predictions / "a.png", SQUARE * 2, 3)
    first = scored(predictions, truth)[0]
    assert isinstance(first, FailedCase)
    assert "a.png" in first.error


@pytest.mark.faults
def test_an_empty_folder_is_refused(tmp_path, folders):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match=r"nothing: no masks in the folder of the predictions.*DICOM-SEG"):
        pair_folders(tmp_path / "nothing", folders[1])

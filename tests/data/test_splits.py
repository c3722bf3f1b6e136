import pytest

from sdseg_cli.core.data.benchmarks import BENCHMARKS, CVC_SEQUENCE_ENDS, cvc_sequence
from sdseg_cli.core.data.images import natural_key
from sdseg_cli.core.data.splits import Split, check_split, make_split, read_split, split_to_yaml
from sdseg_cli.core.errors import DataError, UsageError
from sdseg_cli.core.recipe import resources_root
from sdseg_cli.core.seeding import derive_seed

SPLITS = resources_root() / "splits"


def alone(count):
    return {str(index): str(index) for index in range(count)}


def sizes(split):
    return [len(ids) for ids in split.parts().values()]


# Split files


def test_a_split_survives_the_file(tmp_path):
    split = Split("mine", ("1", "007", "1e5", "no", "größe: x", "- a", "#b"), (), ("2024-01-01", " blank "))
    (tmp_path / "s.yaml").write_text(split_to_yaml(split, "a header\n\nof lines"), encoding="utf-8")
    again = read_split(tmp_path / "s.yaml")
    assert {name: set(ids) for name, ids in again.parts().items()} == {
        name: set(ids) for name, ids in split.parts().items()
    }
    assert (tmp_path / "s.yaml").read_text().startswith("# a header\n#\n# of lines\nname: mine\n")


def test_ids_are_text_whatever_they_look_like(tmp_path):
    (tmp_path / "s.yaml").write_text("train: [007, 1e5, no, 0x10, 1:30]\n")
    assert set(read_split(tmp_path / "s.yaml").train) == {"007", "1e5", "no", "0x10", "1:30"}


@pytest.mark.faults
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "found nothing"),
        ("- a\n- b", "found a list"),
        ("train: a", "train is not a list of case ids"),
        ("train: [[a]]", "train is not a list of case ids"),
        ("validation: [a]", "found validation.*expected the lists train, validation and test"),
        ("train: [a]\ntraining: [b]", "found train, training"),
        ("train: [a]\ntrain: [b]", "train stands there twice"),
        ("train: [a", "not a split file"),
        ("train: [a, b]\ntest: [a]", r"1 cases stand in the split twice: a \(train and test\)"),
        ("train: [a, a]", r"a \(train and train\)"),
    ],
)
def test_a_file_that_is_no_split_says_why(tmp_path, text, expected):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(DataError, match=rf"(?s)s\.yaml: .*({expected})"):
        read_split(tmp_path / "s.yaml")


@pytest.mark.faults
def test_a_split_file_that_is_not_there_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match=r"gone\.yaml: no such split file"):
        read_split(tmp_path / "gone.yaml")


@pytest.mark.faults
def test_a_split_must_list_exactly_the_cases_that_are_there():
    split = Split("s", ("a", "b"), ("c",), ())
    options = {"where": "s.yaml", "may_share_groups": False}
    assert check_split(split, {"a": "a", "b": "b", "c": "c"}, **options) == []
    expected = r"1 listed cases are not in the data \(c\) and 2 cases of the data are not listed \(d, e\)"
    with pytest.raises(DataError, match=expected):
        check_split(split, dict(zip("abde", "abde", strict=True)), **options)


@pytest.mark.faults
def test_a_split_must_not_cut_a_group_unless_it_may():
    split = Split("s", ("a", "b"), ("c",), ())
    groups = {"a": "p1", "b": "p2", "c": "p1"}
    with pytest.raises(DataError, match=r"split s\.yaml cuts 1 groups in two \(p1\)"):
        check_split(split, groups, where="s.yaml", may_share_groups=False)
    assert check_split(split, groups, where="s.yaml", may_share_groups=True) == ["p1"]


# Made splits


@pytest.mark.parametrize(
    ("count", "expected"), [(3, [1, 1, 1]), (10, [8, 1, 1]), (12, [10, 1, 1]), (240, [192, 24, 24])]
)
def test_a_made_split_has_the_wanted_shares(count, expected):
    assert sizes(make_split(alone(count), [0.8, 0.1, 0.1], seed=0)) == expected


def test_a_made_split_depends_on_nothing_but_its_arguments():
    first = make_split(alone(40), [0.8, 0.1, 0.1], seed=0)
    shuffled = dict(reversed(alone(40).items()))
    assert make_split(shuffled, [0.8, 0.1, 0.1], seed=0) == first
    assert make_split(alone(40), [0.8, 0.1, 0.1], seed=1) != first
    # A change of the hash would silently change everybody's test split.
    assert first.test == ("1", "9", "31", "32")


def test_a_made_split_is_complete_and_disjoint():
    parts = make_split(alone(37), [0.5, 0.25, 0.25], seed=3).parts().values()
    assert sorted(case_id for ids in parts for case_id in ids) == sorted(alone(37))


def test_groups_stay_whole():
    groups = {f"p{patient}_{image}": f"p{patient}" for patient in range(12) for image in range(patient + 1)}
    split = make_split(groups, [0.6, 0.2, 0.2], seed=0)
    assert check_split(split, groups, where="", may_share_groups=False) == []
    assert sizes(split) == [47, 16, 15]


def test_no_split_stays_empty_when_one_group_is_large():
    groups = {str(index): "big" for index in range(50)} | {"a": "a", "b": "b"}
    assert sorted(sizes(make_split(groups, [0.8, 0.1, 0.1], seed=0))) == [1, 1, 50]


def test_a_share_of_nothing_gets_nothing():
    assert sizes(make_split(alone(5), [0, 0, 1], seed=0)) == [0, 0, 5]


@pytest.mark.faults
def test_too_few_groups_are_refused():
    with pytest.raises(DataError, match="9 cases in 2 groups cannot fill 3 splits"):
        make_split({str(index): str(index % 2) for index in range(9)}, [0.8, 0.1, 0.1], seed=0)


@pytest.mark.faults
@pytest.mark.parametrize("fractions", [[0.8, 0.1], [0.8, 0.1, 0.2], [1.2, -0.1, -0.1]])
def test_senseless_fractions_are_refused(fractions):
    with pytest.raises(UsageError, match=r"--fractions .*three numbers from 0 to 1 that sum to 1"):
        make_split(alone(9), fractions, seed=0)


# The shipped splits


def test_every_split_that_a_benchmark_names_is_shipped_and_readable():
    named = {file for benchmark in BENCHMARKS.values() for file in benchmark.splits.values()}
    assert named == {path.name for path in SPLITS.iterdir()}
    for file in named:
        assert read_split(SPLITS / file).name == file.removesuffix(".yaml")


@pytest.mark.parametrize(("name", "counts"), [("kseg", (800, 100, 100)), ("cvc", (492, 60, 60))])
def test_the_paper_splits_are_what_their_headers_say(name, counts):
    split = read_split(SPLITS / f"{name}.yaml")
    assert tuple(sizes(split)) == counts
    order = sorted(split.of_case(), key=lambda case_id: derive_seed("split", 0, case_id))
    train, validation = order[: counts[0]], order[counts[0] : sum(counts[:2])]
    assert split.train == tuple(sorted(train, key=natural_key))
    assert split.validation == tuple(sorted(validation, key=natural_key))


TEST_IDS = {
    "refuge": [f"T{number:04d}" for number in range(1, 401)],
    "btcv": [f"{number:04d}" for number in (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)],
    "sts3d": ["0010", "0011", "0012"],
}
OTHER_IDS = {
    "refuge": [
        *(f"g{number:04d}" for number in range(1, 41)),
        *(f"n{number:04d}" for number in range(1, 361)),
        *(f"V{number:04d}" for number in range(1, 401)),
    ],
    "btcv": [
        f"{number:04d}"
        for number in (5, 6, 7, 9, 10, 21, 23, 24, 26, 27, 28, 30, 31, 33, 34, 37, 39, 40)
    ],
    "sts3d": [f"{number:04d}" for number in range(1, 10)],
}  # fmt: skip


@pytest.mark.parametrize(("name", "validation"), [("refuge", 80), ("btcv", 3), ("sts3d", 1)])
def test_published_test_cases_stay_whole_and_validation_comes_out_of_the_rest(name, validation):
    split = read_split(SPLITS / f"{name}.yaml")
    assert split.test == tuple(TEST_IDS[name])
    order = sorted(OTHER_IDS[name], key=lambda case_id: derive_seed("split", 0, case_id))
    assert split.train == tuple(sorted(order[:-validation], key=natural_key))
    assert split.validation == tuple(sorted(order[-validation:], key=natural_key))


def test_the_sequence_split_of_cvc_keeps_whole_sequences():
    split = read_split(SPLITS / "cvc-sequence.yaml")
    groups = {str(frame): cvc_sequence(str(frame)) for frame in range(1, 613)}
    assert sizes(split) == [492, 60, 60]
    assert check_split(split, groups, where="", may_share_groups=False) == []
    assert len({groups[frame] for frame in split.test}) == 3


def test_the_paper_split_of_cvc_cuts_sequences():
    groups = {str(frame): cvc_sequence(str(frame)) for frame in range(1, 613)}
    split = read_split(SPLITS / "cvc.yaml")
    assert len(check_split(split, groups, where="", may_share_groups=True)) > 20


def test_cvc_frames_know_their_sequence():
    assert len(CVC_SEQUENCE_ENDS) == 29
    assert [cvc_sequence(frame) for frame in ("1", "25", "26", "612")] == [
        "sequence-01",
        "sequence-01",
        "sequence-02",
        "sequence-29",
    ]
    with pytest.raises(DataError, match="unexpected frame '613'"):
        cvc_sequence("613")

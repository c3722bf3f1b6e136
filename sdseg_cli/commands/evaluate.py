"""``sdseg evaluate``: scores of a split or of a folder of masks, per case and class, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdseg_cli import console
from sdseg_cli.commands._compiling import compile_if_wanted
from sdseg_cli.commands._measured import (
    Model,
    dataset_evidence,
    file_name,
    input_sums,
    show,
)
from sdseg_cli.commands._options import (
    BatchSizeOption,
    CompileOption,
    Convention,
    ConventionOption,
    DataOption,
    DecoderOption,
    Device,
    DeviceOption,
    FlipsOption,
    GridOption,
    JsonOption,
    LargestComponentOption,
    OutOption,
    OverwriteOption,
    Precision,
    PrecisionOption,
    SamplesOption,
    ScoreGrid,
    SeedOption,
    Split,
    SplitOption,
    StepsOption,
    ThresholdOption,
    complete_run,
    flip_words,
)
from sdseg_cli.core.data.images import write_png
from sdseg_cli.core.errors import DataError, UsageError
from sdseg_cli.core.files import CASES_FILE, REPORT_FILE, SUMMARY_FILE, refuse_existing, whole_folder
from sdseg_cli.core.manifest import made_with, write_manifest
from sdseg_cli.core.metrics.surface import NSD_TOLERANCE
from sdseg_cli.core.reporting.tables import to_csv
from sdseg_cli.core.run_directory import atomic_write, to_json

if TYPE_CHECKING:
    from sdseg_cli.core.engine.evaluation_records import CaseScores, FailedCase
    from sdseg_cli.core.engine.processes import Processes

OVERLAYS = "overlays"
DEFAULT_OUT = Path("evaluation")  # where neither --out nor a run says otherwise
MOST_LISTED = 20  # bad cases named on the screen; the summary has them all


def evaluate(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "--run",
            "-m",
            metavar="MODEL",
            help="Run directory, model folder or hub id. Default: the newest finished run.",
            show_default=False,
            autocompletion=complete_run,
        ),
    ] = None,
    data: DataOption = None,
    split: SplitOption = Split.test,
    predictions: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Masks to score, instead of a model's.", show_default=False),
    ] = None,
    ground_truth: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="The true masks, of the same names.", show_default=False),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="With --predictions: foreground classes by commas, in the order of their numbers. "
            "Default: one, 'foreground'.",
            show_default=False,
        ),
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="With --predictions: score a missing mask as empty.")
    ] = False,
    nsd_tolerance: Annotated[
        float | None,
        typer.Option(
            "--nsd-tolerance",
            min=0,
            metavar="MM",
            help="Distance that the normalised surface Dice forgives, in mm where the spacing is known, "
            "else in pixels. Default: 2.",
            show_default=False,
        ),
    ] = None,
    resample: Annotated[
        bool,
        typer.Option(
            "--resample", help="With --predictions: bring a volume of another grid onto that of the truth."
        ),
    ] = False,
    convention: ConventionOption = None,
    grid: GridOption = None,
    out: OutOption = None,
    overlays: Annotated[int, typer.Option(min=0, max=1000, help="How many of the worst cases to draw.")] = 8,
    seed: SeedOption = 0,
    steps: StepsOption = None,
    samples: SamplesOption = None,
    threshold: ThresholdOption = None,
    flips: FlipsOption = None,
    largest_component: LargestComponentOption = None,
    batch_size: BatchSizeOption = None,
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = Precision.auto,
    compiled: CompileOption = None,
    decoder: DecoderOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score a model on a split, or one folder of masks against another.

    Writes cases.csv (Dice, IoU, precision, recall, HD95, ASSD, NSD per case and class),
    summary.json (mean, median, bootstrap 95 % interval), overlays/ (the worst cases) and report.html,
    one page to look at: intervals, calibration, best and worst cases, every case in a table.
    Cases that cannot be scored are listed, and the exit code is then 3.
    Folders hold masks as PNG, JPEG, TIFF or BMP, or as volumes: NIfTI, NRRD, MetaImage or DICOM-SEG.

    Examples:

    sdseg evaluate  # newest run, its test split

    sdseg evaluate --run runs/kseg-fast --convention sdseg --grid model

    sdseg evaluate --predictions masks/ --ground-truth truth/ --out scores/

    sdseg evaluate --predictions masks/ --ground-truth truth/ --classes liver,kidney
    """
    tolerance = NSD_TOLERANCE if nsd_tolerance is None else nsd_tolerance
    if predictions is None and ground_truth is None:
        only_folders = {"--classes": classes, "--allow-missing": allow_missing, "--resample": resample}
        _refuse(only_folders, "--predictions and --ground-truth")
        found = Model.find(model)
        settings = found.recipe.evaluate if found.recipe is not None else None
        evaluation = _evaluate_split(
            found,
            data,
            split.value,
            out,
            convention=(convention or (settings.convention if settings else Convention.standard)),
            grid=(grid or (settings.grid if settings else ScoreGrid.case)),
            sampling=found.sampling(
                num_inference_steps=steps,
                num_samples=samples,
                threshold=threshold,
                flips=flip_words(flips),
                largest_component=largest_component,
            ),
            loading={
                "device": device.value,
                "precision": precision.value,
                "batch_size": batch_size,
                "seed": seed,
                **({"decoder": str(decoder.resolve())} if decoder is not None else {}),
            },
            compiled=compiled,
            nsd_tolerance=tolerance,
            worst=overlays,
            overwrite=overwrite,
        )
    else:
        given = {"--model": model, "--data": data, "--grid": grid, "--steps": steps, "--samples": samples}
        given = {**given, "--flips": flips, "--largest-component": largest_component}
        given = {**given, "--decoder": decoder, "--compile": compiled, "--batch-size": batch_size}
        _refuse({**given, "--threshold": threshold}, "a model")
        if predictions is None or ground_truth is None:
            raise UsageError("--predictions and --ground-truth belong together: give both folders.")
        evaluation = _evaluate_folders(
            predictions,
            ground_truth,
            _class_names(classes),
            out or DEFAULT_OUT,
            convention=convention or Convention.standard,
            allow_missing=allow_missing,
            scoring={"resample": resample, "nsd_tolerance": tolerance},
            worst=overlays,
            overwrite=overwrite,
        )
    if evaluation.processes.is_main:
        evaluation.report(worst=overlays, overwrite=overwrite, as_json=as_json)
    if evaluation.failed:
        raise typer.Exit(3)


@dataclass(frozen=True)
class _Evaluation:
    """The records of all processes and what the report says about them."""

    title: str
    target: Path
    classes: tuple[str, ...]
    convention: str
    scores: list[CaseScores]
    failed: list[FailedCase]
    processes: Processes
    facts: dict[str, Any]
    score_again: Callable[[list[str]], Iterable[CaseScores | FailedCase]]
    recipe: str = ""
    inputs: dict[str, str] = field(default_factory=dict)  # file -> SHA-256, of two folders

    def report(self, *, worst: int, overwrite: bool, as_json: bool) -> None:
        """Write the folder of results, then show the table."""
        from sdseg_cli.core.engine.evaluation_summary import (
            CASE_COLUMNS,
            CONVENTION_TEXTS,
            DISTANCE_TEXT,
            case_rows,
            evaluation_table,
            summarise_cases,
            worst_cases,
        )

        summary = summarise_cases(self.scores, self.classes)
        content = {
            "title": self.title,
            "convention": self.convention,
            "convention_meaning": CONVENTION_TEXTS[self.convention],
            "distance_meaning": DISTANCE_TEXT,
            "distance_unit": summary.unit,
            "nsd_tolerance_unit": summary.unit,
            "cases": {"scored": len(self.scores), "failed": len(self.failed)},
            "failed_cases": {case.case_id: case.error for case in self.failed},
            "classes": {entry.class_name: asdict(entry) for entry in summary.classes},
            **self.facts,
            **made_with(),
        }
        with whole_folder(self.target, overwrite=overwrite, ours=SUMMARY_FILE) as folder:
            atomic_write(folder / CASES_FILE, to_csv(case_rows(self.scores), CASE_COLUMNS))
            _draw(worst_cases(self.scores, worst), folder / OVERLAYS, self.classes)
            atomic_write(folder / REPORT_FILE, self._page(content))
            atomic_write(folder / SUMMARY_FILE, to_json(content, indent=2) + "\n")
            write_manifest(folder, "evaluation", inputs=self.inputs, **made_with())
        if as_json:
            console.show_json(content)
        else:
            show(evaluation_table(summary, self.title, self.convention))
        for case in self.failed[:MOST_LISTED]:
            console.warn(case.error if case.case_id in case.error else f"{case.case_id}: {case.error}")
        if len(self.failed) > MOST_LISTED:
            console.warn(f"and {len(self.failed) - MOST_LISTED} more, see {SUMMARY_FILE}")
        if self.failed:
            total = len(self.scores) + len(self.failed)
            console.warn(f"{len(self.failed)} of {total} cases could not be scored and are in no figure")
        written = [CASES_FILE, SUMMARY_FILE, *([f"{OVERLAYS}/"] if worst else []), REPORT_FILE]
        console.done(f"{self.target}: {', '.join(written)}")

    def _page(self, content: dict[str, Any]) -> str:
        from sdseg_cli.core.engine.evaluation_page import evaluation_page, with_middle_pictures
        from sdseg_cli.core.reporting.page import render_page

        scores = with_middle_pictures(self.scores, self.score_again)
        page = evaluation_page(self.title, self.classes, scores, self.failed, content, recipe=self.recipe)
        return render_page(page)


def _evaluate_split(
    model: Model,
    data: Path | None,
    split: str,
    out: Path | None,
    *,
    convention: Any,
    grid: Any,
    sampling: dict[str, Any],
    loading: dict[str, Any],
    compiled: bool | None,
    nsd_tolerance: float,
    worst: int,
    overwrite: bool,
) -> _Evaluation:
    convention, grid = str(convention), str(grid)
    dataset = model.dataset(data)
    evidence = dataset_evidence(dataset, split)
    run = model.reference.run
    target = out or (run.evaluation / split if run is not None else DEFAULT_OUT)
    refuse_existing(target, overwrite=overwrite, ours=SUMMARY_FILE)
    console.say(f"data: {dataset.root}, split {split}, {evidence['slices']} slices")

    with console.working("loading the model"):
        from sdseg_cli.core.engine.evaluation import check_fit, evaluate_split
        from sdseg_cli.core.engine.inference import load_predictor
        from sdseg_cli.core.engine.processes import Processes

        processes = Processes(cpu=loading["device"] == "cpu")
        predictor = load_predictor(model.reference, grid=grid, **sampling, **loading)
    check_fit(predictor, dataset.manifest, dataset.root)
    view = dataset.split(split)
    compile_if_wanted(predictor, compiled, len(view) // processes.count)

    def score(cases: Any, processes: Processes | None) -> Iterable[CaseScores]:
        return evaluate_split(
            predictor,
            cases,
            dataset.manifest.classes,
            convention=convention,  # type: ignore[arg-type]
            grid=grid,  # type: ignore[arg-type]
            processes=processes,
            nsd_tolerance=nsd_tolerance,
        )

    def score_again(case_ids: list[str]) -> Iterable[CaseScores]:
        from sdseg_cli.core.engine.evaluation_page import SelectedCases

        return score(SelectedCases(view, case_ids), None)

    scored = score(view, processes)
    scores, failed = _collect(scored, len(set(view.case_ids)), worst, processes)
    remarks = predictor.warnings(processes.gather(predictor.looks))
    for remark in remarks:
        console.warn(remark)
    return _Evaluation(
        f"{model.reference.location}, split {split} of {dataset.manifest.name}",
        target,
        dataset.manifest.classes,
        convention,
        scores,
        failed,
        processes,
        {
            "model": model.evidence(),
            "dataset": evidence,
            "grid": grid,
            "nsd_tolerance": nsd_tolerance,
            "sampling": {"seed": loading["seed"], **sampling},
            "precision": predictor.precision,
            **({"decoder": loading["decoder"]} if "decoder" in loading else {}),
            "device": str(predictor.device),
            "processes": processes.count,
            "warnings": remarks,
        },
        score_again,
        model.recipe_text(),
    )


def _evaluate_folders(
    predictions: Path,
    ground_truth: Path,
    classes: tuple[str, ...],
    out: Path,
    *,
    convention: Convention,
    allow_missing: bool,
    scoring: dict[str, Any],
    worst: int,
    overwrite: bool,
) -> _Evaluation:
    refuse_existing(out, overwrite=overwrite, ours=SUMMARY_FILE)
    from sdseg_cli.core.engine.folder_evaluation import evaluate_folders, pair_folders

    pairs = pair_folders(predictions, ground_truth, allow_missing=allow_missing)
    for path in pairs.unmatched:
        console.warn(f"{path}: there is no ground truth of this name, so it is not scored")
    if pairs.missing:
        console.warn(f"missing and scored as empty: {', '.join(pairs.missing)}")
    with console.working(f"scoring {len(pairs.pairs)} pairs of masks"):
        from sdseg_cli.core.engine.processes import Processes

        processes = Processes(cpu=True)

    def score_again(case_ids: list[str]) -> Iterable[CaseScores | FailedCase]:
        few = replace(pairs, pairs=tuple(pair for pair in pairs.pairs if pair[0] in case_ids))
        return evaluate_folders(few, classes, convention=convention.value, **scoring)

    scored = evaluate_folders(pairs, classes, convention=convention.value, processes=processes, **scoring)
    scores, failed = _collect(scored, len(pairs.pairs), worst, processes)
    if not scores:
        raise DataError(
            f"none of the {len(failed)} pairs could be scored: {'; '.join(case.error for case in failed[:5])}"
        )
    return _Evaluation(
        f"{predictions} against {ground_truth}",
        out,
        classes,
        convention.value,
        scores,
        failed,
        processes,
        {
            "predictions": str(predictions),
            "ground_truth": str(ground_truth),
            "missing_scored_as_empty": list(pairs.missing),
            "unmatched_predictions": [str(path) for path in pairs.unmatched],
            "grid": "case",
            **scoring,
            "processes": processes.count,
        },
        score_again,
        inputs=input_sums(path for _, *pair in pairs.pairs for path in pair if path is not None),
    )


def _collect(
    scored: Iterable[CaseScores | FailedCase], total: int, worst: int, processes: Processes
) -> tuple[list[CaseScores], list[FailedCase]]:
    """Score this process's share and bring the records of all together, in order."""
    from sdseg_cli.core.engine.evaluation_records import CaseScores, FailedCase
    from sdseg_cli.core.engine.evaluation_summary import keep_pictures

    share = len(processes.share(range(total)))
    shown = console.progress(scored, share, "scoring", unit="cases")
    records = processes.gather(keep_pictures(shown, worst))
    scores = [record for record in records if isinstance(record, CaseScores)]
    return scores, [record for record in records if isinstance(record, FailedCase)]


def _draw(cases: Sequence[CaseScores], folder: Path, classes: Sequence[str]) -> None:
    """Draw the worst cases, the worst first: one picture each."""
    from sdseg_cli.core.reporting.overlays import prediction_grid

    if not cases:
        return
    folder.mkdir()
    for rank, case in enumerate(cases, start=1):
        if case.picture is None:
            continue
        scores = ", ".join(f"{entry.class_name} {entry.dice:.3f}" for entry in case.classes)
        picture = case.picture
        row = (
            f"{case.case_id}: Dice {scores}",
            picture.image,
            picture.ground_truth,
            picture.prediction,
        )
        target = folder / f"worst-{rank:02d}-{file_name(case.case_id)}.png"
        write_png(target, prediction_grid([row], classes=classes))


def _class_names(classes: str | None) -> tuple[str, ...]:
    names = ["foreground"] if classes is None else [name.strip() for name in classes.split(",")]
    if not all(names) or len(set(names)) < len(names) or len(names) > 254:
        raise UsageError(
            f"--classes {classes!r}: expected different names separated by commas, e.g. liver,kidney."
        )
    return ("background", *names)


def _refuse(options: dict[str, Any], what: str) -> None:
    """Refuse options that would have no effect."""
    given = [name for name, value in options.items() if value is not None and value is not False]
    if given:
        raise UsageError(f"{', '.join(given)} only make sense with {what}. Leave them out.")

"""``sdseg stability``: how far predictions move when only the noise changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from enum import StrEnum
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
    DataOption,
    DecoderOption,
    Device,
    DeviceOption,
    GridOption,
    JsonOption,
    ModelOption,
    OutOption,
    OverwriteOption,
    Precision,
    PrecisionOption,
    SeedOption,
    Split,
    SplitOption,
    StepsOption,
    ThresholdOption,
)
from sdseg_cli.core.data.images import list_images, read_image, write_label_map, write_png
from sdseg_cli.core.errors import DataError, ModelError, UsageError
from sdseg_cli.core.files import CASES_FILE, REPORT_FILE, SUMMARY_FILE, refuse_existing, whole_folder
from sdseg_cli.core.manifest import made_with, write_manifest
from sdseg_cli.core.reporting.tables import to_csv
from sdseg_cli.core.run_directory import atomic_write, to_json

if TYPE_CHECKING:
    from sdseg_cli.core.data.prepared import PreparedDataset
    from sdseg_cli.core.engine.inference import Predictor, SliceInput, SlicePrediction
    from sdseg_cli.core.engine.processes import Processes
    from sdseg_cli.core.engine.stability import SliceStability, StabilitySummary
    from sdseg_cli.core.metrics.similarity import PerceptualDistance

RUNS = "runs"
DEFAULT_OUT = Path("stability")  # where neither --out nor a run says otherwise


class Protocol(StrEnum):
    """How pictures of two runs are compared."""

    standard = "standard"
    sdseg = "sdseg"


def stability(
    images: Annotated[
        Path | None,
        typer.Argument(help="A folder of images, instead of a prepared dataset.", show_default=False),
    ] = None,
    model: ModelOption = None,
    data: DataOption = None,
    split: SplitOption = Split.test,
    runs: Annotated[int, typer.Option(min=2, max=1000, help="Predictions of every image.")] = 10,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many images.", show_default=False)
    ] = None,
    protocol: Annotated[
        Protocol, typer.Option(help="Today's ranges, or the published protocol's.")
    ] = Protocol.standard,
    lpips_backbone: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|download",
            help="AlexNet's weights for LPIPS, or 'download' (233 MB). Default: torch's cache, if there.",
            show_default=False,
        ),
    ] = None,
    grid: GridOption = None,
    save_runs: Annotated[
        bool, typer.Option("--save-runs", help="Also write the masks and scores of every run.")
    ] = False,
    out: OutOption = None,
    seed: SeedOption = 0,
    steps: StepsOption = None,
    threshold: ThresholdOption = None,
    batch_size: BatchSizeOption = None,
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = Precision.auto,
    compiled: CompileOption = None,
    decoder: DecoderOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Predict every image several times from different noise and compare the runs.

    Writes cases.csv, summary.json and report.html, a page to look at: LPIPS, PSNR, SSIM, MS-SSIM
    (each run with the first) and Dice agreement (all pairs of runs), for the masks and for the
    scores before the threshold. The recipe's flips and largest component are left out.

    Examples:

    sdseg stability --runs 10  # newest run, its test split

    sdseg stability --model runs/kseg --protocol sdseg  # as published

    sdseg stability scans/ --runs 5 --limit 20 --save-runs --out stability/

    sdseg stability --lpips-backbone alexnet-owt-7be5be79.pth
    """
    if images is not None and data is not None:
        raise UsageError("a folder of images and --data exclude each other. Give one of them.")
    found = Model.find(model)
    dataset = found.dataset(data) if images is None else None
    source = (
        _dataset_source(dataset, split.value) if dataset is not None else _folder_source(Path(images or ""))
    )
    run = found.reference.run
    default_out = run.stability / split.value if run is not None and dataset is not None else DEFAULT_OUT
    target = out or default_out
    refuse_existing(target, overwrite=overwrite, ours=SUMMARY_FILE)
    where = str(grid or ("model" if protocol is Protocol.sdseg else "case"))
    sampling = found.sampling(num_inference_steps=steps, threshold=threshold)

    if lpips_backbone == "download":
        console.say("the LPIPS backbone is fetched if it is not in torch's cache (233 MB)")
    with console.working("loading the model"):
        from sdseg_cli.core.engine.inference import choose_device, load_predictor
        from sdseg_cli.core.engine.processes import Processes

        processes = Processes(cpu=device is Device.cpu)
        perceptual, lpips_reason = _perceptual(lpips_backbone, str(choose_device(device.value)))
        predictor = load_predictor(
            found.reference,
            device=device.value,
            precision=precision.value,
            batch_size=batch_size,
            seed=seed,
            grid=where,
            num_samples=runs,
            return_samples=True,
            **({"decoder": str(decoder.resolve())} if decoder is not None else {}),
            **sampling,
        )
    if lpips_reason:
        console.warn(f"LPIPS is left out: {lpips_reason}")
    if dataset is not None:
        from sdseg_cli.core.engine.evaluation import check_fit

        check_fit(predictor, dataset.manifest, dataset.root)
    compile_if_wanted(predictor, compiled, len(source.names[:limit]))
    settings = {
        **({"decoder": str(decoder.resolve())} if decoder is not None else {}),
        "runs": runs,
        "protocol": protocol.value,
        "grid": where,
        "model": found.evidence(),
        **source.facts,
        "sampling": {"seed": seed, **sampling},
        "precision": predictor.precision,
        "device": str(predictor.device),
        "processes": processes.count,
    }
    job = _Measurement(
        predictor, source, processes, protocol.value, perceptual, lpips_reason, limit, found.recipe_text()
    )
    failed = job.run(target, settings, save_runs=save_runs, overwrite=overwrite, as_json=as_json)
    if failed:
        raise typer.Exit(3)


@dataclass(frozen=True)
class _Source:
    """Where the images come from: how many there are and how to read number i, and the report's facts."""

    names: Sequence[str]  # of cases, or of files
    dataset: PreparedDataset | None
    split: str
    facts: dict[str, Any]

    def read(self, index: int, predictor: Predictor) -> SliceInput:
        """Read one image onto the model's grid. Raises DataError, by name, where it cannot be read."""
        from sdseg_cli.core.engine.inference import SliceInput
        from sdseg_cli.core.engine.prediction import grid_of, trained_with

        if self.dataset is not None:
            current = self.dataset.split(self.split)[index]
            return SliceInput(
                current.case_id, current.slice_index, current.image, current.grid, current.spacing_mm
            )
        path = Path(self.facts["images"]) / self.names[index]
        pixels = read_image(path).pixels
        grid = grid_of(pixels, predictor.image_size, predictor.resize, trained_with(predictor).get("crop"))
        # The case id decides the noise: the same as in `sdseg predict`.
        unique = sum(Path(name).stem == path.stem for name in self.names) == 1
        return SliceInput(path.stem if unique else path.name, 0, grid.image_to_model(pixels), grid)


def _dataset_source(dataset: PreparedDataset, split: str) -> _Source:
    facts = dataset_evidence(dataset, split)
    return _Source(dataset.split(split).case_ids, dataset, split, {"dataset": facts})


def _folder_source(folder: Path) -> _Source:
    names = [path.name for path in list_images(folder)]
    if not names:
        raise DataError(f"{folder}: no image files in the folder. Expected PNG, JPEG, TIFF or BMP.")
    return _Source(names, None, "", {"images": str(folder)})


@dataclass(frozen=True)
class _Measurement:
    """One call of the command."""

    predictor: Predictor
    source: _Source
    processes: Processes
    protocol: Any
    perceptual: PerceptualDistance | None
    lpips_reason: str
    limit: int | None
    recipe: str = ""

    def run(
        self, target: Path, settings: dict[str, Any], *, save_runs: bool, overwrite: bool, as_json: bool
    ) -> dict[str, str]:
        """Measure, write and show. Returns the images that could not be read, with the reasons."""
        with ExitStack() as stack:
            own = []
            if self.processes.is_main:
                temporary = whole_folder(target, overwrite=overwrite, ours=SUMMARY_FILE)
                own = [str(stack.enter_context(temporary))]
            # All processes write the pictures of their runs into the main one's folder.
            folder = Path(self.processes.gather(own)[0])
            rows, failed, places = self._measure(folder / RUNS if save_runs else None)
            if not rows:
                raise DataError(f"none of the images could be read: {'; '.join(failed.values())}")
            remarks = self.predictor.warnings(self.processes.gather(self.predictor.looks))
            if self.processes.is_main:
                report = self._write(folder, rows, failed, {**settings, "warnings": remarks}, places)
        if self.processes.is_main:
            self._show(report, rows, failed, target, as_json=as_json)
        return failed

    def _measure(
        self, runs_folder: Path | None
    ) -> tuple[list[dict[str, Any]], dict[str, str], dict[tuple[str, int], int]]:
        """The rows of all processes, what could not be read, and the number of every (case, slice)."""
        from sdseg_cli.core.engine.stability import measure_stability, slice_rows

        indices = self.processes.share(range(len(self.source.names))[: self.limit])
        unreadable: dict[str, str] = {}
        places: dict[tuple[str, int], int] = {}
        inputs = self._inputs(indices, unreadable, places)
        measured = measure_stability(
            self.predictor, inputs, protocol=self.protocol, perceptual=self.perceptual
        )
        own: list[list[dict[str, Any]]] = []
        for record in console.progress(measured, len(indices), "comparing runs", unit="images"):
            own.append(slice_rows(record))
            if runs_folder is not None:
                _save_runs(record, runs_folder, self.predictor.classes)
        rows = [row for rows in self.processes.gather(own) for row in rows]
        failed = dict(self.processes.gather(list(unreadable.items())))
        return rows, failed, dict(self.processes.gather(list(places.items())))

    def _inputs(
        self, indices: Iterable[int], unreadable: dict[str, str], places: dict[tuple[str, int], int]
    ) -> Iterator[SliceInput]:
        for index in indices:
            try:
                item = self.source.read(index, self.predictor)
            except DataError as error:
                unreadable[self.source.names[index]] = str(error)
                continue
            places[item.case_id, item.slice_index] = index
            yield item

    def _write(
        self,
        folder: Path,
        rows: list[dict[str, Any]],
        failed: dict[str, str],
        settings: dict[str, Any],
        places: dict[tuple[str, int], int],
    ) -> dict[str, Any]:
        from sdseg_cli.core.engine.stability import PROTOCOL_TEXTS, ROW_COLUMNS, summarise_rows

        summary = summarise_rows(rows, lpips_reason=self.lpips_reason, protocol=self.protocol)
        report = {
            **settings,
            "protocol_meaning": PROTOCOL_TEXTS[self.protocol],
            "images": {"measured": summary.slices, "failed": len(failed)},
            "failed_images": failed,
            "undefined": summary.reasons,
            "all_runs_equal": summary.all_runs_equal,
            "classes": {
                name: {entry.kind: asdict(entry) for entry in summary.entries if entry.class_name == name}
                for name in self.predictor.classes[1:]
            },
            **made_with(),
        }
        atomic_write(folder / CASES_FILE, to_csv(rows, ROW_COLUMNS))
        atomic_write(folder / REPORT_FILE, self._page(rows, summary, {**report, **settings}, places))
        atomic_write(folder / SUMMARY_FILE, to_json(report, indent=2) + "\n")
        write_manifest(folder, "stability", inputs=self._inputs_read(), **made_with())
        return report

    def _inputs_read(self) -> dict[str, str]:
        """The images of a folder with their SHA-256; those of a dataset are in the report's facts."""
        if self.source.dataset is not None:
            return {}
        folder = Path(self.source.facts["images"])
        return input_sums(folder / name for name in self.source.names[: self.limit])

    def _page(
        self,
        rows: list[dict[str, Any]],
        summary: StabilitySummary,
        content: dict[str, Any],
        places: dict[tuple[str, int], int],
    ) -> str:
        from sdseg_cli.core.engine.stability_page import stability_page
        from sdseg_cli.core.reporting.page import render_page

        def predict_again(chosen: list[tuple[str, int]]) -> Iterator[tuple[SliceInput, SlicePrediction]]:
            items = [self.source.read(places[place], self.predictor) for place in chosen]
            return zip(items, self.predictor(items), strict=True)

        classes, threshold = self.predictor.classes, self.predictor.threshold
        return render_page(
            stability_page(rows, summary, content, classes, predict_again, threshold, recipe=self.recipe)
        )

    def _show(
        self,
        report: dict[str, Any],
        rows: list[dict[str, Any]],
        failed: dict[str, str],
        target: Path,
        *,
        as_json: bool,
    ) -> None:
        from sdseg_cli.core.engine.stability import stability_table, summarise_rows

        if as_json:
            console.show_json(report)
        else:
            summary = summarise_rows(rows, lpips_reason=self.lpips_reason, protocol=self.protocol)
            title = f"{report['runs']} runs of {summary.slices} images, {report['model']['location']}"
            show(stability_table(summary, title, self.protocol))
        for reason in [*failed.values(), *report["warnings"]]:
            console.warn(reason)
        console.done(f"{target}: {CASES_FILE}, {SUMMARY_FILE}, {REPORT_FILE}")


def _perceptual(choice: str | None, device: str) -> tuple[PerceptualDistance | None, str]:
    """LPIPS, or why there is none. A backbone that was asked for must be had; the default may be missing."""
    from sdseg_cli.core.metrics.similarity import PerceptualDistance, find_perceptual_trunk

    try:
        return PerceptualDistance(find_perceptual_trunk(choice), device=device), ""
    except ModelError as error:
        if choice is not None:
            raise
        return None, str(error)


def _save_runs(record: SliceStability, folder: Path, classes: Sequence[str]) -> None:
    """Write ``run-01/maps/CASE.png`` and ``run-01/scores/CLASS/CASE.png`` and so on, 8 bits."""
    name = file_name(record.case_id) + (f"-{record.slice_index:04d}" if record.slice_index else "") + ".png"
    for number, (label_map, scores) in enumerate(zip(record.label_maps, record.scores, strict=True), start=1):
        run = folder / f"run-{number:02d}"
        pictures = [run / "scores" / file_name(class_name) for class_name in classes[1:]]
        for place in [run / "maps", *pictures]:
            place.mkdir(parents=True, exist_ok=True)
        write_label_map(run / "maps" / name, label_map, len(classes))
        for place, score in zip(pictures, scores, strict=True):
            write_png(place / name, score)

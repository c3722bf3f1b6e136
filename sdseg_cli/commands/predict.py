"""``sdseg predict``: any folder of images and volumes -> masks that lie on them voxel by voxel."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdseg_cli import __version__, console
from sdseg_cli.commands._compiling import SLICES_OF_A_VOLUME, compile_if_wanted
from sdseg_cli.commands._measured import Model
from sdseg_cli.commands._options import (
    BatchSizeOption,
    CompileOption,
    DecoderOption,
    Device,
    DeviceOption,
    FlipsOption,
    JsonOption,
    LargestComponentOption,
    ModelOption,
    Precision,
    PrecisionOption,
    SeedOption,
    StepsOption,
    ThresholdOption,
    finite_or_none,
    flip_words,
    parse_window,
)
from sdseg_cli.commands._signals import interruptible
from sdseg_cli.core.engine.prediction import (
    SUMMARY_FILE,
    CasePrediction,
    predict_files,
    read_summary,
    summary_lock,
    summary_rows,
    write_summary,
)
from sdseg_cli.core.engine.prediction_plan import (
    PredictionTask,
    Shard,
    plan_predictions,
    prepare_folder,
    readable,
    refuse_existing,
    remove_outputs,
    split_existing,
)
from sdseg_cli.core.errors import Interrupted, SdsegError, UsageError
from sdseg_cli.core.files import REPORT_FILE
from sdseg_cli.core.manifest import Journal, made_with, model_sum
from sdseg_cli.core.run_directory import ModelReference, atomic_write, to_json

if TYPE_CHECKING:
    from sdseg_cli.core.data.dicom_codes import SegmentCode
    from sdseg_cli.core.engine.inference import Predictor
    from sdseg_cli.core.engine.processes import Processes
    from sdseg_cli.core.engine.volume_prediction import VolumeSettings

SETTINGS_FILE = "prediction.json"
# What decides a mask, as SETTINGS_FILE names it; one that is absent was left to the model.
MASK_SETTINGS = (
    *("model", "model_of", "decoder", "seed", "num_inference_steps", "num_samples", "threshold"),
    *("flips", "largest_component", "window", "axis", "nan_fill", "segment_codes"),
)
MOST_LISTED = 12  # failed files named on the screen; the summary has them all


class VolumeAxis(StrEnum):
    """Anatomical direction that a volume is cut along."""

    axial = "axial"
    coronal = "coronal"
    sagittal = "sagittal"


class VolumeFormat(StrEnum):
    """Format of the masks of volumes."""

    same = "same"
    nifti = "nifti"
    nrrd = "nrrd"
    mha = "mha"
    dicom_seg = "dicom-seg"


EXAMPLES = """
sdseg predict scans/ --out masks/                                  # with the newest finished run
sdseg predict scans/ --out masks/ --model runs/kseg-fast --overlay
sdseg predict a.png b.tif --out masks/ --samples 10 --probabilities
sdseg predict scans/ --out masks/ --samples 10 --flips horizontal --report   # and how sure it is
sdseg predict archive/ --out masks/ --recursive --skip-existing    # go on where it stopped
sdseg predict archive/ --out masks/ --shard 2/4                    # one of four workers, on any machine
sdseg predict ct.nii.gz --out masks/ --window=-175,250             # a volume; the mask has its geometry
sdseg predict dicom/ --out masks/ --recursive --format dicom-seg   # a DICOM-SEG for every series
sdseg predict dicom/ --out masks/ --format dicom-seg --segment-codes codes.yaml   # with your codes
"""


def predict(
    scans: Annotated[
        list[Path],
        typer.Argument(
            help="Folders or single files: PNG, JPEG, TIFF, BMP; NIfTI, NRRD, MetaImage; DICOM series.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for the masks.", show_default=False)
    ],
    model: ModelOption = None,
    recursive: Annotated[
        bool, typer.Option("--recursive", help="Also look into subfolders; they are kept.")
    ] = False,
    overlay: Annotated[
        bool, typer.Option("--overlay", help="Also write overlays/: the image with the mask on it.")
    ] = False,
    probabilities: Annotated[
        bool,
        typer.Option(
            "--probabilities",
            help="Also write probabilities/: 16-bit PNG (65535 is 1), or .npz with several classes; float "
            "NIfTI for volumes.",
        ),
    ] = False,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            min=1,
            help="Noise draws to average; from 2 on also writes uncertainty/. Default: the recipe's.",
            show_default=False,
        ),
    ] = None,
    mask_format: Annotated[
        VolumeFormat,
        typer.Option("--format", help="Of the masks of volumes; 'same' gives NIfTI for DICOM."),
    ] = VolumeFormat.same,
    segment_codes: Annotated[
        Path | None,
        typer.Option(
            "--segment-codes",
            metavar="FILE",
            help="YAML for dicom-seg: what each class is called in DICOM, as in polyp: SCT:41329004:Polyp. "
            "Default: by the names of the classes.",
            show_default=False,
        ),
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(
            metavar="LOW,HIGH",
            help="Values of a volume that become black and white. Default: the model's, else the volume's "
            "0.5 to 99.5 percentile.",
            show_default=False,
        ),
    ] = None,
    axis: Annotated[
        VolumeAxis | None,
        typer.Option(help="Slices of volumes. Default: the model's, else axial.", show_default=False),
    ] = None,
    nan_fill: Annotated[
        float | None,
        typer.Option(
            "--nan-fill",
            metavar="VALUE",
            help="Value for voxels that are NaN or infinite; without it such volumes fail.",
            show_default=False,
        ),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Also write report.html: a page with pictures and a case table.")
    ] = False,
    seed: SeedOption = 0,
    steps: StepsOption = None,
    threshold: ThresholdOption = None,
    flips: FlipsOption = None,
    largest_component: LargestComponentOption = None,
    batch_size: BatchSizeOption = None,
    device: DeviceOption = Device.auto,
    precision: PrecisionOption = Precision.auto,
    compiled: CompileOption = None,
    decoder: DecoderOption = None,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Predict only what has no mask yet.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace masks that exist.")] = False,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Predict the I-th of N equal parts; N calls with the same --out share the work.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Segment images and volumes: one mask each, in its own size and geometry, and a summary.csv.

    Files that cannot be read are listed and left out; the exit code is then 3.
    """
    part = Shard() if shard is None else Shard.parse(shard)
    if skip_existing and overwrite:
        raise UsageError("--skip-existing and --overwrite exclude each other. Choose one.")
    found = Model.find(model)
    sampling = found.sampling(
        num_inference_steps=steps,
        num_samples=samples,
        threshold=threshold,
        flips=flip_words(flips),
        largest_component=largest_component,
    )
    several = sampling.get("num_samples", 1) > 1 or "flips" in sampling
    tasks = plan_predictions(
        scans,
        out,
        recursive=recursive,
        overlays=overlay,
        probabilities=probabilities,
        uncertainty=several,
        mask_format=mask_format.value,  # type: ignore[arg-type]
        channels=found.channels,
        on_stray=lambda path, reason: console.warn(f"{readable(path)}: {reason}; it is left out"),
    )
    codes = _stated_codes(segment_codes, mask_format, found.classes)
    limits = parse_window(window)
    if not any(task.is_volume for task in tasks):
        of_volumes = {"--window": window, "--axis": axis, "--nan-fill": nan_fill}
        unused = [name for name, value in of_volumes.items() if value is not None]
        unused += ["--format"] if mask_format != VolumeFormat.same else []
        if unused:
            raise UsageError(
                f"{', '.join(unused)}: of use for volumes only, and there are none. Leave it out."
            )
    chosen = {
        "window": None if limits is None else list(limits),  # as the settings file gives it back
        "axis": axis.value if axis else None,
        "nan_fill": finite_or_none(nan_fill),
    }
    stated: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    if codes:
        stated["segment_codes"] = {name: code.with_category for name, code in codes.items()}
    identity = {**_model_identity(found.reference), **_with_decoder(decoder)}
    settings = {**identity, "seed": seed, **sampling, **stated}
    planned, tasks = tasks, part.of(tasks)
    todo, done = (tasks, []) if not skip_existing else split_existing(tasks, out)
    if not overwrite or shard is not None:  # a shard replaces its own part alone
        _refuse_other_settings(out, settings)
    if not skip_existing and not overwrite:
        refuse_existing(tasks, out)
    prepare_folder(out)
    of_all = "" if part.count == 1 else f" (shard {part.number} of {part.count})"
    console.say(f"{_count(tasks)} to predict into {readable(out)}{of_all}")
    if done:
        console.say(f"{len(done)} of them are done already and are skipped")
    if again := sum(task.is_done for task in todo) if skip_existing else 0:
        console.say(f"{again} of them were not listed before a call was killed, and are predicted again")
    records = [CasePrediction(task.case_id, task.file, "skipped") for task in done]
    kept = f"Masks written so far are whole and listed in {readable(out / SUMMARY_FILE)}"
    with interruptible(f"stopped. {kept}; go on with the same command and --skip-existing."):
        session = _Session(
            out,
            tasks,
            records,
            {**settings, "device": device.value},
            as_json=as_json,
            report=report,
            recipe=found.recipe_text(),
            planned=None if shard is None else planned,
        )
        session.run(
            todo,
            found.reference,
            {"seed": seed, "batch_size": batch_size, **_with_decoder(decoder), **sampling},
            device=device.value,
            precision=precision.value,
            compiled=compiled,
            overwrite=overwrite,
            volumes={**chosen, "segment_codes": codes},
        )


class _Session:
    """One call of the command: predicts, keeps the records, and reports whatever happens."""

    journal: Journal

    def __init__(
        self,
        out: Path,
        tasks: Sequence[PredictionTask],
        records: list[CasePrediction],
        settings: dict[str, Any],
        *,
        as_json: bool,
        report: bool = False,
        recipe: str = "",
        planned: Sequence[PredictionTask] | None = None,
    ) -> None:
        self.is_shard = planned is not None
        self.planned = tasks if planned is None else planned  # of all shards
        self.report = report
        self.recipe = recipe
        self.out = out
        self.tasks = tasks
        self.records = records
        self.settings = settings
        self.as_json = as_json
        self.started = time.monotonic()
        self.began = time.time()
        self.has_summary = True
        self.volumes: VolumeSettings | None = None
        self.written: list[CasePrediction] = []  # in the order of the writing, also what is not settled yet
        self.classes: tuple[str, ...] = ("background",)

    def run(
        self,
        todo: Sequence[PredictionTask],
        reference: ModelReference,
        options: dict[str, Any],
        *,
        device: str,
        precision: str,
        compiled: bool | None,
        overwrite: bool,
        volumes: dict[str, Any],
    ) -> None:
        """Predict this process's share; the main process reports for all."""
        with console.working("loading the model"):
            from sdseg_cli.core.engine.inference import load_predictor
            from sdseg_cli.core.engine.processes import Processes

            processes = Processes(cpu=device == "cpu")
            predictor = load_predictor(reference, device=device, precision=precision, **options)
        self.classes = tuple(predictor.classes)
        self.settings["device"] = str(getattr(predictor, "device", device))  # what "auto" came to
        if any(task.mask.suffix == ".dcm" for task in todo):
            from sdseg_cli.core.data.dicom_codes import codes_of, coding_remarks

            for remark in coding_remarks(codes_of(self.classes, volumes["segment_codes"])):
                console.say(remark)
        removed: list[Path] = []
        if overwrite and processes.is_main:
            removed = remove_outputs(todo)
            if (
                not self.is_shard
            ):  # they may tell of masks of another model, and tell of those of other shards
                for path in (self.out / SUMMARY_FILE, self.out / REPORT_FILE):
                    path.unlink(missing_ok=True)
                    removed.append(path)
        processes.wait()  # every process has seen the folder as it was before the first mask is written
        self._begin_journal(
            todo, reference, options.get("decoder"), precision=getattr(predictor, "precision", precision)
        )
        if removed:
            self.journal.remove(removed)
        if processes.is_main:
            with summary_lock(self.out) if self.is_shard else contextlib.nullcontext():
                if self.is_shard:  # others may have begun while the model was loaded
                    _refuse_other_settings(self.out, self.settings)
                self._write_settings("running")
        from sdseg_cli.core.engine.volume_prediction import VolumeSettings

        mine = processes.share(list(todo))
        compile_if_wanted(
            predictor, compiled, sum(SLICES_OF_A_VOLUME if task.is_volume else 1 for task in mine)
        )
        settings = VolumeSettings(**volumes)
        stop = self._predict(mine, predictor, settings)
        if stop is None and any(task.is_volume for task in self.tasks):
            self.volumes = settings.completed(predictor)  # the page shows volumes as the model saw them
        self._gather(processes, stop, predictor)
        if processes.is_main:
            self._finish(stop)
        if stop is not None:
            raise stop
        self._leave()

    def _begin_journal(
        self,
        todo: Sequence[PredictionTask],
        reference: ModelReference,
        decoder: str | None,
        *,
        precision: str,
    ) -> None:
        """Begin this call's part of the list of what is written, and of what from."""
        self.settings["model_sha256"] = model_sum(reference.location)
        if decoder is not None:
            self.settings["decoder_sha256"] = model_sum(decoder)
        run = reference.run
        recipe = run.read_run_json().get("recipe") if run is not None else None
        about = {**self.settings, "recipe": recipe, "precision": precision}
        self.journal = Journal(self.out, about, (path for task in todo for path in task.outputs))

    def _note(self, record: CasePrediction) -> None:
        self.journal.add(
            record.outputs, case=record.case_id, input=record.file, input_sha256=record.input_sha256
        )
        self.written.append(record)

    def _predict(
        self, todo: Sequence[PredictionTask], predictor: Predictor, volumes: VolumeSettings
    ) -> SdsegError | Interrupted | None:
        """Keep the records of all that was written, also when something stops the rest."""
        stream = predict_files(todo, predictor, volumes=volumes, on_written=self._note)
        try:
            are_volumes = bool(todo) and all(task.is_volume for task in todo)
            unit = "volumes" if are_volumes else "images"
            for record in console.progress(stream, len(todo), "predicting", unit=unit):
                self.records.append(record)
        except (SdsegError, Interrupted) as error:
            stream.close()  # a signal may come anywhere: what is being written is finished first
            settled = {record.file for record in self.records}
            self.records += [record for record in self.written if record.file not in settled]
            return error
        return None

    def _gather(
        self, processes: Processes, stop: SdsegError | Interrupted | None, predictor: Predictor
    ) -> None:
        # After a signal the other processes may be gone: waiting for them could take for ever.
        if stop is None or stop.exit_code < 128:
            fresh = [record for record in self.records if record.status != "skipped"]
            skipped = [record for record in self.records if record.status == "skipped"]
            self.records = skipped + processes.gather(fresh)
            self.settings["warnings"] = predictor.warnings(processes.gather(predictor.looks))
            for remark in self.settings["warnings"]:
                console.warn(remark)

    def _finish(self, stop: SdsegError | Interrupted | None) -> None:
        try:
            with summary_lock(self.out) if self.is_shard else contextlib.nullcontext():
                write_summary(self.out / SUMMARY_FILE, self.tasks, self.records, self.classes)
                self._write_settings(self._outcome(stop))
                if self.report:
                    self._write_page()
                written = [self.out / name for name in (SUMMARY_FILE, REPORT_FILE)]
                self.journal.add(path for path in written if path.is_file())
                self._remove_leftovers()
        except OSError as error:
            self.has_summary = False
            console.warn(f"{SUMMARY_FILE} cannot be written ({error.strerror or error}); done were:")
            for record in self.records:
                if record.status == "done":
                    console.say(f"  {record.file}")
        self._report()

    def _remove_leftovers(self) -> None:
        """Remove what a killed call left half-written: it is older than this one."""
        for path in self.out.rglob(".sdseg-*.partial"):
            with contextlib.suppress(OSError):
                if path.is_file() and path.stat().st_mtime < self.began:
                    path.unlink()

    def _outcome(self, stop: SdsegError | Interrupted | None) -> str:
        """``finished`` once every case of every shard is listed; until then the others are at work."""
        if stop is not None:
            return "stopped"
        if not self.is_shard:
            return "finished"
        listed = read_summary(self.out / SUMMARY_FILE)
        left = sum(task.file not in listed for task in self.planned)
        if left:
            console.say(
                f"{left} of all {len(self.planned)} cases belong to shards that have not finished. Should "
                "one have died, the same command with --skip-existing completes it."
            )
        return "running" if left else "finished"

    def _report(self) -> None:
        failed = [record for record in self.records if record.status == "failed"]
        done = [record for record in self.records if record.status == "done"]
        seconds = time.monotonic() - self.started
        if self.as_json:
            console.show_json(self._as_json(seconds))
        for note, count in _common_notes(done):
            console.say(f"{count} x {note}")
        for record in failed[:MOST_LISTED]:
            console.warn(f"{record.file}: {record.error}")
        if len(failed) > MOST_LISTED:
            console.warn(f"and {len(failed) - MOST_LISTED} more, see {SUMMARY_FILE}")
        rate = f", {len(done) / seconds:.1f} a second" if done else ""
        left = len(self.tasks) - len(self.records)
        summary = f" and {SUMMARY_FILE}" if self.has_summary else ""
        summary += f", {REPORT_FILE}" if self.report and self.has_summary else ""
        words = [f"{len(done)} of {_count(self.tasks)} done in {seconds:.1f} s{rate}"]
        words += [f"{len(failed)} failed"] if failed else []
        words += [f"{left} not reached"] if left else []
        console.say("; ".join(words) + f". Masks{summary}: {readable(self.out)}")

    def _leave(self) -> None:
        """Leave with 3 if some cases failed, with 1 if all did or the summary could not be written."""
        failed = sum(record.status == "failed" for record in self.records)
        if (failed and failed == len(self.tasks)) or not self.has_summary:
            raise typer.Exit(1)
        if failed:
            raise typer.Exit(3)

    def _as_json(self, seconds: float) -> dict[str, Any]:
        counts = {
            status: sum(record.status == status for record in self.records)
            for status in ("done", "skipped", "failed")
        }
        return {
            "out": readable(self.out),
            **self.settings,
            "images": len(self.tasks),
            **counts,
            "seconds": round(seconds, 3),
            "cases": summary_rows(self.records, self.classes),
        }

    def _write_page(self) -> None:
        from sdseg_cli.core.engine.prediction_page import prediction_page
        from sdseg_cli.core.reporting.page import render_page

        # The summary also knows the images that earlier calls predicted into this folder.
        rows = list(read_summary(self.out / SUMMARY_FILE).values())
        with console.working(f"drawing {REPORT_FILE}"):
            page = prediction_page(
                self.planned,
                rows,
                self.classes,
                self._settings("finished"),
                volumes=self.volumes,
                recipe=self.recipe,
            )
            atomic_write(self.out / REPORT_FILE, render_page(page))

    def _write_settings(self, status: str) -> None:
        atomic_write(self.out / SETTINGS_FILE, to_json(self._settings(status), indent=2) + "\n")
        self.journal.add([self.out / SETTINGS_FILE])

    def _settings(self, status: str) -> dict[str, Any]:
        return {
            "sdseg": __version__,
            "status": status,
            **made_with(),
            **self.settings,
            "classes": list(self.classes),
            "images": len(self.planned),
        }


def _stated_codes(
    path: Path | None, mask_format: VolumeFormat, classes: Sequence[str]
) -> dict[str, SegmentCode]:
    """What --segment-codes says of the model's classes; nothing where it is not given."""
    if path is None:
        return {}
    if mask_format != VolumeFormat.dicom_seg:
        raise UsageError(
            "--segment-codes: of use for DICOM-SEG only. Add --format dicom-seg, or leave it out."
        )
    from sdseg_cli.core.data.dicom_codes import read_segment_codes

    return read_segment_codes(path, classes)


def _with_decoder(decoder: Path | None) -> dict[str, str]:
    """The decoder's folder, if one was named."""
    return {} if decoder is None else {"decoder": str(decoder.resolve())}


def _model_identity(reference: ModelReference) -> dict[str, Any]:
    """Where the model is, and when its run ended: a run that was trained anew is another model."""
    folder = Path(reference.location)
    identity: dict[str, Any] = {"model": str(folder.resolve()) if folder.exists() else reference.location}
    if reference.run is not None:
        identity["model_of"] = reference.run.read_run_json().get("ended")
    return identity


def _refuse_other_settings(out: Path, settings: dict[str, Any]) -> None:
    """Refuse to add to a folder that holds masks of another model or of other settings."""
    try:
        before = json.loads((out / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if not isinstance(before, dict):
        return
    names = [name for name in MASK_SETTINGS if before.get(name) != settings.get(name)]
    if names:
        unset = "as the model has it"
        found = ", ".join(
            f"{name} {before.get(name, unset)} (now {settings.get(name, unset)})" for name in names
        )
        raise UsageError(
            f"the masks in {readable(out)} were made with {found}. Adding to them would mix two results: "
            "repeat the earlier settings, pass --overwrite, or choose another --out."
        )


def _common_notes(records: Sequence[CasePrediction]) -> list[tuple[str, int]]:
    """Notes of the images, one line a kind: the numbers in them differ from image to image."""
    kinds: dict[str, tuple[str, int]] = {}
    for record in records:
        for note in record.notes:
            kind = note.split("[")[0]
            first, count = kinds.get(kind, (f"{note} ({record.file})", 0))
            kinds[kind] = (first, count + 1)
    return list(kinds.values())


def _count(tasks: Sequence[PredictionTask]) -> str:
    volumes = sum(task.is_volume for task in tasks)
    kinds = [(len(tasks) - volumes, "image"), (volumes, "volume")]
    words = [f"{count} {kind}" + ("s" if count != 1 else "") for count, kind in kinds if count]
    return " and ".join(words) or "0 images"

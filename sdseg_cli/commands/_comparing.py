"""What ``compare`` and ``ablate`` share: from sources to scores, and the folder of a comparison."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdseg_cli import console
from sdseg_cli.commands._measured import (
    Model,
    dataset_evidence,
    show,
)
from sdseg_cli.core.data.prepared import PreparedDataset
from sdseg_cli.core.errors import UsageError
from sdseg_cli.core.files import (
    CASES_FILE,
    EXPORT_FILE,
    REPORT_FILE,
    SUMMARY_FILE,
    refuse_existing,
    sum_of_files,
    visible_files,
    whole_folder,
)
from sdseg_cli.core.manifest import made_with, write_manifest
from sdseg_cli.core.reporting.tables import to_csv, to_latex, to_markdown
from sdseg_cli.core.run_directory import atomic_write, to_json

if TYPE_CHECKING:
    from sdseg_cli.core.engine.comparison import Comparison, ScoredRun
    from sdseg_cli.core.reporting.curves import Convergence
    from sdseg_cli.core.reporting.page import Table

TABLE, COSTS = "comparison", "costs"
CURVES_FILE = "curves.png"
MOST_LISTED = 10  # cases named on the screen


@dataclass(frozen=True)
class Source:
    """One thing to compare: where it is, and how it is to be sampled where that is not as its recipe says."""

    location: str
    sampling: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """How a comparison is made."""

    split: str
    out: Path
    unnamed_split: bool = False  # the cases are those of folders
    notes: tuple[str, ...] = ()
    data: Path | None = None
    baseline: str | None = None
    convention: str | None = None
    grid: str | None = None
    draws: int = 5
    common: bool = False
    allow_missing: bool = False
    loading: Mapping[str, Any] = field(default_factory=dict)
    overwrite: bool = False


@dataclass(frozen=True)
class Written:
    """A comparison that was made."""

    comparison: Comparison
    tables: list[Table]
    report: dict[str, Any]


def refuse_several_processes(command: str) -> None:
    """A comparison measures speed, one method after the other: processes side by side would disturb it."""
    if console.is_launched():
        raise UsageError(
            f"sdseg {command} runs in one process. Start it without accelerate launch or torchrun."
        )


def compare_and_write(methods: Mapping[str, Sequence[Source]], settings: Settings) -> Written:
    """Score every source, compare them, and write the folder.

    Args:
        methods: name -> its sources, in the order of the table.
        settings: how.

    Raises:
        SdsegError: a source is none, cannot be scored, or does not go with the others.
    """
    refuse_existing(settings.out, overwrite=settings.overwrite, ours=SUMMARY_FILE)
    _refuse_own_source(methods, settings.out)
    from sdseg_cli.core.engine.comparison import Method, choose_baseline, compare

    choose_baseline(list(methods), settings.baseline)
    found = {name: [_Found.of(source) for source in sources] for name, sources in methods.items()}
    settings = _settled(settings, [one for group in found.values() for one in group])
    _check_data([one.model for group in found.values() for one in group if one.model is not None], settings)
    # What is read goes first: what is wrong with it is told before the models have predicted.
    order = sorted(
        ((name, one) for name, group in found.items() for one in group),
        key=lambda pair: pair[1].model is not None,
    )
    runs = {id(one): _score(one, f"{name}: {one.source.location}", settings) for name, one in order}
    scored = tuple(Method(name, tuple(runs[id(one)] for one in group)) for name, group in found.items())
    with console.working("comparing"):
        comparison = compare(scored, baseline=settings.baseline, partial=settings.common)
    return _write(comparison, settings)


def show_comparison(written: Written, settings: Settings, *, tables: bool) -> None:
    """Print the tables, if they are wanted, and say what was written and what is left out."""
    for table in written.tables if tables else ():
        show(table)
    for note in settings.notes:
        console.warn(note)
    left_out = written.comparison.left_out
    for case, why in list(left_out.items())[:MOST_LISTED]:
        console.warn(f"{case} is in no figure: {why}")
    if len(left_out) > MOST_LISTED:
        console.warn(f"and {len(left_out) - MOST_LISTED} more, see {SUMMARY_FILE}")
    console.done(f"{settings.out}: {', '.join(written.report['files'])}")


def several_draws(draws: int) -> int:
    """Check ``--draws``. Raises UsageError for a single one, which nothing could be compared with."""
    if draws == 1:
        raise UsageError("--draws 1: one draw has none to be compared with. Give 2 or more, or 0 for none.")
    return draws


def has_failures(written: Written) -> bool:
    """Whether a case failed; those that not all methods have were left out because that was asked for."""
    from sdseg_cli.core.engine.comparison import NOT_SHARED

    return any(why != NOT_SHARED for why in written.comparison.left_out.values())


# ---- sources --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """A source and what it turned out to be: a model, a folder of masks, or scores."""

    source: Source
    kind: str
    model: Model | None = None

    @classmethod
    def of(cls, source: Source) -> _Found:
        from sdseg_cli.core.data.dicom_seg import is_label_volume
        from sdseg_cli.core.data.images import list_images
        from sdseg_cli.core.engine.comparison_sources import holds_scores

        folder = Path(source.location).expanduser()
        if holds_scores(folder):
            return cls(source, "scores")
        is_model = any((folder / name).is_file() for name in ("run.json", "model_index.json", EXPORT_FILE))
        if folder.is_dir() and not is_model:
            if not list_images(folder) and not any(map(is_label_volume, visible_files(folder))):
                raise UsageError(
                    f"{folder} holds no run, no model, no masks and no scores. Give a run directory, a model "
                    "folder, a folder of masks (one for each case) or what sdseg evaluate wrote."
                )
            return cls(source, "masks")
        model = Model.find(source.location, option="", also="a folder of masks, what sdseg evaluate wrote")
        return cls(source, "run" if model.reference.run is not None else "model", model)


def _refuse_own_source(methods: Mapping[str, Sequence[Source]], out: Path) -> None:
    for source in (source for group in methods.values() for source in group):
        if Path(source.location).expanduser().resolve() == out.resolve():
            raise UsageError(
                f"--out {out} is one of the sources, and would be replaced. Choose another --out."
            )


def _check_data(models: Sequence[Model], settings: Settings) -> None:
    """See that every model has its data, and say where its recipe has scores counted otherwise."""
    counted = (settings.convention, settings.grid)
    for model in models:
        dataset_evidence(model.dataset(settings.data), settings.split)
        if model.recipe is None:
            continue
        own = (str(model.recipe.evaluate.convention), str(model.recipe.evaluate.grid))
        if own != counted:
            console.warn(
                f"{model.reference.location}: its recipe has scores counted with --convention {own[0]} "
                f"--grid {own[1]}; compared are all with {counted[0]} and {counted[1]}."
            )


def _settled(settings: Settings, found: Sequence[_Found]) -> Settings:
    """Fill in what is not said: how scores are counted, by scores that are given or the first recipe."""
    from sdseg_cli.core.engine.comparison_sources import counted_by, read_summary

    recipe = next((one.model.recipe for one in found if one.model is not None and one.model.recipe), None)
    folders = [Path(one.source.location).expanduser() for one in found if one.kind == "scores"]
    scores = [counted_by(read_summary(folder)) for folder in folders]
    data = settings.data
    has_masks = any(one.kind == "masks" for one in found)
    if data is None and has_masks and recipe is None:
        raise UsageError("a folder of masks is compared on a prepared dataset: name it with --data.")
    if data is None and recipe is not None:
        knows_none = [one for one in found if one.model is not None and one.model.recipe is None]
        if has_masks or knows_none:  # as exported graphs and copied model folders do
            data = Path(recipe.data.dataset)
    counted = {"convention": "standard", "grid": "case"}
    if recipe is not None:
        counted = {"convention": str(recipe.evaluate.convention), "grid": str(recipe.evaluate.grid)}
    if scores:
        counted = {name: str(scores[0][name]) for name in counted}
    return replace(
        settings,
        data=data,
        convention=settings.convention or counted["convention"],
        grid=settings.grid or counted["grid"],
        unnamed_split=len(scores) == len(found) and not any(one["split"] for one in scores),
    )


def _score(found: _Found, title: str, settings: Settings) -> ScoredRun:
    from sdseg_cli.core.engine.comparison import ScoredRun
    from sdseg_cli.core.engine.comparison_sources import (
        read_scores,
        score_masks,
        scored,
        unmatched_masks,
    )
    from sdseg_cli.core.engine.folder_evaluation import masks_by_name

    convention, grid = str(settings.convention), str(settings.grid)
    folder = Path(found.source.location).expanduser()
    if found.kind == "scores":
        return read_scores(folder, convention=convention, grid=grid, split=settings.split)
    if found.model is not None:
        return _score_model(found, found.model, title, settings)
    dataset = PreparedDataset.open(settings.data or "")
    total = len(set(dataset.split(settings.split).case_ids))
    records = score_masks(
        folder,
        dataset,
        settings.split,
        convention=convention,  # type: ignore[arg-type]
        grid=grid,  # type: ignore[arg-type]
        allow_missing=settings.allow_missing,
    )
    rows, failed = scored(list(console.progress(records, total, title, unit="cases")))
    for name in unmatched_masks(folder, dataset.split(settings.split).case_ids):
        console.warn(f"{folder}: {name} belongs to no case of the split, so it is not scored")
    digest = sum_of_files([*masks_by_name(folder, "masks").values()])
    facts = {"sha256": digest, "dataset": dataset.manifest.fingerprint}
    return ScoredRun(str(folder), "masks", rows, failed, facts=facts)


def _score_model(found: _Found, model: Model, title: str, settings: Settings) -> ScoredRun:
    dataset = model.dataset(settings.data)
    sampling = model.sampling(
        **{
            "num_inference_steps": None,
            "num_samples": None,
            "threshold": None,
            "flips": None,
            "largest_component": None,
            **found.source.sampling,
        }
    )
    with console.working(f"loading {found.source.location}"):
        from sdseg_cli.core.engine.comparison import Costs, ScoredRun
        from sdseg_cli.core.engine.comparison_sources import score_model, scored, training_costs
        from sdseg_cli.core.engine.evaluation_records import CaseScores
        from sdseg_cli.core.engine.inference import load_predictor

        predictor = load_predictor(model.reference, grid=settings.grid, **sampling, **settings.loading)
    records: list[CaseScores] = []
    costs = Costs()
    measured = score_model(
        predictor,
        dataset,
        settings.split,
        convention=settings.convention,  # type: ignore[arg-type]
        grid=settings.grid,  # type: ignore[arg-type]
        draws=settings.draws,
    )
    total = len(set(dataset.split(settings.split).case_ids)) + 1
    for record in console.progress(measured, total, title, unit="cases"):
        if isinstance(record, Costs):
            costs = record
        else:
            records.append(replace(record, picture=None, stack=()))
    for remark in predictor.warnings(predictor.looks):
        console.warn(f"{found.source.location}: {remark}")
    facts = {
        **model.evidence(),
        "dataset": {"path": str(dataset.root), "fingerprint": dataset.manifest.fingerprint},
        "sampling": {"seed": settings.loading.get("seed", 0), **sampling},
        "precision": predictor.precision,
    }
    del predictor, measured  # before the next one is loaded
    gc.collect()
    rows, failed = scored(records)
    run = model.reference.run
    curve: tuple[dict[str, Any], ...] = ()
    if run is not None:
        costs, curve = training_costs(run, costs), tuple(run.read_metrics())
    return ScoredRun(
        found.source.location, found.kind, rows, failed, costs, curve, facts, model.recipe_text()
    )


# ---- results --------------------------------------------------------------------------------------------


def _write(comparison: Comparison, settings: Settings) -> Written:
    from sdseg_cli.core.engine.comparison_report import (
        accuracy_records,
        case_records,
        comparison_tables,
        cost_records,
        mean_costs,
    )
    from sdseg_cli.core.reporting.figures import convergence_curves

    convention = str(settings.convention)
    split = None if settings.unnamed_split else settings.split
    tables = comparison_tables(comparison, split, convention, str(settings.grid))
    curves = _curves(comparison)
    files = [f"{TABLE}.md", f"{TABLE}.csv", f"{TABLE}.tex", f"{COSTS}.csv", CASES_FILE]
    files += [*([CURVES_FILE] if curves else []), REPORT_FILE, SUMMARY_FILE]
    report = {
        "split": split,
        "convention": convention,
        "grid": settings.grid,
        "baseline": comparison.baseline,
        "cases": len(comparison.cases),
        "left_out": dict(comparison.left_out),
        "notes": list(settings.notes),
        "classes": list(comparison.classes),
        "accuracy": accuracy_records(comparison),
        "costs": {method.name: asdict(mean_costs(method)) for method in comparison.methods},
        "methods": {method.name: [_evidence(run) for run in method.runs] for method in comparison.methods},
        "files": files,
        **made_with(),
    }
    with whole_folder(settings.out, overwrite=settings.overwrite, ours=SUMMARY_FILE) as folder:
        atomic_write(folder / f"{TABLE}.md", "\n".join(to_markdown(table) for table in tables))
        latex = "".join(map(to_latex, tables))
        atomic_write(folder / f"{TABLE}.tex", f"% \\usepackage{{booktabs}}\n{latex}")
        atomic_write(folder / f"{TABLE}.csv", to_csv(report["accuracy"]))
        atomic_write(folder / f"{COSTS}.csv", to_csv(cost_records(comparison)))
        atomic_write(folder / CASES_FILE, to_csv(case_records(comparison)))
        if curves:
            convergence_curves(curves, folder / CURVES_FILE)
        atomic_write(folder / REPORT_FILE, _page(comparison, settings, tables, curves, report))
        atomic_write(folder / SUMMARY_FILE, to_json(report, indent=2) + "\n")
        write_manifest(folder, "comparison", **made_with())
    return Written(comparison, tables, report)


def _curves(comparison: Comparison) -> list[Convergence]:
    """How the runs converged; what shares a training has one curve, under the first of its names."""
    from sdseg_cli.core.reporting.curves import convergences

    drawn: set[str] = set()
    metrics: dict[str, list[Any]] = {}
    for method in comparison.methods:
        for run in method.runs:
            if run.curve and run.location not in drawn:
                drawn.add(run.location)
                metrics.setdefault(method.name, []).append(run.curve)
    return convergences(metrics)


def _traced(run: ScoredRun) -> str:
    """Where scores come from: the place, the SHA-256 of model or masks, the data and the settings."""
    model = run.facts.get("model")
    digest = run.facts.get("sha256") or (model.get("sha256") if isinstance(model, Mapping) else None)
    dataset = run.facts.get("dataset")
    fingerprint = dataset.get("fingerprint") if isinstance(dataset, Mapping) else dataset
    sampling = run.facts.get("sampling")
    parts = [f"{run.location} ({run.kind})"]
    parts += [f"SHA-256 {digest}"] if digest else []
    parts += [f"dataset fingerprint {fingerprint}"] if fingerprint else []
    parts += [f"{name.replace('_', ' ')} {value}" for name, value in (sampling or {}).items()]
    return ", ".join(parts)


def _evidence(run: ScoredRun) -> dict[str, Any]:
    return {"location": run.location, "kind": run.kind, "failed": dict(run.failed), **run.facts}


def _page(
    comparison: Comparison,
    settings: Settings,
    tables: Sequence[Table],
    curves: Sequence[Convergence],
    report: Mapping[str, Any],
) -> str:
    from sdseg_cli import __version__
    from sdseg_cli.core.engine.comparison_report import comparison_page
    from sdseg_cli.core.engine.report_parts import facts as facts_of
    from sdseg_cli.core.reporting.page import render_page

    facts = {
        **({} if settings.unnamed_split else {"Split": settings.split}),
        "Grid": settings.grid,
        "Convention for empty masks": settings.convention,
        "Baseline": comparison.baseline,
        **{
            f"Method {method.name}": "; ".join(_traced(run) for run in method.runs)
            for method in comparison.methods
        },
        **({"Remarks": " ".join(settings.notes)} if settings.notes else {}),
        **dict(facts_of(report, {"command": "Command", "versions": "Versions", "written": "Written"})),
    }
    title = f"Comparison of {', '.join(method.name for method in comparison.methods)}"
    footer = f"Written by sdseg {__version__} at {report['written']}. One file; nothing is fetched."
    return render_page(comparison_page(comparison, title, tables, curves=curves, facts=facts, footer=footer))

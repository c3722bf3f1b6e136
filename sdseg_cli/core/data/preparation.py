"""From raw cases to a prepared dataset: read, check, bring to the model grid, write, in one pass.

Cases are read in parallel and in order; nothing appears under the final name unless every case was sound
(or was excluded by an explicit wish).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from sdseg_cli.core.data.arrow_tables import Tables
from sdseg_cli.core.data.converting import ConvertedCase, convert
from sdseg_cli.core.data.gathering import Description, Gathered, SheetItem
from sdseg_cli.core.data.images import encode_png
from sdseg_cli.core.data.prepared import MANIFEST_FILE, decode_png
from sdseg_cli.core.data.raw_cases import Geometry, Problem, RawCase
from sdseg_cli.core.data.splits import Split, split_to_yaml
from sdseg_cli.core.data.workers import in_order, worker_pool
from sdseg_cli.core.errors import DataError
from sdseg_cli.core.files import refuse_existing, whole_folder
from sdseg_cli.core.grid import Grid

SPLIT_FILE = "split.yaml"
SHEET_FILE = "contact_sheet.png"
_SHEET_ITEMS = 24
_SHOWN_PROBLEMS = 100


@dataclass(frozen=True)
class CaseRecord:
    """What became of one case; yielded while preparing.

    Attributes:
        case_id: of the case.
        split: it belongs to.
        problem: why it cannot be used; empty if it was prepared.
        height: of a slice on the case's own grid, in pixels; 0 with a problem.
        width: likewise.
        slices: how many were prepared.
        class_pixels: pixels of every class on the case's own grid.
        notes: what was changed while reading.
    """

    case_id: str
    split: str
    problem: str
    height: int
    width: int
    slices: int
    class_pixels: tuple[int, ...]
    notes: tuple[str, ...]


def prepare(
    cases: Sequence[RawCase],
    split: Split,
    out: Path,
    *,
    description: Description,
    geometry: Geometry,
    problems: Sequence[Problem] = (),
    exclude_bad: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    draw_sheet: Callable[[Sequence[SheetItem]], np.ndarray] | None = None,
) -> Iterator[CaseRecord]:
    """Prepare a dataset; a generator: nothing happens until it is read to its end.

    Args:
        cases: what to prepare; every case of ``split`` must be among them.
        split: see ``splits.py``.
        out: final folder; made at the end, in one piece.
        description: goes into ``dataset.json``.
        geometry: how to read, and the model grid.
        problems: found before reading (a missing mate); they count like those found here.
        exclude_bad: leave bad cases out and record them, instead of refusing.
        overwrite: replace an existing prepared dataset.
        workers: processes; None takes the number of cores, and this process alone for a few cases.
        draw_sheet: draws the contact sheet: takes (title, image, label map) items, returns uint8
            (H, W, 3); without it there is none.

    Yields:
        One record a case, in the order of the splits.

    Raises:
        DataError: bad cases, all listed in one message; nothing was written then.
        UsageError: ``out`` exists and may not be replaced.
    """
    refuse_existing(out, overwrite=overwrite, ours=MANIFEST_FILE)
    if problems and not exclude_bad and not cases:
        raise DataError(_problem_listing(problems, total=len(problems)))
    by_id = {case.case_id: case for case in cases}
    ordered = [(name, by_id[case_id]) for name, ids in split.parts().items() for case_id in ids]
    sheet_ids = _evenly(split)
    gathered = Gathered(geometry.num_classes, [*problems])
    with whole_folder(out, overwrite=overwrite, ours=MANIFEST_FILE) as work:
        with Tables(work / "raw") as tables, worker_pool(workers, len(ordered)) as executor:
            jobs = (partial(convert, case, geometry, name) for name, case in ordered)
            for (name, _), result in zip(ordered, in_order(executor, jobs), strict=True):
                if isinstance(result, Problem):
                    gathered.problems.append(result)
                    yield CaseRecord(result.case_id, name, result.reason, 0, 0, 0, (), ())
                    continue
                for row in result.rows:
                    tables.add(name, row)
                gathered.add(name, result)
                # The chosen cases may all be bad ones; a sheet shows one case at least.
                is_shown = result.case_id in sheet_ids or not gathered.sheet
                if is_shown and draw_sheet is not None:
                    gathered.sheet.append(_sheet_item(name, result, geometry))
                totals = tuple(map(int, result.class_pixels.sum(axis=0)))
                yield CaseRecord(
                    result.case_id, name, "", *result.shape, len(result.rows), totals, result.notes
                )
        excluded = gathered.problems
        if excluded and not exclude_bad:
            raise DataError(_problem_listing(excluded, total=len(cases) + len(problems)))
        if not any(gathered.prepared.values()):
            raise DataError("no case is left to prepare: " + _problem_listing(excluded, total=len(excluded)))
        gathered.refuse_without_foreground(description.classes)
        tables.save(work)
        used = split.without(problem.case_id for problem in excluded)
        header = f"The split of {description.name} as prepared."
        (work / SPLIT_FILE).write_text(split_to_yaml(used, header), encoding="utf-8")
        if draw_sheet is not None:
            (work / SHEET_FILE).write_bytes(encode_png(draw_sheet(gathered.sheet)))
        manifest = gathered.manifest(description, geometry, used, _files(work))
        (work / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")


def _evenly(split: Split) -> frozenset[str]:
    """The cases of the contact sheet: spread over the splits by their size, each split shown."""
    parts = {name: ids for name, ids in split.parts().items() if ids}
    total = sum(map(len, parts.values()))
    counts = {name: min(len(ids), max(3, _SHEET_ITEMS * len(ids) // total)) for name, ids in parts.items()}
    largest = max(counts, key=lambda name: counts[name], default="")
    if largest:
        counts[largest] = min(len(parts[largest]), _SHEET_ITEMS - sum(counts.values()) + counts[largest])
    chosen = [
        ids[index * len(ids) // counts[name]] for name, ids in parts.items() for index in range(counts[name])
    ]
    return frozenset(chosen)


def _sheet_item(split: str, case: ConvertedCase, geometry: Geometry) -> SheetItem:
    """The slice of the case that shows most of the foreground."""
    row = case.rows[int(case.class_pixels[:, 1:].sum(axis=1).argmax())]
    image, label_map = decode_png(row["image"]["bytes"]), decode_png(row["label_map"]["bytes"])
    grid = Grid(*case.shape, geometry.image_size, geometry.resize, row["crop"])
    return f"{split}: {case.case_id}", image, grid.labels_to_model(label_map)


def _problem_listing(problems: Sequence[Problem], total: int) -> str:
    lines = [f"  {problem.case_id}: {problem.reason}" for problem in problems[:_SHOWN_PROBLEMS]]
    if len(problems) > _SHOWN_PROBLEMS:
        lines.append(f"  and {len(problems) - _SHOWN_PROBLEMS} more")
    return (
        f"{len(problems)} of {total} cases cannot be used; nothing was prepared:\n"
        + "\n".join(lines)
        + "\nMend them, or pass --exclude-bad to leave them out (dataset.json then lists them)."
    )


def _files(root: Path) -> dict[str, Path]:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path for path in files}

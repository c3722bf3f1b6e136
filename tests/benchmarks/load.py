"""Memory, open files and time under load: they must not grow with the work that is done.

::

    python -m tests.benchmarks.load images 1000 4000 10000     # predicted by a real network, a tiny one
    python -m tests.benchmarks.load volumes 100 300 600        # 512 x 512 x N, int16
    python -m tests.benchmarks.load training 5000              # steps, with validations and checkpoints
    python -m tests.benchmarks.load dataset 2500 10000 100000  # slices prepared, opened and read

Each count runs in a process of its own, since a process's peak never falls. ``growth_mib`` is the highest
resident memory, seen every 20 ms, less what was there when the work began.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.tiny_recipe import SIZE as SMALL  # of an image, and of the network's own grid
from tests.tiny_recipe import tiny_values

os.environ.setdefault("OMP_NUM_THREADS", "1")
SIDE = 512  # of a slice of a volume, in pixels


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@contextmanager
def watched() -> Iterator[SimpleNamespace]:
    """Note what memory a block took at most, and how long it took."""
    found = SimpleNamespace(before_mib=resident_mib(), growth_mib=0.0, seconds=0.0)
    stop = threading.Event()
    peak = [found.before_mib]

    def look() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], resident_mib())

    watcher = threading.Thread(target=look)
    watcher.start()
    started = time.monotonic()
    try:
        yield found
    finally:
        found.seconds = round(time.monotonic() - started, 2)
        stop.set()
        watcher.join()
        found.growth_mib = round(max(peak[0], resident_mib()) - found.before_mib, 1)
        found.before_mib = round(found.before_mib, 1)


def recipe(dataset: Path, **train: Any) -> Any:
    from sdseg_cli.core.recipe import recipe_from_values

    values = tiny_values(dataset)
    values["data"]["workers"] = 0
    values["train"] |= train
    return recipe_from_values(values)


def predictor(folder: Path) -> Any:
    """A network with random weights: what is looked at is memory, not masks."""
    from sdseg_cli.core.data.prepared import PreparedDataset
    from sdseg_cli.core.engine.inference import Predictor
    from sdseg_cli.core.engine.networks import build_networks

    phantoms(folder / "data", 6)
    tiny = recipe(folder / "data")
    pipeline = build_networks(tiny, 2).pipeline(PreparedDataset.open(folder / "data").manifest, tiny, 1.0)
    for network in (pipeline.unet, pipeline.autoencoder, pipeline.image_encoder):
        network.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return Predictor(pipeline, batch_size=16)


def phantoms(out: Path, cases: int) -> None:
    from sdseg_cli.commands.prepare import phantom

    phantom(kind="endoscopy", cases=cases, size=SMALL, seed=0, fractions="0.6,0.2,0.2", out=out, workers=1)


# What is measured --------------------------------------------------------------------------------------


def predicted(given: Path, folder: Path) -> dict[str, Any]:
    from sdseg_cli.core.engine.prediction import predict_files
    from sdseg_cli.core.engine.prediction_plan import plan_predictions, prepare_folder

    network = predictor(folder)
    tasks = plan_predictions([given], folder / "masks")
    prepare_folder(folder / "masks")
    first = plan_predictions([given], folder / "first")[:16]
    list(predict_files(first[: 16 if not first[0].is_volume else 0], network))  # imports, buffers
    series, files = [], open_files()
    with watched() as seen:
        for number, record in enumerate(predict_files(tasks, network)):
            assert record.status == "done", record
            if number % max(1, len(tasks) // 8) == 0:
                series.append(round(resident_mib()))
    return {**vars(seen), "resident_mib": series, "open_files": [files, open_files()]}


def images(count: int, folder: Path) -> dict[str, Any]:
    from PIL import Image

    draw = np.random.default_rng(0)
    (folder / "images").mkdir()
    for index in range(count):
        pixels = draw.integers(0, 256, (SMALL, SMALL, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index:06d}.png", compress_level=0)
    found = predicted(folder / "images", folder)
    return {"images": count, **found, "a_second": round(count / found["seconds"], 1)}


def volumes(count: int, folder: Path, *, files: int = 1) -> dict[str, Any]:
    import nibabel

    draw = np.random.default_rng(0)
    (folder / "scans").mkdir()
    for number in range(files):
        voxels = np.empty((SIDE, SIDE, count), np.int16, order="F")
        for k in range(count):
            voxels[:, :, k] = draw.integers(-1000, 1000, (SIDE, SIDE), np.int16)
        nibabel.Nifti1Image(voxels, np.diag([0.7, 0.7, 1.0, 1.0])).to_filename(folder / f"scans/{number}.nii")
        del voxels
    found = predicted(folder / "scans", folder)
    on_disk = SIDE * SIDE * count * 2 / 2**20
    return {
        "volumes": f"{files} of {SIDE}x{SIDE}x{count}",
        "file_mib": round(on_disk),
        **found,
        "growth_in_files": round(found["growth_mib"] / on_disk, 2),
        "slices_a_second": round(files * count / found["seconds"], 1),
    }


def training(steps: int, folder: Path) -> dict[str, Any]:
    from sdseg_cli.core.engine import run_keeping
    from sdseg_cli.core.engine import training as engine
    from sdseg_cli.core.engine.training_records import StepRecord
    from sdseg_cli.core.run_directory import RunDirectory

    # Drawn once, at the end, with a library of its own.
    run_keeping.training_curves = lambda metrics, path: None
    phantoms(folder / "data", 24)
    every = max(1, steps // 20)
    tiny = recipe(
        folder / "data",
        steps=steps,
        log_every=10,
        validate_every=every,
        checkpoint_every=every,
        validation_cases=4,
    )
    series: list[tuple[int, int, int]] = []
    started = time.monotonic()
    run = engine.Training(tiny, device="cpu")
    for record in run.run(RunDirectory.create(folder / "run", tiny)):
        if isinstance(record, StepRecord) and record.step % every == 0:
            series.append((record.step, round(resident_mib()), open_files()))
    return {
        "steps": steps,
        "seconds": round(time.monotonic() - started, 1),
        "step_resident_mib_open_files": series,
        "growth_after_a_tenth_mib": series[-1][1] - series[len(series) // 10][1],
        "open_files_after_a_tenth": series[-1][2] - series[len(series) // 10][2],
    }


def made_case(number: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(number)
    labels = np.zeros((SMALL, SMALL), np.uint8)
    labels[8:20, 4 : 10 + number % 16] = 1
    return draw.integers(0, 256, (SMALL, SMALL, 3), dtype=np.uint8), labels


def dataset(count: int, folder: Path) -> dict[str, Any]:
    from sdseg_cli.core.data import gathering, preparation, raw_cases
    from sdseg_cli.core.data.prepared import PreparedDataset
    from sdseg_cli.core.data.splits import Split
    from sdseg_cli.core.engine.training_data import on_model_grid

    ids = [f"{number:06d}" for number in range(count)]
    cases = [
        raw_cases.RawCase(name, name, arrays=partial(made_case, number)) for number, name in enumerate(ids)
    ]
    first, second = int(count * 0.8), int(count * 0.9)
    split = Split("made", tuple(ids[:first]), tuple(ids[first:second]), tuple(ids[second:]))
    out = folder / "data"
    description = gathering.Description("made", ("background", "a"), "made", "none")
    records = preparation.prepare(
        cases, split, out, description=description, geometry=raw_cases.Geometry(SMALL), workers=1
    )
    with watched() as preparing:
        for _ in records:
            pass
    del cases, records
    with watched() as opening:
        view = PreparedDataset.open(out).split("train")
        view[0]
    draw = np.random.default_rng(0)
    with watched() as reading:
        for index in draw.integers(0, len(view), 2000):
            on_model_grid(view[int(index)])
    with watched() as listing:
        assert len(set(view.case_ids)) == len(view)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 2**20
    return {
        "slices": count,
        "on_disk_mib": round(size),
        "prepare_s": preparing.seconds,
        "prepared_a_second": round(count / preparing.seconds, 1),
        "prepare_growth_mib": preparing.growth_mib,
        "open_s": opening.seconds,
        "open_growth_mib": opening.growth_mib,
        "2000_random_slices_s": reading.seconds,
        "2000_random_slices_growth_mib": reading.growth_mib,
        "list_ids_s": listing.seconds,
        "list_ids_growth_mib": listing.growth_mib,
    }


KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    "images": images,
    "volumes": volumes,
    "training": training,
    "dataset": dataset,
}


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("counts", type=int, nargs="+")
    parser.add_argument("--files", type=int, default=1, help="volumes of each size, one after another")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    more = {"files": options.files} if options.kind == "volumes" else {}
    if options.here:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(KINDS[options.kind](options.counts[0], Path(folder), **more)))
        return []
    found = []
    for count in options.counts:
        command = [
            sys.executable,
            "-m",
            "tests.benchmarks.load",
            options.kind,
            str(count),
            "--files",
            str(options.files),
            "--here",
        ]
        answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found.append(json.loads(answer.strip().splitlines()[-1]))
        print(found[-1], flush=True)
    return found


if __name__ == "__main__":
    main()

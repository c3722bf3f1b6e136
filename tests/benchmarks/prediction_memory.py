"""Memory of predicting N small images: it must not grow with N.

::

    python tests/benchmarks/prediction_memory.py 1000 4000 10000

Each count runs in a process of its own, since a process's peak never falls. The network is a stub: what is
looked at is reading, handing on and writing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

SIDE = 64


def make_images(folder: Path, count: int) -> None:
    from PIL import Image

    draw = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:06d}.png", compress_level=0)


class Bright:
    """Calls bright pixels foreground, sixteen images at a time."""

    image_size, resize, classes, num_classes = SIDE, "squeeze", ("background", "bright"), 2

    def __call__(self, inputs: Iterable) -> Iterator:
        from itertools import islice

        from sdseg_cli.core.engine.inference import SlicePrediction

        stream = iter(inputs)
        while batch := list(islice(stream, 16)):
            for one in batch:
                level = one.grid.probabilities_to_case(one.image.mean(axis=-1).astype(np.float32) / 255)
                yield SlicePrediction(
                    one.case_id,
                    one.slice_index,
                    (level > 0.5).astype(np.uint8),
                    np.stack([1 - level, level]),
                    np.zeros_like(level),
                    None,
                )


def run_one(images: Path, out: Path, count: int) -> dict:
    """Predict ``count`` images; the peak is that of the prediction alone."""
    from sdseg_cli.core.engine import inference  # noqa: F401  (its memory is there before)
    from sdseg_cli.core.engine.prediction import plan_predictions, predict_files, prepare_folder

    files = sorted(images.iterdir())[:count]
    tasks = plan_predictions(
        files, out, recursive=False, overlays=False, probabilities=False, uncertainty=False
    )
    prepare_folder(out)
    before = resident_mib()
    most, done, started = before, 0, time.monotonic()
    for record in predict_files(tasks, Bright()):
        done += record.status == "done"
        if done % 100 == 0:
            most = max(most, resident_mib())
    seconds = time.monotonic() - started
    return {
        "images": done,
        "before_mib": round(before, 1),
        "growth_mib": round(max(most, resident_mib()) - before, 1),
        "images_per_second": round(done / seconds, 1),
    }


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("counts", type=int, nargs="+")
    parser.add_argument("--images", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.images is not None:
        with tempfile.TemporaryDirectory() as out:
            print(json.dumps(run_one(options.images, Path(out) / "masks", options.counts[0])))
        return []
    found = []
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        make_images(images, max(options.counts))
        for count in options.counts:
            command = [sys.executable, __file__, str(count), "--images", str(images)]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.append(json.loads(answer))
            print(found[-1])
    return found


if __name__ == "__main__":
    main()

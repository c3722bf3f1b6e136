"""Several classes: one reverse process for all of them against one for each; run by hand.

    python tests/benchmarks/multiclass.py --steps 400 --seeds 0 1 --out results/multiclass

Trains both models of `model.multiclass` at the same budget of steps on phantom organs (three classes) and
scores their test split once; then measures, in this same process, what predicting a batch costs with 3 and
with 13 classes, by untrained networks (the cost does not depend on the weights). Medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

WORDS = ("class_conditional", "joint")
NETWORKS = {
    "model.image_encoder": "timm:regnetx_002",
    "model.unet_channels": [32, 64, 128],
    "model.unet_blocks": 1,
    "model.unet_attention_strides": [4],
    "data.augmentation.affine": 0,
    "data.augmentation.colour": 0,
    "data.augmentation.blur": 0,
    "data.augmentation.noise": 0,
    "data.workers": 0,
    "train.batch_size": 16,
    "train.warmup_steps": 30,
    "train.learning_rate": 1e-3,
    "train.ema_decay": 0.99,
    "train.log_every": 50,
    "train.checkpoint_every": 100_000,
    "train.trackers": [],
}


def sdseg(*words: str) -> dict:
    as_json = [] if words[0] == "prepare" else ["--json"]
    done = subprocess.run(
        [sys.executable, "-m", "sdseg_cli", *words, *as_json], check=False, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"sdseg {' '.join(words)}\nexit {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout) if as_json else {}


def settings(arguments: argparse.Namespace, word: str, seed: int) -> list[str]:
    own = {
        "data.dataset": arguments.out / "organs",
        "data.image_size": arguments.size,
        "model.multiclass": word,
        "train.steps": arguments.steps,
        "train.validate_every": max(1, arguments.steps // 4),
        "train.seed": seed,
    }
    options = [f"{name}={value}" for name, value in {**NETWORKS, **own}.items()] + arguments.set
    return list(itertools.chain.from_iterable(("--set", option) for option in options))


def compare(arguments: argparse.Namespace) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {word: [] for word in WORDS}
    for seed, word in itertools.product(arguments.seeds, WORDS):
        run = arguments.out / f"{word}-seed{seed}"
        sdseg("train", "--recipe", "kseg-fast", "--out", str(run), *settings(arguments, word, seed))
        record = json.loads((run / "run.json").read_text())
        options = ("--split", "test", "--out", f"{run}-test", "--overwrite")
        summary = sdseg("evaluate", "--model", str(run), *options)
        dice = summary["classes"]["mean of classes"]["metrics"]["dice"]["mean"]
        print(
            f"{word}, seed {seed}: validation Dice {record['best']['validation_dice']:.4f} at step "
            f"{record['best']['step']}, {record['trained_seconds']:.0f} s; test Dice {dice:.4f}",
            flush=True,
        )
        found[word].append(record["best"]["validation_dice"])
    return found


def costs(arguments: argparse.Namespace, num_classes: int) -> dict[str, float]:
    """Median seconds that a batch of predictions takes."""
    import numpy as np

    from sdseg_cli.core.engine.networks import build_networks
    from sdseg_cli.core.model.pipeline import SDSegPipeline
    from sdseg_cli.core.recipe import load_recipe

    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (arguments.size,) * 2 + (3,), dtype=np.uint8) for _ in range(8)]
    pipelines = {}
    for word in WORDS:
        networks = build_networks(load_recipe("kseg-fast", settings(arguments, word, 0)[1::2]), num_classes)
        pipelines[word] = SDSegPipeline(
            unet=networks.unet.eval(),
            image_encoder=networks.image_encoder.eval(),
            autoencoder=networks.autoencoder,
            scheduler=networks.scheduler,
            classes=[str(index) for index in range(num_classes)],
            image_size=arguments.size,
        )
    times: dict[str, list[float]] = {word: [] for word in WORDS}
    for repeat, word in itertools.product(range(arguments.repeats + 1), WORDS):
        started = time.perf_counter()
        pipelines[word](images)
        if repeat:  # the first is a warm-up
            times[word].append(time.perf_counter() - started)
    return {word: statistics.median(values) for word, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400, help="0 measures the cost alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--cases", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    print(f"threads {os.environ.get('OMP_NUM_THREADS', 'all')}, {arguments.size} pixels", flush=True)
    for count in (4, 14):
        spent = costs(arguments, count)
        print(
            f"{count - 1} classes, batch of 8: "
            + ", ".join(f"{word} {1000 * seconds:.0f} ms" for word, seconds in spent.items())
            + f"; ratio {spent['class_conditional'] / spent['joint']:.1f}",
            flush=True,
        )
    if not arguments.steps:
        return
    data = arguments.out / "organs"
    if not data.exists():
        sdseg(
            *("prepare", "phantom", "--kind", "organs", "--cases", str(arguments.cases), "--workers", "1"),
            *("--size", str(arguments.size), "--out", str(data)),
        )
    for word, values in compare(arguments).items():
        print(f"{word}: median of validation Dice {statistics.median(values):.4f}")


if __name__ == "__main__":
    main()

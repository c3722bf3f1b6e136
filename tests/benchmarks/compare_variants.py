"""Train variants of a recipe on the same data and compare them on validation; run by hand.

    python tests/benchmarks/compare_variants.py kseg-fast tests/benchmarks/objectives.yaml \
        --seeds 0 1 --jobs 2 --out results --set data.dataset=data/kseg64 --set train.steps=400

A variants file maps names to lists of settings. The variant with the best mean validation Dice is chosen,
and the test split is scored once, with the chosen variant's runs and those of the variants named by
--also-test (a baseline). A variant whose run is finished already is not trained again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml


def sdseg(*arguments: str, threads: int) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, "-m", "sdseg_cli", *arguments, "--json"],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    if done.returncode:
        raise SystemExit(f"sdseg {' '.join(arguments)}\nexit {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def train(recipe: str, name: str, settings: list[str], seed: int, arguments: argparse.Namespace) -> dict:
    run = arguments.out / f"{name}-seed{seed}"
    state = run / "run.json"
    if not (state.is_file() and json.loads(state.read_text())["status"] == "finished"):
        options = [f"train.seed={seed}", *arguments.set, *settings]
        sdseg(
            "train",
            "--recipe",
            recipe,
            "--out",
            str(run),
            "--overwrite",
            *itertools.chain.from_iterable(("--set", option) for option in options),
            threads=arguments.threads,
        )
    record = json.loads(state.read_text())
    print(f"{run.name}: validation Dice {record['best']['validation_dice']:.4f}", flush=True)
    return {
        "variant": name,
        "seed": seed,
        "run": str(run),
        "validation_dice": record["best"]["validation_dice"],
        "steps": record["steps"],
        "seconds": record["trained_seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("variants", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each run")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--also-test", nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    variants = yaml.safe_load(arguments.variants.read_text())

    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = list(
            pool.map(
                lambda job: train(arguments.recipe, job[0], variants[job[0]], job[1], arguments),
                itertools.product(variants, arguments.seeds),
            )
        )
    mean = {
        name: statistics.mean(run["validation_dice"] for run in runs if run["variant"] == name)
        for name in variants
    }
    chosen = max((name for name in variants if name not in arguments.also_test), key=mean.__getitem__)
    for run in runs:
        if run["variant"] in {chosen, *arguments.also_test}:
            summary = sdseg(
                "evaluate",
                "--model",
                run["run"],
                "--split",
                "test",
                "--overwrite",
                threads=arguments.threads * arguments.jobs,
            )
            run["test"] = summary
    (arguments.out / "comparison.json").write_text(json.dumps({"chosen": chosen, "runs": runs}, indent=2))

    print(f"\n| variant | {' | '.join(f'seed {seed}' for seed in arguments.seeds)} | mean |")
    print("| --- |" + " --- |" * (len(arguments.seeds) + 1))
    for name in sorted(variants, key=mean.__getitem__, reverse=True):
        values = [f"{run['validation_dice']:.3f}" for run in runs if run["variant"] == name]
        mark = " (chosen)" if name == chosen else ""
        print(f"| {name}{mark} | {' | '.join(values)} | {mean[name]:.3f} |")


if __name__ == "__main__":
    main()

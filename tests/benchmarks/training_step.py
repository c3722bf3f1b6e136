"""What kept latents, a compiled step and the layout of weights change in a training step, in one run.

::

    sdseg prepare phantom --size 128 --cases 40 --out data/phantom128
    python tests/benchmarks/training_step.py data/phantom128 --device cpu --out results/training-step
    python tests/benchmarks/training_step.py data/phantom128 --only paper --autoencoder weights/kl-f8

Every variant is a training of its own, of the recipe's networks. On a CPU each makes one step in turn; on a
GPU one comes after another, with the peak of its memory. Medians are told. The first pass over the images
fills the kept latents and is not counted. Without
``--autoencoder`` the paper's networks are timed with one of random weights, which costs the same.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL

from sdseg_cli.core.engine import learner, training
from sdseg_cli.core.model.weights import quiet_diffusers
from sdseg_cli.core.recipe import load_recipe
from sdseg_cli.core.run_directory import RunDirectory

sys.path.insert(0, str(Path(__file__).parent))
from turns import turn

# Nothing moves a mask, so that one pass over the images keeps the latents of all.
STILL = {
    f"data.augmentation.{name}": 0
    for name in ("horizontal_flip", "vertical_flip", "affine", "colour", "blur", "noise")
}
COMMON = {
    "data.workers": 0,
    "train.log_every": 1,
    "train.validate_every": 100_000,
    "train.checkpoint_every": 100_000,
    "train.trackers": [],
}
FLOAT32, BF16 = {"train.precision": "fp32"}, {"train.precision": "bf16"}
COMPILED, RECOMPUTED = {"train.compile": True}, {"train.gradient_checkpointing": True}
# What a variant sets in the recipe, and what it changes in the training beside it.
VARIANTS: dict[str, tuple[dict, str]] = {
    "as published: float32, latents encoded each step": (STILL | FLOAT32, "no cache, as written"),
    "float32, latents kept": (STILL | FLOAT32, "as written"),
    "float32, latents kept, channels-last": (STILL | FLOAT32, "channels-last"),
    "float32, latents kept, compiled": (STILL | FLOAT32 | COMPILED, ""),
    "bf16, latents kept": (STILL | BF16, ""),
    "fast: bf16, latents kept, compiled": (STILL | BF16 | COMPILED, ""),
    "frugal: bf16, latents kept, compiled, recomputed": (STILL | BF16 | COMPILED | RECOMPUTED, ""),
    "recipe": ({}, ""),
    "recipe, compiled": (COMPILED, ""),
    "recipe, compiled, graphs": (COMPILED, "graphs"),
}


@contextlib.contextmanager
def changed(change: str) -> Iterator[None]:
    """Build a training without its cache, with another layout of its weights, or with graphs replayed."""
    most, layout, compiled = learner.MOST_BYTES, learner.use_channels_last, learner.compile_networks

    def laid_out(networks: list, _device: torch.device, *, training: bool) -> None:
        for network in networks:
            network.to(memory_format=torch.channels_last)

    def graphed(networks: list) -> None:
        for network in networks:
            network.compile(dynamic=False, mode="reduce-overhead")

    try:
        if "no cache" in change:
            learner.MOST_BYTES = 0
        if "as written" in change:
            learner.use_channels_last = lambda *networks, **settings: None
        elif "channels-last" in change:
            learner.use_channels_last = laid_out
        if "graphs" in change:
            learner.compile_networks = graphed
        yield
    finally:
        learner.MOST_BYTES, learner.use_channels_last, learner.compile_networks = most, layout, compiled


def start(settings: dict, change: str, recipe: str, folder: Path, device: str) -> Iterator:
    """Begin a training; each ``next`` is one step."""
    AcceleratorState._reset_state(reset_partial_state=True)  # one precision a process otherwise
    chosen = load_recipe(recipe, [f"{name}={json.dumps(value)}" for name, value in settings.items()])
    with changed(change):
        begun = training.Training(chosen, device=device)
    records = begun.run(RunDirectory.create(folder, chosen))
    next(records)  # what is told at the start
    return records


def kl_autoencoder(folder: Path, widths: tuple[int, ...]) -> Path:
    AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    ).save_pretrained(folder)
    return folder


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--steps", type=int, default=9, help="counted, after the warm-up")
    parser.add_argument("--warm-up", type=int, help="steps not counted (one pass over the images and 3)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--only", choices=["kseg-fast", "paper"], default="kseg-fast", help="which networks")
    parser.add_argument(
        "--variants", nargs="*", metavar="WORDS", help="those whose names hold one, or are =ONE"
    )
    parser.add_argument(
        "--autoencoder", type=Path, help="folder of a KL autoencoder, for the paper's networks"
    )
    parser.add_argument("--memory-gib", type=float, help="of the GPU that may be used; the peak is told")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    quiet_diffusers()
    if options.memory_gib is not None:
        whole = torch.cuda.get_device_properties(0).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory_gib / whole))
    manifest = training.PreparedDataset.open(options.dataset).manifest
    recipe = "kseg-fast" if options.only == "kseg-fast" else "kseg"
    with tempfile.TemporaryDirectory() as folder:
        settings = COMMON | {
            "data.dataset": str(options.dataset),
            "data.image_size": manifest.image_size,
            "train.batch_size": options.batch,
        }
        if options.only == "paper":
            kl = options.autoencoder or kl_autoencoder(Path(folder) / "kl", (128, 256, 512, 512))
            settings |= {"model.autoencoder": str(kl), "model.unet_weights": "random"}
            settings |= {"model.image_encoder_weights": "random", "model.latent_scale": 0.18215}
        for given in options.set:
            name, _, value = given.partition("=")
            settings[name] = json.loads(value)
        chosen = [
            name
            for name in VARIANTS
            if any(word in name or word == f"={name}" for word in options.variants or [""])
        ]
        warm_up = options.warm_up or -(-manifest.splits["train"] // options.batch) + 3
        seconds: dict[str, list[float]] = {name: [] for name in chosen}
        peaks: dict[str, float] = {}

        on_gpu = torch.cuda.is_available() and options.device != "cpu"
        every = settings["train.log_every"] = 5 if on_gpu else 1  # reading the losses waits for a GPU

        def begin(name: str) -> Iterator:
            own, change = VARIANTS[name]
            place = Path(folder) / str(chosen.index(name))
            return start(settings | own, change, recipe, place, options.device)

        def step(name: str, records: Iterator, number: int) -> None:
            started = time.perf_counter()
            next(records)
            if number >= warm_up:
                seconds[name].append((time.perf_counter() - started) / every)

        if on_gpu:
            for name in chosen:  # one after another, so that each has a peak of its own
                print(name, file=sys.stderr)
                torch.cuda.reset_peak_memory_stats()
                records = begin(name)
                for number in range(0, warm_up, every):
                    step(name, records, number)
                with turn():
                    for number in range(warm_up, warm_up + options.steps, every):
                        step(name, records, number)
                peaks[name] = torch.cuda.max_memory_allocated() / 2**30
                records.close()
                del records
                gc.collect()
                torch.cuda.empty_cache()
        else:
            running = {name: begin(name) for name in chosen}
            for number in range(warm_up + options.steps):
                print(f"step {number + 1}/{warm_up + options.steps}", file=sys.stderr)
                for name, records in running.items():
                    step(name, records, number)
    first = chosen[0]
    rates = {name: options.batch / statistics.median(values) for name, values in seconds.items()}
    found = {
        name: {
            "samples_per_second": round(rate, 2),
            "ratio": round(rate / rates[first], 2),
            "peak_gib": round(peaks[name], 2) if name in peaks else None,
        }
        for name, rate in rates.items()
    }
    print(json.dumps(found, indent=2))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "training-step.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()

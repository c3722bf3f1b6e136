"""Speed of the paper's networks, of ours at every setting, and of plain U-Nets, in one interleaved run.

::

    python tests/benchmarks/speed.py --device cuda --out results/speed
    python tests/benchmarks/speed.py --device cpu --quick --size 128 --out results/speed-cpu

Every variant is timed once per round, in turn, so that a machine that grows slower does so for all; the
medians over the rounds are told. The limit of the arithmetic is the GFLOP that were counted over the rate of
a large matrix product measured in the same run and precision.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from monai.networks.nets import DynUNet
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from sdseg_cli.core.engine.acceleration import hold_in_half, missing_compiler, record_graphs
from sdseg_cli.core.model.exported import OneStep, write_graph
from sdseg_cli.core.model.image_encoder import KLImageEncoder, TimmImageEncoder
from sdseg_cli.core.model.mask_autoencoder import MaskAutoencoder
from sdseg_cli.core.model.pipeline import SDSegPipeline, scores_to_probabilities
from sdseg_cli.core.model.plain_unet import PlainUNet
from sdseg_cli.core.model.schedule import make_scheduler
from sdseg_cli.core.model.unet import SDSegUNet

sys.path.insert(0, str(Path(__file__).parent))
from turns import turn

BATCHES = (1, 16)
TRAINED_BATCH = 16
BUSY = False  # set by --busy: seconds of this process's one thread, in place of the clock's
# Those for which ``sdseg export`` has what it needs.
RUNTIMES = [
    kind
    for kind, library in (("onnx", "onnxruntime"), ("openvino", "openvino"))
    if all(find_spec(name) for name in ("onnx", "onnxscript", library))
]
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Variant:
    """One family of networks at one setting."""

    family: str
    precision: str = "fp32"
    channels_last: bool = False
    compiled: bool = False
    recompute: bool = False  # activations, in the backward pass
    recorded: bool = False  # as sdseg predicts on a GPU: weights held in half, calls replayed as CUDA graphs
    runtime: str = ""  # onnx or openvino: the graph that ``sdseg export`` writes, in place of PyTorch

    @property
    def name(self) -> str:
        words = [self.family, self.precision, *[self.runtime] * bool(self.runtime)]
        words += ["channels-last"] * self.channels_last + ["compiled"] * self.compiled
        words += ["recomputed"] * self.recompute + ["recorded"] * self.recorded
        return " ".join(words)


@dataclass
class Result:
    """Medians over the rounds; None where it was not measured, with the reason."""

    name: str
    gflop_per_image: float = 0.0
    shares: dict[str, float] = field(default_factory=dict)
    images_per_second: dict[str, float] = field(default_factory=dict)
    fraction_of_limit: dict[str, float] = field(default_factory=dict)
    samples_per_second: float | None = None
    peak_memory_gib: float = 0.0
    seconds: dict[str, list[float]] = field(default_factory=dict)
    reason: str = ""


# The networks ---------------------------------------------------------------------------------------


def kl_autoencoder(tiny: bool) -> AutoencoderKL:
    widths = (32, 32, 32, 32) if tiny else (128, 256, 512, 512)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1 if tiny else 2,
        latent_channels=4,
    )


def paper(size: int, tiny: bool, autoencoder: nn.Module) -> SDSegPipeline:
    """The paper's networks: KL image encoder, U-Net of 295 M weights."""
    encoder = KLImageEncoder(channels=(32,) * 4, blocks=1) if tiny else KLImageEncoder()
    small = {"channels": (32, 32), "blocks": 1, "heads": 4, "attention_strides": (2,)}
    unet = SDSegUNet(sample_size=size // 8, **(small if tiny else {}))
    return pipeline(unet, encoder, autoencoder, size, "epsilon")


def light(size: int, tiny: bool) -> SDSegPipeline:
    """The networks of the recipe kseg-fast."""
    name = "test_efficientnet_gn" if tiny else "resnet18"
    encoder = TimmImageEncoder(name, 32, 1)
    unet = SDSegUNet(
        sample_size=size // 8,
        conditioning_channels=32,
        channels=(32, 32) if tiny else (64, 128, 256),
        blocks=1 if tiny else 2,
        attention_strides=(2,) if tiny else (4,),
        dropout=0.1,
    )
    return pipeline(unet, encoder, MaskAutoencoder(), size, "sample")


def pipeline(unet, encoder, autoencoder, size: int, prediction: str) -> SDSegPipeline:
    return SDSegPipeline(unet, encoder, autoencoder, make_scheduler(prediction), image_size=size)


def nnunet_like(tiny: bool) -> nn.Module:
    """MONAI's DynUNet, laid out as nnU-Net lays out a 2-D network for 256 pixels: seven resolutions."""
    widths = [8, 16, 16] if tiny else [32, 64, 128, 256, 512, 512, 512]
    strides = [1] + [2] * (len(widths) - 1)
    return DynUNet(2, 3, 2, [3] * len(widths), strides, strides[1:], filters=widths)


def build(family: str, size: int, tiny: bool) -> tuple[nn.Module | SDSegPipeline, dict[str, nn.Module]]:
    """Build one family; also give its networks by name."""
    if family == "paper":
        model = paper(size, tiny, kl_autoencoder(tiny))
    elif family == "paper, built-in mask decoder":
        model = paper(size, tiny, MaskAutoencoder())
    elif family == "kseg-fast":
        model = light(size, tiny)
    else:
        network = (
            nnunet_like(tiny)
            if family.startswith("nnU-Net")
            else PlainUNet("test_efficientnet" if tiny else "resnet34", 2)
        )
        return network.eval(), {"network": network}
    parts = {"image encoder": model.image_encoder, "U-Net": model.unet, "decoder": model.autoencoder.decoder}
    for part in (model.image_encoder, model.unet, model.autoencoder):
        part.eval()
    return model, parts


FAMILIES = ("paper", "paper, built-in mask decoder", "kseg-fast", "U-Net ResNet-34", "nnU-Net-like (DynUNet)")


def variants(device: torch.device, compile_too: bool, runtimes: Sequence[str]) -> list[Variant]:
    half = "bf16"
    found = []
    for family in FAMILIES:
        found += [Variant(family), Variant(family, half), Variant(family, "fp32", True)]
        found += [Variant(family, half, True)]
        if compile_too:
            found += [Variant(family, "fp32", compiled=True), Variant(family, half, True, True)]
        if family == "paper":
            found.append(Variant(family, half, True, recompute=True))
        if device.type == "cuda":
            found += [Variant(family, "fp16"), Variant(family, "fp16", True)]
            found += [Variant(family, half, True, recorded=True)]
            found += [Variant(family, half, True, True, recorded=True)] * compile_too
        else:
            found += [Variant(family, runtime=kind) for kind in runtimes]
    return found


# One variant at work --------------------------------------------------------------------------------


class Subject:
    """A variant's networks on the device, ready to predict and to train."""

    def __init__(self, variant: Variant, device: torch.device, size: int, tiny: bool) -> None:
        torch.manual_seed(0)
        self.variant, self.device, self.size = variant, device, size
        self.model, self.parts = build(variant.family, size, tiny)
        self.model.to(device)
        for part in self.parts.values():
            if variant.channels_last:
                part.to(memory_format=torch.channels_last)
            if variant.compiled:
                part.compile(dynamic=False)
        if variant.recompute:
            self.model.unet.enable_gradient_checkpointing()
            self.model.image_encoder.enable_gradient_checkpointing()
        networks = [part for name, part in self.parts.items() if name != "decoder"]
        self.trained = [parameter for part in networks for parameter in part.parameters()]
        if variant.recorded:
            hold_in_half(list(self.parts.values()), PRECISIONS[variant.precision])
            record_graphs(list(self.parts.values()))
        self.optimizer: torch.optim.Optimizer | None = None
        self.graph = graph(variant.family, variant.runtime, size, tiny) if variant.runtime else None

    def images(self, count: int) -> torch.Tensor:
        images = torch.rand(count, 3, self.size, self.size, device=self.device) * 2 - 1
        if self.variant.channels_last:
            return images.contiguous(memory_format=torch.channels_last)
        return images

    def latents(self, count: int) -> torch.Tensor:
        return torch.randn(count, *self.model.latent_shape(), device=self.device)

    def autocast(self) -> contextlib.AbstractContextManager:
        dtype = PRECISIONS[self.variant.precision]
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    @torch.no_grad()
    def predict(self, images: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        if self.graph is not None:
            given = {"image": images.numpy()} | ({} if noise is None else {"noise": noise.numpy()})
            return torch.from_numpy(self.graph(given))
        with self.autocast():
            if noise is None:
                return self.parts["network"](images).float().softmax(dim=1)
            conditioning = self.model.image_encoder(images)
            return scores_to_probabilities(self.model.denoise(conditioning, noise, 1))

    def train_step(self, images: torch.Tensor, noise: torch.Tensor | None) -> None:
        """One step of what is trained: U-Net and image encoder on the latent, or the network on pixels."""
        if self.optimizer is None:
            fused = self.device.type == "cuda"
            self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=fused or None)
        with self.autocast():
            if noise is None:
                output = self.parts["network"](images).float()
                truth = torch.zeros(len(images), *output.shape[2:], dtype=torch.long, device=self.device)
                loss = functional.cross_entropy(output, truth)
            else:
                at = torch.full((len(images),), 999, device=self.device)
                output = self.model.unet(noise, at, self.model.image_encoder(images))
                loss = (output.float() - noise).abs().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def inputs(self, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        is_plain = "network" in self.parts
        return self.images(count), None if is_plain else self.latents(count)

    def count_flops(self) -> tuple[float, dict[str, float]]:
        """GFLOP of one image (a multiply-add is two), and the share of each network."""
        per_part = {}
        images, noise = self.inputs(1)
        hooks, seen = [], {}
        for name, part in self.parts.items():
            hooks.append(
                part.register_forward_hook(lambda _m, given, _out, name=name: seen.update({name: given}))
            )
        with FlopCounterMode(display=False) as counter:
            self.predict(images, noise)
        for hook in hooks:
            hook.remove()
        for name, given in seen.items():
            with FlopCounterMode(display=False) as own, torch.no_grad(), self.autocast():
                self.parts[name](*given)
            per_part[name] = own.get_total_flops()
        total = counter.get_total_flops()
        return total / 1e9, {name: flops / max(total, 1) for name, flops in per_part.items()}


class Probabilities(nn.Module):
    """A plain network up to its probabilities, as :class:`OneStep` is for a pipeline."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network(image).float().softmax(dim=1)


@lru_cache
def graph(family: str, kind: str, size: int, tiny: bool) -> Callable[[dict], np.ndarray]:
    """Write a family's graph and load it; it is written once, and its weights are the variant's."""
    subject = Subject(Variant(family), torch.device("cpu"), size, tiny)
    images, noise = subject.inputs(2)
    module = OneStep(subject.model) if noise is not None else Probabilities(subject.model)
    example = {"image": images} | ({} if noise is None else {"noise": noise})
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        run = write_graph(module.eval(), example, Path(folder), kind)
        expected = subject.predict(images, noise).numpy()
        found = run({name: tensor.numpy() for name, tensor in example.items()})
    assert np.abs(found - expected).max() < 1e-3, "the graph says something else"
    return run


@lru_cache
def counted_flops(family: str, device: str, size: int, tiny: bool) -> tuple[float, dict[str, float]]:
    return Subject(Variant(family), torch.device(device), size, tiny).count_flops()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of one call, over a few in a row."""
    clock = time.process_time if BUSY else time.perf_counter
    synchronize(device)
    started = clock()
    for _ in range(repeats):
        work()
    synchronize(device)
    return (clock() - started) / repeats


def matrix_rate(device: torch.device, precision: str, side: int) -> float:
    """GFLOP a second of a large matrix product, the best of five."""
    dtype = PRECISIONS[precision] or torch.float32
    one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    one @ other
    return 2 * side**3 / min(timed(lambda: one @ other, device, 2) for _ in range(5)) / 1e9


def peak_memory_gib(device: torch.device) -> float:
    """Of the device since the last reset; of this process so far on a CPU, where nothing resets it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# The run --------------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict:
    device = torch.device(options.device)
    compile_too = options.compile and missing_compiler(device) is None
    chosen = [
        variant
        for variant in variants(device, compile_too, options.runtimes)
        if not options.only
        or any(word in variant.name or word == f"={variant.name}" for word in options.only)
    ]
    results = {variant: Result(variant.name) for variant in chosen}
    kept: dict[Variant, Subject] = {}  # those that were compiled: that takes longer than all that is timed
    for number in range(options.rounds):
        for variant in chosen:
            result = results[variant]
            if result.reason:
                continue
            print(f"round {number + 1}/{options.rounds}: {variant.name}", file=sys.stderr)
            try:
                subject = one_round(variant, result, kept.get(variant), device, options)
                if device.type == "cuda" or variant.compiled:
                    kept[variant] = subject
            except Exception as error:
                result.reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    precisions = {variant.precision for variant in chosen}
    with turn():
        rates = {name: matrix_rate(device, name, options.matrix) for name in sorted(precisions)}
    for variant, result in results.items():
        settle(variant, result, rates)
    return {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "size": options.size,
        "tiny_networks": options.tiny,
        "rounds": options.rounds,
        "batches": list(options.batches),
        "training_batch": options.training_batch,
        "matrix_product_gflops": rates,
        "variants": [asdict(result) for result in results.values()],
    }


def one_round(
    variant: Variant,
    result: Result,
    subject: Subject | None,
    device: torch.device,
    options: argparse.Namespace,
) -> Subject:
    """Build a variant if need be, warm it up and time it; the memory of others is not in its figures."""
    if not result.gflop_per_image:  # counted on networks as written: a compiled graph hides its operations
        counted = counted_flops(variant.family, str(device), options.size, options.tiny)
        result.gflop_per_image, result.shares = counted
    others = (
        0.0 if subject is not None or device.type != "cuda" else torch.cuda.memory_allocated(device) / 2**30
    )
    first = subject is None
    if first and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    subject = subject or Subject(variant, device, options.size, options.tiny)
    for count in options.batches:
        given = subject.inputs(count)
        for _ in range(options.warm_up if first or device.type != "cuda" else 0):
            subject.predict(*given)  # on a GPU the second call is recorded
        with turn():
            subject.predict(*given)
            seconds = timed(lambda given=given: subject.predict(*given), device, options.repeats)
        result.seconds.setdefault(f"batch {count}", []).append(seconds)
    if first:
        result.peak_memory_gib = peak_memory_gib(device) - others
    predicts_only = (
        variant.runtime or variant.recorded or variant.precision == "fp16"
    )  # it takes a loss scaler
    if not options.training or predicts_only:
        return subject
    for part in subject.parts.values():
        part.train()
    given = subject.inputs(options.training_batch)
    for _ in range(options.warm_up):
        subject.train_step(*given)
    seconds = timed(lambda: subject.train_step(*given), device, options.repeats)
    result.seconds.setdefault(f"training {options.training_batch}", []).append(seconds)
    return subject


def settle(variant: Variant, result: Result, rates: dict[str, float]) -> None:
    for name, seconds in result.seconds.items():
        kind, count = name.split()
        rate = int(count) / statistics.median(seconds)
        if kind == "training":
            result.samples_per_second = rate
        else:
            result.images_per_second[count] = rate
            result.fraction_of_limit[count] = rate * result.gflop_per_image / rates[variant.precision]


def table(report: dict) -> Iterator[str]:
    yield (
        f"{report['device']}, {report['threads']} threads, torch {report['torch']}, {report['size']} pixels"
        + (", tiny networks: no figure to compare" if report["tiny_networks"] else "")
    )
    rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in report["matrix_product_gflops"].items())
    yield f"matrix product, GFLOP/s: {rates}"
    yield ""
    columns = ["networks", "GFLOP", "shares", *(f"images/s ({count})" for count in report["batches"])]
    columns += ["of the limit", "samples/s", "GiB"]
    yield f"| {' | '.join(columns)} |"
    yield f"|{' --- |' * len(columns)}"
    for row in report["variants"]:
        if row["reason"]:
            yield f"| {row['name']} | {row['reason']} |{' |' * (len(columns) - 2)}"
            continue
        shares = ", ".join(f"{name} {share:.0%}" for name, share in row["shares"].items())
        speeds = [f"{row['images_per_second'][str(count)]:.1f}" for count in report["batches"]]
        limit = max(row["fraction_of_limit"].values(), default=float("nan"))
        trained = "" if row["samples_per_second"] is None else f"{row['samples_per_second']:.1f}"
        yield (
            f"| {row['name']} | {row['gflop_per_image']:.1f} | {shares} | {' | '.join(speeds)} | {limit:.0%} "
            f"| {trained} | {row['peak_memory_gib']:.2f} |"
        )


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", type=int, default=256, help="side of the images, pixels")
    parser.add_argument("--rounds", type=int, help="times each variant is measured (7; 3 with --quick)")
    parser.add_argument("--repeats", type=int, help="calls per measurement (10; 1 with --quick)")
    parser.add_argument("--quick", action="store_true", help="few repeats and small batches, for a CPU")
    parser.add_argument("--tiny", action="store_true", help="tiny networks: only shows that it runs")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: not with --quick")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="images at a time")
    parser.add_argument("--training-batch", type=int, help="images of a training step (16; 2 with --quick)")
    parser.add_argument("--busy", action="store_true", help="CPU seconds of one thread: others compute too")
    parser.add_argument("--training", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--runtimes", nargs="*", default=RUNTIMES, help="of exported graphs, on a CPU")
    parser.add_argument(
        "--only", nargs="*", metavar="WORDS", help="variants whose names hold one, or are =ONE"
    )
    parser.add_argument("--out", type=Path, help="folder for speed.json and speed.md")
    options = parser.parse_args(arguments)
    quick = options.quick
    options.rounds = options.rounds or (3 if quick else 7)
    options.repeats = options.repeats or (1 if quick else 10)
    options.warm_up = 1 if quick else 3
    options.training_batch = options.training_batch or (2 if quick else TRAINED_BATCH)
    options.matrix = 512 if options.tiny else 2048 if quick else 8192
    options.compile = (not quick) if options.compile is None else options.compile
    torch.set_flush_denormal(True)
    if options.busy:
        global BUSY  # noqa: PLW0603
        BUSY = True
        torch.set_num_threads(1)
    report = measure(options)
    text = "\n".join(table(report)) + "\n"
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "speed.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (options.out / "speed.md").write_text(text, encoding="utf-8")
    return report


if __name__ == "__main__":
    main()

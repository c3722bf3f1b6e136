"""What a recipe would train, found out without training: weights, data, memory, reconstruction ceiling."""

from __future__ import annotations

import copy
import weakref
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdseg_cli.core.data.prepared import PreparedDataset
from sdseg_cli.core.engine.autoencoder_training import reconstruction_dice
from sdseg_cli.core.engine.inference import choose_device, choose_precision
from sdseg_cli.core.engine.networks import (
    Networks,
    TrainableNetwork,
    build_networks,
    check_dataset,
    count_parameters,
    predicts_noise,
)
from sdseg_cli.core.engine.training_data import present_masks
from sdseg_cli.core.model.latents import spatial_factor
from sdseg_cli.core.recipe import Recipe
from sdseg_cli.core.seeding import derive_seed

_CEILING_SAMPLE = 200


@dataclass(frozen=True)
class DryRun:
    """What :func:`examine` found.

    Attributes:
        device: where it would run.
        precision: in which arithmetic.
        parameters: network -> weights.
        trained_parameters: weights that receive gradients.
        dataset: name, classes, slices per split, fingerprint.
        memory_gib: estimate of the peak on the device, one process.
        memory_parts_gib: weights, optimizer, averages, activations.
        ceiling_dice: mean Dice of validation masks encoded and decoded again; None without autoencoder.
        ceiling_masks: how many were measured.
        epochs: passes over the training split.
    """

    device: str
    precision: str
    parameters: dict[str, int]
    trained_parameters: int
    dataset: dict[str, Any]
    memory_gib: float
    memory_parts_gib: dict[str, float]
    ceiling_dice: float | None
    ceiling_masks: int
    epochs: float

    def values(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self)

    def facts(self) -> dict[str, str]:
        """Names and sentences for a person."""
        splits = ", ".join(f"{count:,} {name}" for name, count in self.dataset["splits"].items())
        parts = ", ".join(f"{name} {size:.2f}" for name, size in self.memory_parts_gib.items())
        weights = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in self.parameters.items())
        facts = {
            "device": f"{self.device}, {self.precision}",
            "weights": f"{weights}; trained {self.trained_parameters / 1e6:.2f} M",
            "dataset": f"{self.dataset['name']}: {splits} slices",
            "classes": ", ".join(self.dataset["classes"]),
            "length": f"{self.epochs:.1f} passes over the training split",
            "memory": f"about {self.memory_gib:.2f} GiB ({parts})",
        }
        if self.ceiling_dice is not None:
            facts["reconstruction ceiling"] = (
                f"Dice {self.ceiling_dice:.4f} ({self.ceiling_masks} validation masks encoded and decoded)"
            )
        return facts


def examine(recipe: Recipe, *, device: str = "auto") -> DryRun:
    """Build everything that a training would build, and measure it.

    Raises:
        UsageError: weights or the device cannot be had.
        DataError: the dataset is missing or does not match the recipe.
    """
    chosen = choose_device(device)
    precision = choose_precision(recipe.train.precision, chosen, predicts_noise=predicts_noise(recipe))
    dataset = PreparedDataset.open(recipe.data.dataset)
    check_dataset(recipe, dataset.manifest)
    networks = build_networks(recipe, dataset.manifest.num_classes)
    joint = recipe.model.multiclass == "joint"
    ceiling, measured = _ceiling(networks, dataset, chosen, joint=joint)
    network = TrainableNetwork(
        networks,
        freeze_image_encoder=recipe.model.freeze_image_encoder,
        recompute=recipe.train.gradient_checkpointing,
    )
    parts = _memory(recipe, networks, network, precision)
    manifest = dataset.manifest
    return DryRun(
        device=str(chosen),
        precision=precision,
        parameters=count_parameters(networks),
        trained_parameters=_size(network, trained=True),
        dataset={
            "name": manifest.name,
            "classes": list(manifest.classes),
            "splits": dict(manifest.splits),
            "fingerprint": manifest.fingerprint,
        },
        memory_gib=sum(parts.values()),
        memory_parts_gib=parts,
        ceiling_dice=ceiling,
        ceiling_masks=measured,
        epochs=recipe.train.steps * recipe.train.batch_size / manifest.splits["train"],
    )


def _ceiling(
    networks: Networks, dataset: PreparedDataset, device: torch.device, *, joint: bool
) -> tuple[float | None, int]:
    if networks.autoencoder is None:
        return None, 0
    split = dataset.split("validation")
    order = np.random.default_rng(derive_seed("ceiling")).permutation(len(split))[:_CEILING_SAMPLE]
    several = dataset.manifest.num_classes > 2
    slices = [split[int(i)] for i in order]
    masks = list(present_masks(slices, class_conditional=several and not joint, joint=joint))
    scores = reconstruction_dice(networks.autoencoder.to(device), masks, device=device)
    return (float(scores.mean()) if len(scores) else None), len(scores)


def _memory(
    recipe: Recipe, networks: Networks, network: TrainableNetwork, precision: str
) -> dict[str, float]:
    """Count bytes: weights, gradients, AdamW's two moments, averages, and the activations."""
    trained = _size(network, trained=True)
    frozen = sum(count_parameters(networks).values()) - trained
    averaged = sum(p.numel() for p in network.averaged_parameters(recipe.train.ema_scope))
    activations = _activation_bytes(recipe, networks, network)
    if precision != "fp32":
        activations //= 2
    sizes = {
        "weights": 4 * (trained + frozen),
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "averages": 4 * averaged * (recipe.train.ema_decay > 0),
        "activations": activations,
    }
    return {name: size / 2**30 for name, size in sizes.items()}


def _activation_bytes(recipe: Recipe, networks: Networks, network: TrainableNetwork) -> int:
    """Most bytes that the images of a part take at once in a step, without the gradients of weights.

    Counted on the meta device, where nothing is computed. With recomputed activations that is much more than
    what the backward pass keeps: what it computes again is there too.
    """
    twin = copy.deepcopy(network).to("meta").train()
    twin._frozen = [copy.deepcopy(encoder).to("meta") for encoder in network._frozen]
    for parameter in filter(lambda own: own.requires_grad, twin.parameters()):
        parameter.register_post_accumulate_grad_hook(lambda own: setattr(own, "grad", None))
    size = recipe.data.image_size
    part = recipe.train.batch_size // recipe.train.gradient_accumulation
    images = torch.empty(part, 3, size, size, device="meta")
    arguments: list[torch.Tensor | None] = []
    if networks.autoencoder is not None:
        side = size // spatial_factor(networks.autoencoder)
        unet = networks.unet.config
        by_class = unet["num_class_embeds"] is not None
        arguments = [
            torch.empty(part, unet["latent_channels"], side, side, device="meta"),
            torch.zeros(part, dtype=torch.long, device="meta"),
            torch.zeros(part, dtype=torch.long, device="meta") if by_class else None,
        ]
    # By their storage: a linear layer keeps a transposed view of its weights.
    with _Living([*twin.parameters(), *twin.buffers()]) as living:
        twin(images, *arguments).abs().mean().backward()
    return living.peak


class _Living(TorchDispatchMode):
    """Adds up the bytes of the tensors that are alive, but for those ``known`` before.

    Attributes:
        peak: the most of them at once.
    """

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._end, storage._cdata, storage.nbytes())
        return out

    def _end(self, name: int, size: int) -> None:
        self._known.discard(name)
        self._now -= size


def _size(network: torch.nn.Module, *, trained: bool) -> int:
    return sum(p.numel() for p in network.parameters() if p.requires_grad or not trained)

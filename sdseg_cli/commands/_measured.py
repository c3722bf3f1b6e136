"""What ``evaluate`` and ``stability`` share: the model and the data they measure, and how they report."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sdseg_cli import console
from sdseg_cli.core.data.prepared import MANIFEST_FILE, PreparedDataset
from sdseg_cli.core.errors import DataError, UsageError
from sdseg_cli.core.files import EXPORT_FILE, sha256_of
from sdseg_cli.core.manifest import model_sum
from sdseg_cli.core.recipe import Recipe
from sdseg_cli.core.reporting.page import Table
from sdseg_cli.core.run_directory import ModelReference, resolve_model
from sdseg_cli.core.seeding import derive_seed


@dataclass(frozen=True)
class Model:
    """A model with the recipe it was trained by, where that is known."""

    reference: ModelReference
    recipe: Recipe | None

    @classmethod
    def find(cls, model: str | None, *, option: str = "--model", also: str = "") -> Model:
        """Find a model as ``resolve_model`` does and say which one it is."""
        reference = resolve_model(model, option=option, also=also)
        run = reference.run
        recipe = run.read_recipe() if run is not None and run.recipe_file.is_file() else None
        console.say(f"model: {reference.description}")
        return cls(reference, recipe)

    def dataset(self, data: Path | None) -> PreparedDataset:
        """Open the dataset of ``--data``, or the one the model was trained on.

        Raises:
            UsageError: neither is known.
            DataError: it is not there or torn.
        """
        if data is not None:
            return PreparedDataset.open(data)
        if self.recipe is None:
            raise UsageError(
                f"{self.reference.description}: no recipe beside it says what it was trained on. "
                "Name a prepared dataset with --data."
            )
        dataset = PreparedDataset.open(self.recipe.data.dataset)
        trained_on = self._trained_on().get("fingerprint")
        if trained_on is not None and trained_on != dataset.manifest.fingerprint:
            console.warn(
                f"dataset {dataset.root} is no longer the one this run was trained on (fingerprint "
                f"{dataset.manifest.fingerprint[:12]}, then {trained_on[:12]}): its test cases may have been "
                "training cases."
            )
        return dataset

    def sampling(self, **given: Any) -> dict[str, Any]:
        """Options of the predictor: as given, else as the recipe says; what neither says is left out.

        Raises:
            RecipeError: steps or samples that make no sense with what the model was trained for.
        """
        chosen = dict(given)
        if self.recipe is not None:
            counts = ("num_inference_steps", "num_samples", "flips")
            self.recipe.replace({f"sampling.{name}": given[name] for name in counts if given.get(name)})
            for name, value in chosen.items():
                if value is None and hasattr(self.recipe.sampling, name):
                    chosen[name] = getattr(self.recipe.sampling, name)
        else:
            known = self.training_data.get("sampling")
            stated = known if isinstance(known, dict) else {}  # others wrote it, if the model is not ours
            chosen = {name: stated.get(name) if value is None else value for name, value in chosen.items()}
        if chosen.get("flips"):
            chosen["flips"] = list(chosen["flips"])  # as JSON gives them back
        # No flips and no choice of components are what a predictor does anyway.
        return {
            name: value
            for name, value in chosen.items()
            if value is not None and value is not False and value not in ((), [])
        }

    def recipe_text(self) -> str:
        """The recipe the model was trained by, as YAML; empty where it is not known."""
        run = self.reference.run
        return (
            run.recipe_file.read_text(encoding="utf-8") if run is not None and self.recipe is not None else ""
        )

    def evidence(self) -> dict[str, Any]:
        """What the report records about the model."""
        run = self.reference.run
        fields = run.read_run_json() if run is not None else {}
        return {
            "location": self.reference.location,
            "sha256": model_sum(self.reference.location),
            "run": str(run.root) if run is not None else None,
            "recipe": self.recipe.name if self.recipe is not None else None,
            "trained_until": fields.get("ended"),
        }

    @cached_property
    def stated(self) -> Mapping[str, Any]:
        """What the model says of itself, before it is loaded; empty if it says nothing that can be read."""
        for name in ("model_index.json", EXPORT_FILE):
            try:
                return dict(json.loads(self._file(name).read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError):
                continue
        return {}

    @property
    def training_data(self) -> Mapping[str, Any]:
        """What the model says of the data it was trained on and of its use; empty if it says nothing."""
        known = self.stated.get("training_data")
        return known if isinstance(known, dict) else {}

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, the background first; empty if the model does not say."""
        known = self.stated.get("classes")
        return tuple(map(str, known)) if isinstance(known, list) else ()

    @property
    def channels(self) -> tuple[int, ...]:
        """Numbers of the files that were the image's channels, as nnU-Net counts; empty where one was all."""
        known = self.training_data.get("channels")
        numbers = known if isinstance(known, list) else []
        return tuple(number for number in numbers if isinstance(number, int))

    def _file(self, name: str) -> Path:
        """A file of the model, which is fetched where the model is on the hub.

        Raises:
            OSError: it is not there; the errors of the hub are such. Whoever loads the model tells why.
        """
        folder = Path(self.reference.location)
        if folder.is_dir():
            return folder / name
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.reference.location, name))

    def _trained_on(self) -> Mapping[str, Any]:
        run = self.reference.run
        recorded = run.read_run_json().get("dataset") if run is not None else None
        return recorded if isinstance(recorded, Mapping) else {}


def dataset_evidence(dataset: PreparedDataset, split: str) -> dict[str, Any]:
    """What the report records about the data, with the checksums of the files that are read.

    Raises:
        DataError: the split holds no slice, or a file of it is not as it was prepared.
    """
    manifest = dataset.manifest
    if not manifest.splits.get(split):
        filled = ", ".join(f"{name} ({count})" for name, count in manifest.splits.items() if count)
        raise DataError(
            f"{dataset.root}: split {split!r} is empty; there are {filled}. Choose another --split."
        )
    return {
        "path": str(dataset.root),
        "name": manifest.name,
        "split": split,
        "slices": manifest.splits[split],
        "fingerprint": manifest.fingerprint,
        "classes": list(manifest.classes),
        "manifest_sha256": sha256_of(dataset.root / MANIFEST_FILE),
        "files": _checked_files(dataset, split),
    }


def _checked_files(dataset: PreparedDataset, split: str) -> dict[str, str]:
    """The files of a split with their SHA-256."""
    recorded = dataset.manifest.checksums
    names = [name for name in dataset.manifest.files if name.startswith(f"{split}/")]
    found = {name: sha256_of(dataset.root / name) for name in names}
    for name, digest in found.items():
        if digest != recorded.get(name, digest):
            raise DataError(
                f"{dataset.root / name} is altered: SHA-256 {digest[:12]}, prepared as "
                f"{recorded[name][:12]}. Prepare the dataset again, or restore it; all that differs is named "
                f"by: sdseg verify {dataset.root}"
            )
    return found


def input_sums(paths: Iterable[Path]) -> dict[str, str]:
    """Path -> SHA-256 of the files that were measured; what is gone meanwhile is left out."""
    return {str(path): sha256_of(path) for path in paths if path.is_file()}


def show(table: Table, notes: Sequence[str] = ()) -> None:
    """Draw a table of results on stdout."""
    console.show_table(
        table.columns, table.rows, title=table.title, caption="\n".join([table.caption, *notes])
    )


def file_name(case_id: str) -> str:
    """A file name (without suffix) for a case id, which may hold slashes or be very long; never twice."""
    clean = "".join(c if c.isalnum() or c in "-_." else "_" for c in case_id)[:80]
    return clean if clean == case_id else f"{clean}-{derive_seed(case_id) % 16**8:08x}"

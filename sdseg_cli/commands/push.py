"""``sdseg push``: a run's model on the Hugging Face hub, with a card that says what it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sdseg_cli import console
from sdseg_cli.commands._options import complete_run
from sdseg_cli.core.data.prepared import PreparedDataset
from sdseg_cli.core.errors import DataError, ModelError, SdsegError, UsageError
from sdseg_cli.core.files import SUMMARY_FILE
from sdseg_cli.core.run_directory import RunDirectory, resolve_model

CARD = "README.md"


def push(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="Run with an exported model.", autocompletion=complete_run)
    ],
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Where on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make the new repository private.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the card, list the files and send nothing.")
    ] = False,
) -> None:
    """Put a run's model on the hub with a card made from the run.

    The card has the dataset, the split, the scores with their intervals, the recipe and the licences.
    Needs a token that may write: hf auth login, or HF_TOKEN.

    Examples:

    sdseg push runs/kseg-fast-20260131-120000 me/kseg-fast --dry-run

    sdseg push runs/kseg-fast-20260131-120000 me/kseg-fast --private
    """
    reference = resolve_model(run, option="")
    if reference.run is None:
        raise UsageError(
            f"push: {run} is no run, so there is nothing to write a card from. Give a run directory."
        )
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UsageError(f"push: {name!r} is no name of a repository: {error}") from error
    if name.count("/") != 1:
        raise UsageError(f"push: found {name!r}, expected OWNER/NAME, such as me/kseg-fast.")
    folder = reference.run.model
    _refuse_local_reference(folder)
    card = model_card(reference.run, name)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CARD)
    if dry_run:
        console.show_text(card)
        sizes = [(str(path.relative_to(folder)), f"{path.stat().st_size / 1e6:.2f}") for path in files]
        console.show_table(("file", "MB"), [*sizes, (CARD, f"{len(card.encode()) / 1e6:.2f}")])
        console.say(f"nothing was sent. Without --dry-run this goes to {name}.")
        return
    with console.working(f"sending {len(files) + 1} files to {name}"):
        url = _send(folder, card, name, private=private)
    console.done(f"{url}; use it with: sdseg predict scans/ --model {name} --out masks/")


def _send(folder: Path, card: str, name: str, *, private: bool) -> str:
    """Make the repository if there is none, and send model and card in one commit."""
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [CommitOperationAdd(CARD, card.encode())]
    operations += [
        CommitOperationAdd(path.relative_to(folder).as_posix(), path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != CARD
    ]
    api = HfApi()
    try:
        url = api.create_repo(name, private=private or None, exist_ok=True)
        if private:
            _refuse_public(name, public=not api.repo_info(name).private)
        api.create_commit(name, operations, commit_message="Model trained with sdseg")
    except SdsegError:
        raise
    except Exception as error:  # the client raises its own kinds and those of two HTTP libraries
        raise ModelError(_refusal(name, error)) from error
    return str(url)


def _refuse_public(name: str, *, public: bool) -> None:
    if public:  # it was there before, and making it again changes nothing about it
        raise UsageError(
            f"push: {name} exists and is public, and --private was asked for. Nothing was sent. Make it "
            "private on the hub, or choose another NAME."
        )


def _refuse_local_reference(folder: Path) -> None:
    """A model that refers to an autoencoder on this machine is of no use elsewhere, and tells its path."""
    content = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    place = (content.get("autoencoder_reference") or {}).get("location")
    if place is not None and (Path(place).is_absolute() or Path(place).exists()):
        raise UsageError(
            f"push: this model refers to the autoencoder in {place}, which nobody else has. Train it again "
            "with train.embed_autoencoder=true, or with a hub id as model.autoencoder. Nothing was sent."
        )


def _shared_recipe(text: str) -> str:
    """The recipe without the folders of this machine: of an absolute path only the last part is told."""
    return re.sub(r"(?m)(?<=: )/\S*/(?=\S+$)", ".../", text)


def _refusal(name: str, error: Exception) -> str:
    """What the hub's answer means and what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        reason, remedy = "the hub does not know you", "Log in with `hf auth login`, or set HF_TOKEN"
    elif status == 403:
        reason = f"your token may not write to {name}"
        remedy = "Use a token with write access, or another OWNER"
    elif status == 404:
        reason, remedy = f"there is no {name}, or you may not see it", "Check OWNER and the token"
    elif status is not None:
        reason, remedy = f"the hub answered {status}", "Try again later"
    else:
        text = str(error).strip().splitlines() or [type(error).__name__]
        reason, remedy = (
            f"sending failed ({type(error).__name__}: {text[0]})",
            "Check the network, HF_HUB_OFFLINE and HF_ENDPOINT",
        )
    return f"push: {reason}. {remedy}. --dry-run needs neither network nor token."


def model_card(run: RunDirectory, name: str) -> str:
    """Write the card of a run as Markdown with the hub's metadata above it; what is unknown says so."""
    from huggingface_hub import ModelCard, ModelCardData

    fields = run.read_run_json()
    dataset = fields.get("dataset")
    dataset = dataset if isinstance(dataset, Mapping) else {}
    splits = dataset.get("splits")
    counts = (
        ", ".join(f"{key} {value}" for key, value in splits.items()) if isinstance(splits, Mapping) else ""
    )
    metadata = ModelCardData(
        license="other",  # that of the data binds the weights, and the hub has no word for it
        library_name="diffusers",
        pipeline_tag="image-segmentation",
        tags=["medical", "sdseg", "latent-diffusion"],
    )
    text = f"""# {name.split("/")[1]}

A medical image segmentation model trained with sdseg {fields.get("versions", {}).get("sdseg", "")}.
Recipe `{fields.get("recipe", "unknown")}`, {fields.get("steps", "unknown")} steps,
seed {fields.get("seed", "unknown")}.

**Not a medical device.** For research only: not for diagnosis, treatment or any other clinical decision.
Images unlike those it was trained on may be segmented badly without a sign of it.

## Data

- dataset: {dataset.get("name", "unknown")}, fingerprint `{dataset.get("fingerprint", "unknown")}`
- slices in each split: {counts or "unknown"}
- classes: {", ".join(map(str, dataset.get("classes") or ["unknown"]))}
- licence of the data: {_data_licence(dataset)}

## Scores

{_scores(run)}

## Use

```
sdseg predict scans/ --model {name} --out masks/
```

```python
from huggingface_hub import snapshot_download
from sdseg_cli import SDSegPipeline

pipeline = SDSegPipeline.from_pretrained(snapshot_download("{name}"))
```

## Licence

The code of sdseg is under Apache-2.0. The terms of the data above may bind the use of these weights too.

## Citation

Lin et al., Stable Diffusion Segmentation for Biomedical Images with Single-step Reverse Process, MICCAI 2024,
arXiv 2406.18361.

## Recipe

```yaml
{_shared_recipe(run.recipe_file.read_text(encoding="utf-8").strip())}
```
"""
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}"))


def _data_licence(dataset: Mapping[str, Any]) -> str:
    """As the manifest states it; unknown where the dataset is gone or no longer the same."""
    try:
        manifest = PreparedDataset.open(str(dataset.get("path"))).manifest
    except SdsegError:
        return "unknown: the dataset is not at hand"
    if manifest.fingerprint != dataset.get("fingerprint"):
        return "unknown: the dataset has changed since"
    return manifest.licence or "not stated"


def _scores(run: RunDirectory) -> str:
    """A table of the run's evaluations, or that there is none."""
    rows = []
    for path in sorted(run.evaluation.glob(f"*/{SUMMARY_FILE}")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if not _is_of_this_run(content, run):
                continue
            for class_name, entry in content["classes"].items():
                for metric, label in (("dice", "Dice"), ("iou", "IoU")):
                    value = entry["metrics"][metric]
                    cells = [_decimals(value[key]) for key in ("mean", "low", "high")]
                    interval, count = f"{cells[1]} to {cells[2]}", str(value["n"])
                    names = (path.parent.name, class_name, label)
                    rows.append(
                        "| " + " | ".join((*names, cells[0], interval, count, content["convention"])) + " |"
                    )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} cannot be read ({type(error).__name__}). Evaluate again.") from error
    if not rows:
        return "Not evaluated."
    titles = ("Split", "Class", "Metric", "Mean", "95 % interval", "Cases", "Empty masks")
    head = f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}"
    return "\n".join([head, *rows])


def _is_of_this_run(content: Mapping[str, Any], run: RunDirectory) -> bool:
    """Whether scores are the model's own on the data it belongs to: no other dataset, no other decoder."""
    trained_on = run.read_run_json().get("dataset") or {}
    scored_on = content.get("dataset") or {}
    other = scored_on.get("fingerprint") not in (None, trained_on.get("fingerprint"))
    return not other and "decoder" not in (content.get("sampling") or {})


def _decimals(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"

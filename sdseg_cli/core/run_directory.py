"""The run directory: the one place that names and writes the files of a training.

::

    runs/kseg-fast-20260131-120000/
      recipe.yaml       the resolved recipe, every default written out
      run.json          status, command, versions, seeds, dataset, times
      metrics.jsonl     one JSON object a line
      checkpoints/step-000500/
      model/            the exported model (a diffusers pipeline folder)
      validation/  tensorboard/  evaluation/  stability/

Files are written beside their place and renamed, so that none is ever half-written under its final name.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from filelock import FileLock, Timeout

from sdseg_cli import __version__
from sdseg_cli.core.errors import DataError, UsageError
from sdseg_cli.core.files import EXPORT_FILE, refuse_unwritable, write_whole

if TYPE_CHECKING:
    from sdseg_cli.core.recipe import Recipe

Status = Literal["running", "finished", "interrupted", "failed"]

RUNS_ROOT = Path("runs")
LIBRARIES = ("torch", "diffusers", "accelerate", "datasets", "timm", "torchvision", "numpy")

_CHECKPOINT = re.compile(r"step-(\d{6,})")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHT_FILES = (".ckpt", ".pt", ".pth", ".safetensors", ".bin")


# Whole files and folders ----------------------------------------------------------------------------


def atomic_write(path: Path, payload: bytes | str) -> None:
    """Write a file so that it is either the old one or the new one, whole; folders are made.

    Args:
        path: the final name.
        payload: bytes, or text to be written as UTF-8.

    Raises:
        OSError: the disk is full or the folder cannot be written; ``path`` is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, payload.encode() if isinstance(payload, str) else payload)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON that every reader accepts: NaN becomes null, infinity the string "inf"."""
    return json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and not isinstance(value, str | bytes | int | float | bool):
        return _plain(value.item())
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, float) and math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


# One run --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run below ``root``."""

    root: Path

    @classmethod
    def create(
        cls,
        path: Path | None,
        recipe: Recipe,
        *,
        runs_root: Path = RUNS_ROOT,
        overwrite: bool = False,
    ) -> RunDirectory:
        """Make the folder of a new run with its recipe and a first run.json.

        Args:
            path: the folder; None makes ``runs_root/<recipe's name>-<time>``.
            recipe: written out with every default.
            runs_root: where runs without a path go.
            overwrite: replace an existing run at ``path``; nothing but a run is ever replaced.

        Raises:
            UsageError: the folder exists and may not be replaced, or cannot be made.
        """
        try:
            root = _new_folder(runs_root, recipe.name) if path is None else _claim(path, overwrite)
        except OSError as error:
            raise UsageError(
                f"the run directory {path or runs_root} cannot be made: {error.strerror or error}. "
                "Choose a folder that can be written with --out."
            ) from error
        run = cls(root)
        # First of all files: a run that is killed here is known as one, and may be replaced.
        run.write_run_json(
            status="running",
            recipe=recipe.name,
            created=now(),
            command=sys.argv,
            host=socket.gethostname(),
            versions=library_versions(),
        )
        run.write_recipe(recipe)
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open an existing run.

        Raises:
            UsageError: there is no run at ``path``; the message lists the runs beside it.
        """
        path = Path(path)
        if cls(path).run_file.is_file():
            return cls(path)
        what = "is a folder without run.json" if path.is_dir() else "does not exist"
        others = [run.root.name for run in all_runs(path.parent)]
        close = difflib.get_close_matches(path.name, others, 1, 0.5)
        hint = f" Did you mean {path.parent / close[0]}?" if close else ""
        listed = f" Runs in {path.parent}: {', '.join(others[-5:])}." if others else ""
        raise UsageError(f"run directory {path} {what}.{hint}{listed}")

    @property
    def recipe_file(self) -> Path:
        """The resolved recipe."""
        return self.root / "recipe.yaml"

    @property
    def run_file(self) -> Path:
        """Status, command, versions, times."""
        return self.root / "run.json"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line, in the order of the steps."""
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Holds ``step-000500/`` and so on."""
        return self.root / "checkpoints"

    @property
    def model(self) -> Path:
        """The exported model."""
        return self.root / "model"

    @property
    def validation(self) -> Path:
        """Pictures of each validation."""
        return self.root / "validation"

    @property
    def tensorboard(self) -> Path:
        """The trackers' files."""
        return self.root / "tensorboard"

    @property
    def evaluation(self) -> Path:
        """Scores, a folder for each split."""
        return self.root / "evaluation"

    @property
    def stability(self) -> Path:
        """Stability reports, a folder for each split."""
        return self.root / "stability"

    @property
    def has_model(self) -> bool:
        """Whether a whole model has been exported."""
        return (self.model / "model_index.json").is_file()

    @property
    def status(self) -> Status:
        """What became of the run; one that was killed without a word counts as interrupted."""
        status = self.read_run_json().get("status", "interrupted")
        if status == "running" and not self._is_locked():
            return "interrupted"
        return cast("Status", status)

    def write_recipe(self, recipe: Recipe) -> None:
        """Write the recipe with every default."""
        from sdseg_cli.core.recipe import recipe_to_yaml

        header = f"The resolved recipe of this run (sdseg {__version__}); every default is written out."
        atomic_write(self.recipe_file, recipe_to_yaml(recipe, header=header))

    def read_recipe(self) -> Recipe:
        """Read the run's recipe. Raises RecipeError where it was edited into something unusable."""
        from sdseg_cli.core.recipe import load_recipe

        return load_recipe(self.recipe_file)

    def write_run_json(self, **fields: Any) -> None:
        """Merge fields into run.json; a field that is a mapping replaces the old one."""
        known = self.read_run_json() if self.run_file.is_file() else {}
        atomic_write(self.run_file, to_json({**known, **fields}, indent=2) + "\n")

    def finish(self, status: Status, **fields: Any) -> None:
        """Write how and when the run ended."""
        self.write_run_json(status=status, ended=now(), **fields)

    def read_run_json(self) -> dict[str, Any]:
        """Read run.json.

        Raises:
            DataError: it is missing or damaged.
        """
        try:
            fields = json.loads(self.run_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{self.run_file} cannot be read ({error}). Without it this folder is no run: train again, "
                "or use its model folder directly."
            ) from error
        if not isinstance(fields, dict):
            raise DataError(f"{self.run_file}: found {type(fields).__name__}, expected an object.")
        return fields

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add one line to metrics.jsonl; a line torn by a crash is dropped first."""
        line = to_json(record).encode() + b"\n"
        with self.metrics_file.open("a+b") as file:
            _drop_torn_line(file)
            file.write(line)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl; [] before the first line. A line torn by a crash is left out.

        Raises:
            DataError: a line other than the last is damaged.
        """
        if not self.metrics_file.is_file():
            return []
        text = self.metrics_file.read_bytes().decode("utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]
        records = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise DataError(
                    f"{self.metrics_file}:{number} is damaged: found {line[:40]!r}, expected a JSON object. "
                    "Remove the line."
                ) from error
        return records

    def drop_metrics_after(self, step: int) -> None:
        """Forget the metrics of steps after ``step``, which a resumed run goes through again."""
        kept = [record for record in self.read_metrics() if record.get("step", 0) <= step]
        atomic_write(self.metrics_file, "".join(f"{to_json(record)}\n" for record in kept))

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint after ``step`` optimizer steps."""
        return self.checkpoints / f"step-{step:06d}"

    def all_checkpoints(self) -> list[Path]:
        """The whole checkpoints, oldest first."""
        if not self.checkpoints.is_dir():
            return []
        found = [
            path for path in self.checkpoints.iterdir() if _CHECKPOINT.fullmatch(path.name) and path.is_dir()
        ]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    def latest_checkpoint(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        found = self.all_checkpoints()
        return found[-1] if found else None

    def remove_leftovers(self) -> None:
        """Remove what a killed process left half-written; the caller holds the lock.

        A model that was being replaced at that moment takes its place again.
        """
        for place in (self.root, self.checkpoints):
            for path in place.glob(".*"):
                if path.suffix == ".old" and (path / "model_index.json").is_file() and not self.has_model:
                    path.replace(self.model)
                elif path.suffix in (".partial", ".old"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for this process; the lock ends with the process, however it ends.

        Raises:
            UsageError: another process holds it; the message names that process.
        """
        lock = FileLock(self._lock_file, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise UsageError(
                f"run directory {self.root} is in use by {self._holder()}. Wait for it to end, stop it, or "
                "choose another folder with --out."
            ) from error
        try:
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": now()}
            atomic_write(self._holder_file, to_json(holder) + "\n")
            yield
        finally:
            self._holder_file.unlink(missing_ok=True)
            lock.release()

    @property
    def _lock_file(self) -> Path:
        return self.root / ".lock"

    @property
    def _holder_file(self) -> Path:
        return self.root / ".lock.json"

    def _holder(self) -> str:
        try:
            holder = json.loads(self._holder_file.read_text(encoding="utf-8"))
            return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        except (OSError, ValueError, KeyError):
            return "another process"

    def _is_locked(self) -> bool:
        if not self._lock_file.exists():
            return False
        lock = FileLock(self._lock_file, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return True
        except OSError:
            return False
        lock.release()
        return False


def _drop_torn_line(file: Any) -> None:
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    whole = file.read().rfind(b"\n") + 1
    file.truncate(whole)
    file.seek(whole)


def _new_folder(runs_root: Path, name: str) -> Path:
    runs_root.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"  # noqa: DTZ005  (local time, as its reader's clock)
    for attempt in range(1, 1000):
        root = runs_root / (stem if attempt == 1 else f"{stem}-{attempt}")
        try:
            root.mkdir()
        except FileExistsError:
            continue
        return root
    raise UsageError(f"{runs_root / stem} exists a thousand times. Choose a folder with --out.")


def refuse_taken(path: Path, *, overwrite: bool) -> None:
    """Refuse a folder that a new run may not take: one that holds anything but a run, or a run still in use.

    Raises:
        UsageError: says whose it is and what to do.
    """
    run = RunDirectory(path)
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file, expected a folder for the run. Choose another --out.")
    refuse_unwritable(path, path)
    if path.is_dir() and any(path.iterdir()):
        if not run.run_file.is_file():
            raise UsageError(
                f"{path} holds files that are not a run's; they are left alone. "
                "Choose an empty or new folder."
            )
        if not overwrite:
            raise UsageError(
                f"run directory {path} exists already ({run.status}). Continue it with --resume {path}, "
                "replace it with --overwrite, or choose another --out."
            )
        with run.lock():
            pass


def _claim(path: Path, overwrite: bool) -> Path:
    refuse_taken(path, overwrite=overwrite)
    if path.is_dir() and any(path.iterdir()):
        with RunDirectory(path).lock():
            # run.json goes last: a folder that is left half-emptied by a kill is still known as a run's.
            for entry in sorted(path.iterdir(), key=lambda entry: entry.name == "run.json"):
                if entry.name.startswith(".lock"):
                    continue
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
    path.mkdir(parents=True, exist_ok=True)
    return path


def library_versions() -> dict[str, str | None]:
    """Versions of Python, sdseg and the libraries that a result depends on; imports none of them."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "sdseg": __version__}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def processor_name() -> str:
    """The model of this machine's processor, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "CPU"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "CPU"


# Finding runs and models ----------------------------------------------------------------------------


def all_runs(runs_root: Path = RUNS_ROOT) -> list[RunDirectory]:
    """The runs below a folder, sorted by name."""
    if not Path(runs_root).is_dir():
        return []
    return [RunDirectory(path.parent) for path in sorted(Path(runs_root).glob("*/run.json"))]


def newest_finished_run(runs_root: Path = RUNS_ROOT) -> RunDirectory | None:
    """The finished run that ended last and has a model, or None. Damaged runs are passed over."""
    best: tuple[str, RunDirectory] | None = None
    for run in all_runs(runs_root):
        try:
            fields = run.read_run_json()
        except DataError:
            continue
        if fields.get("status") != "finished" or not run.has_model:
            continue
        ended = str(
            fields.get("ended") or datetime.fromtimestamp(run.run_file.stat().st_mtime, UTC).isoformat()
        )
        if best is None or ended >= best[0]:
            best = (ended, run)
    return best[1] if best else None


@dataclass(frozen=True)
class ModelReference:
    """Where a model is. ``location`` is a folder or a hub id, ``run`` the run it came from, if known."""

    location: str
    run: RunDirectory | None
    description: str


def resolve_model(
    model: str | None, runs_root: Path = RUNS_ROOT, *, option: str = "--model", also: str = ""
) -> ModelReference:
    """Find the model that ``--model`` or an argument means.

    Args:
        model: a run directory, a run's name below ``runs_root``, a model folder, or a hub id
            ``owner/name``; None means the newest finished run.
        runs_root: where to look for runs.
        option: by which it was named, for the messages; empty for an argument.
        also: what else could have been named, for the messages.

    Raises:
        UsageError: there is no such model; the message says how to make one.
    """
    if model is None:
        run = newest_finished_run(runs_root)
        if run is None:
            raise UsageError(_no_run_message(runs_root))
        return _reference_to(run, "the newest finished run")
    path = Path(model).expanduser()
    if not path.exists() and len(path.parts) == 1 and (runs_root / path).is_dir():
        path = runs_root / path
    if path.is_dir():
        return _reference_in(path, f"{option} {path}".strip(), also)
    said = f"{option} {model}".strip()
    if path.suffix.lower() in _WEIGHT_FILES or path.is_file():
        raise UsageError(
            f"{said} is a single file; expected a run directory, a model folder (with "
            "model_index.json) or a hub id (owner/name). An official checkpoint becomes a model folder with: "
            f"sdseg convert {model} --out MODEL_FOLDER"
        )
    is_path = model.startswith((".", "/", "~")) or Path(path.parts[0] if path.parts else ".").exists()
    if _HUB_ID.fullmatch(model) and not is_path:
        return ModelReference(model, None, f"{model} from the hub")
    close = _close_run(path, runs_root)
    raise UsageError(
        f"{said} does not exist.{f' Did you mean {close}?' if close else ''} Give a run directory, a model "
        f"folder (with model_index.json){f', {also}' if also else ''} or a hub id (owner/name)."
    )


def _reference_in(path: Path, said: str, also: str) -> ModelReference:
    if (path / EXPORT_FILE).is_file():
        return ModelReference(str(path), None, f"exported model {path}")
    if (path / "model_index.json").is_file():
        parent = RunDirectory(path.resolve().parent)
        return ModelReference(
            str(path), parent if parent.run_file.is_file() else None, f"model folder {path}"
        )
    run = RunDirectory(path)
    if not run.run_file.is_file():
        raise UsageError(
            f"{said}: the folder holds neither a run (run.json) nor a model (model_index.json). "
            f"Give a run directory, a model folder{f', {also}' if also else ''} or a hub id (owner/name)."
        )
    if not run.has_model:
        raise UsageError(
            f"{said}: the run ({run.status}) has no exported model yet. Continue it with: "
            f"sdseg train --resume {path}"
        )
    return _reference_to(run, "run")


def _reference_to(run: RunDirectory, what: str) -> ModelReference:
    recipe = run.read_run_json().get("recipe", "unknown")
    return ModelReference(str(run.model), run, f"{what} {run.root} (recipe {recipe}, {run.status})")


def _no_run_message(runs_root: Path) -> str:
    unfinished = [run for run in all_runs(runs_root) if run.latest_checkpoint()]
    resume = f" An unfinished run can go on: sdseg train --resume {unfinished[-1].root}" if unfinished else ""
    return (
        f"there is no finished run in {runs_root}{os.sep} to take the model from. Make one with: "
        "sdseg train --recipe kseg-fast (or see a whole round on made-up data: sdseg demo). "
        f"Or name a model: --model RUN, MODEL_FOLDER or owner/name.{resume}"
    )


def _close_run(path: Path, runs_root: Path) -> Path | None:
    """The run whose name is most like that of ``path``."""
    names = {run.root.name: run.root for place in {runs_root, path.parent} for run in all_runs(place)}
    close = difflib.get_close_matches(path.name, sorted(names), 1, 0.5)
    return names[close[0]] if close else None

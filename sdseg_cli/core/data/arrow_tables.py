"""The rows of a prepared dataset on their way to the disk: Arrow files, a split each."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdseg_cli.core.data.prepared import SPLITS

if TYPE_CHECKING:
    import pyarrow

_BATCH_ROWS = 64  # of an arrow file; a prepared slice takes some 150 kB


class Tables:
    """One arrow stream a split, written some rows at a time, then saved as a DatasetDict."""

    def __init__(self, folder: Path) -> None:
        import datasets

        self._folder = folder
        self._features = datasets.Features(
            {
                "case_id": datasets.Value("string"),
                "slice_index": datasets.Value("int32"),
                "group": datasets.Value("string"),
                "image": datasets.Image(),
                "label_map": datasets.Image(),
                "height": datasets.Value("int32"),
                "width": datasets.Value("int32"),
                "spacing_mm": datasets.Sequence(datasets.Value("float64")),
                "crop": datasets.Sequence(datasets.Value("int32")),
            }
        )
        self._writers: dict[str, pyarrow.RecordBatchStreamWriter] = {}
        self._waiting: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}

    def __enter__(self) -> Tables:
        import pyarrow

        self._folder.mkdir()
        schema = self._features.arrow_schema
        self._writers = {
            name: pyarrow.ipc.new_stream(str(self._folder / f"{name}.arrow"), schema) for name in SPLITS
        }
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for split, writer in self._writers.items():
            if self._waiting[split] and kind is None:  # after a failure all of it is thrown away
                self._write(split)
            writer.close()

    def add(self, split: str, row: dict[str, Any]) -> None:
        """Add a slice to a split."""
        # Every batch of a mapped file costs kilobytes of memory: a batch a row would be felt from 10,000 on.
        waiting = self._waiting[split]
        waiting.append(row)
        if len(waiting) >= _BATCH_ROWS:
            self._write(split)

    def _write(self, split: str) -> None:
        import pyarrow

        batch = pyarrow.RecordBatch.from_pylist(self._waiting[split], schema=self._features.arrow_schema)
        self._writers[split].write_batch(batch)
        self._waiting[split] = []

    def save(self, root: Path) -> None:
        """Make the folder of a dataset of what was added, once the context is left."""
        import datasets

        parts = {name: datasets.Dataset.from_file(str(self._folder / f"{name}.arrow")) for name in SPLITS}
        bars_were_on = datasets.utils.logging.is_progress_bar_enabled()
        datasets.disable_progress_bars()  # the console draws, nobody else
        try:
            datasets.DatasetDict(parts).save_to_disk(str(root))
        finally:
            if bars_were_on:
                datasets.enable_progress_bars()
        del parts
        shutil.rmtree(self._folder)

"""Write the training history as TensorBoard events."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from finetune.training.trainer import EpochRow


class EventWriter:
    """Writes the rows of the history to ``run/tensorboard``. Does nothing if ``run`` is None."""

    def __init__(self, run: Path | None) -> None:
        self._writer = None
        if run is not None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self._writer = SummaryWriter(str(run / "tensorboard"))

    def __enter__(self) -> EventWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._writer:
            self._writer.close()

    def write(self, row: EpochRow) -> None:
        if self._writer:
            for name, value in row.items():
                if name != "epoch":
                    split, _, measure = name.partition("_")
                    tag = f"{measure}/{split}" if split in ("train", "valid") else name
                    self._writer.add_scalar(tag, value, int(row["epoch"]))
            self._writer.flush()

"""metrics.csv: one row per logged step, one column per metric, as Lightning's CSVLogger writes it.

TensorBoard and Weights & Biases stand beside it, by Lightning's loggers and with pictures (`live`):

    --trainer.logger TensorBoardLogger --trainer.logger.save_dir runs/demo
    --trainer.logger WandbLogger --trainer.logger.project unspool

CSVLogger begins a new file with every fit and writes a row only every so often. Here a file of an earlier fit is
continued, every row is on disk when it is logged, and a metric that comes later gets a column at the end of all rows.
"""

import csv
import io
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from stage1_tokenizer.training.checkpoint_file import writing
from stage1_tokenizer.training.run_folder import write_atomically


class MetricsFile(Logger):
    """Appends to the CSV file at `path`: step, seconds since 1970, epoch and metrics; cells not logged stay empty.

    Of two rows with the same step, which a resumed fit leaves, the later one holds.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.columns: list[str] = []  # of the file; read when something is logged

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the resolved configuration lies beside the file."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        row = {"step": step, "time": round(time.time(), 2), **{name: float(value) for name, value in metrics.items()}}
        if not self.columns or not set(row) <= set(self.columns):
            rows = read_metrics(self.path)
            self.columns = list(dict.fromkeys([*(name for known in rows for name in known), *self.columns, *row]))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            heading = {name: name for name in self.columns}
            write_atomically(self.path, self.line(heading) + "".join(map(self.line, rows)))
        with writing(self.path), self.path.open("a", newline="") as file:
            file.write(self.line(row))

    def line(self, row: dict[str, Any]) -> str:
        """A row as the file has it."""
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerow([row.get(name, "") for name in self.columns])
        return buffer.getvalue()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a metrics file with what was logged in them; none where there is no file.

    A last row that a killed process left unfinished is not one.
    """
    if not path.is_file():
        return []
    whole = path.read_text().rpartition("\n")[0]
    return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(io.StringIO(whole))]

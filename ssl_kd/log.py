"""What a run says while it works: a progress bar, metrics.jsonl and TensorBoard."""

import json
import math
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from ssl_kd.errors import UserError, reason
from ssl_kd.workdir import is_local

console = Console(highlight=False, soft_wrap=True, markup=False)  # paths and names may hold brackets
"""All that is said to the user; `quiet` on the processes after the first."""


class Metrics:
    """Scalars by step, as JSON lines and TensorBoard events. On resume both are cut back to the restored step.

    Process 0 writes. What an object store is to hold is written on the local disk, and copied there by `flush`.
    """

    def __init__(self, workdir: Path, restored_step: int):
        self.path, self._workdir = workdir / "metrics.jsonl", workdir
        self._writes = jax.process_index() == 0
        try:
            kept = [line for line in self._lines() if self._keep(json.loads(line), restored_step)]
            self._before = json.loads(kept[-1]).get("seconds", 0.0) if kept else 0.0
            self._began = time.monotonic()
            if not self._writes:
                return
            self._desk = None if is_local(workdir) else tempfile.TemporaryDirectory(prefix="ssl_kd-")
            here = Path(self._desk.name) if self._desk else workdir
            here.mkdir(parents=True, exist_ok=True)
            partial = here / "metrics.partial"
            partial.write_text("".join(kept))
            partial.replace(here / self.path.name)
            self._file = (here / self.path.name).open("a")
            self._board = SummaryWriter(str(here / "tensorboard"), purge_step=restored_step + 1)
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({reason(error)}): choose another --workdir.") from error
        except (ValueError, KeyError) as error:
            raise UserError(f"{self.path} is damaged ({error}): remove it; the run itself goes on.") from error

    @staticmethod
    def _keep(line: Mapping[str, float], restored_step: int) -> bool:
        """Final results are written anew by every session that reaches them."""
        return line["step"] <= restored_step and not any(name.startswith("final/") for name in line)

    @property
    def seconds(self) -> float:
        """Time spent on the run, in all its sessions up to their last line."""
        return self._before + time.monotonic() - self._began

    def _lines(self) -> list[str]:
        """Whole lines only: a killed run may have left half of its last."""
        if not self.path.exists():
            return []
        return [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("}\n")]

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line; NaN and infinity become null, which JSON can hold."""
        if not self._writes:
            return
        line: dict[str, float | None] = {"step": step, "seconds": round(self.seconds, 3)}
        line |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path} ({reason(error)}): free space; the run resumes.") from error
        for name, value in values.items():
            if math.isfinite(value):
                self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Puts in the work directory what a checkpoint of this step will rely on.

        Raises:
          UserError: if an object store does not take it.
        """
        if not self._writes:
            return
        self._board.flush()
        if self._desk is None:
            return
        here = Path(self._desk.name)
        for path in (p for p in here.rglob("*") if p.is_file()):
            target = self._workdir / path.relative_to(here).as_posix()
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())
            except Exception as error:  # every store has its own kinds
                raise UserError(
                    f"cannot write {target} ({reason(error)}): the same command resumes the run."
                ) from error

    def close(self) -> None:
        if not self._writes:
            return
        try:
            self.flush()
        finally:
            self._file.close()
            self._board.close()
            if self._desk is not None:
                self._desk.cleanup()


class Meter:
    """How far long work is, what is said of it, and the time left: a live bar on a terminal, a line every few seconds
    elsewhere.

    Args:
      total, start: how much there is to do in all, and how much is done already.
      unit: what is counted.
      said: what is said until the first is done.
    """

    LINE_SECONDS = 10.0

    def __init__(self, total: int, start: int, unit: str, said: str):
        self._live = console.is_terminal
        self._progress = Progress(
            TextColumn(f"{unit} {{task.completed:,}}/{{task.total:,}}"),
            BarColumn(),
            TextColumn("{task.fields[said]}"),
            TimeElapsedColumn(),
            TextColumn("+"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not self._live,
        )
        self._task = self._progress.add_task(unit, total=total, completed=start, said=said)
        self._total, self._unit, self._line = total, unit, 0.0
        self._first = f"{unit} {start:,}/{total:,} · {said}"

    def __enter__(self) -> Self:
        self._progress.start()
        if not self._live:
            console.print(self._first)
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()

    def show(self, done: int, said: str, seconds_left: float) -> None:
        """NaN seconds: unknown yet."""
        if self._live:
            self._progress.update(self._task, completed=done, said=said)
        elif time.monotonic() - self._line > self.LINE_SECONDS or done == self._total:
            self._line = time.monotonic()
            left = "" if math.isnan(seconds_left) else f" · {seconds_left / 60:.1f} min left"
            console.print(f"{self._unit} {done:,}/{self._total:,} · {said}{left}")


class Bar(Meter):
    """Step, images/s, time left, loss and latest probe of a run."""

    def __init__(self, total: int, start: int):
        super().__init__(total, start, "step", "compiling the step …")

    def update(
        self, step: int, *, images_per_second: float, seconds_left: float, loss: float, probed: str = ""
    ) -> None:
        speed = "" if math.isnan(images_per_second) else f"{images_per_second:,.0f} images/s · "
        said = f"{speed}loss {loss:.3f}" + f" · {probed}" * bool(probed)
        self.show(step, said, seconds_left)

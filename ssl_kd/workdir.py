"""Where a run lives: a directory, or a place in an object store, as gs://bucket/run."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import jax
from etils import epath

from ssl_kd.errors import UserError, reason

_appending = threading.Lock()


def work_directory(place: str | os.PathLike[str]) -> Path:
    """The path of a work directory. One in an object store is an epath.Path, which has the methods of a Path that we
    use; nothing else of it may be asked for.

    Raises:
      UserError: for a store that is unknown, cannot be reached, or whose package is not installed.
    """
    text = os.fspath(place)
    if "://" not in text:
        return Path(text)
    try:
        path = epath.Path(text)
        path.exists()  # asks the store: better now than when there is something to write
    except KeyError as error:
        raise UserError(f"{text} is in no store that is known: use gs://, s3:// or az://, or a directory.") from error
    except ImportError as error:
        raise UserError(
            f"{text} needs a package ({reason(error)}): pip install gcsfs for gs://, s3fs for s3://, adlfs for az://."
        ) from error
    except Exception as error:  # every store has its own kinds
        raise UserError(f"{text} cannot be reached ({reason(error)}): check the address and your rights.") from error
    return path


def is_local(workdir: Path) -> bool:
    """Whether files there can grow, be mapped into memory and be renamed at once."""
    return isinstance(workdir, Path)


def append(path: Path, text: str) -> None:
    """Adds to a text file; an object, which cannot grow, is written anew. Raises OSError."""
    if is_local(path):
        with path.open("a") as file:
            file.write(text)
        return
    with _appending:
        path.write_text((path.read_text() if path.exists() else "") + text)


def write_json(path: Path, value: Any, remedy: str = "choose another --workdir or free space") -> None:
    """Writes a file whole or not at all; process 0 does. Raises UserError, with the remedy, where that fails."""
    if jax.process_index():
        return
    partial = path.with_name(f"{path.name}.partial") if is_local(path) else path  # an object appears when it is whole
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(value, indent=2) + "\n")
        if partial != path:
            partial.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({reason(error)}): {remedy}.") from error


def read_json(path: Path) -> Any:
    """Reads what `write_json` wrote; None if there is no such file. Raises UserError if it is damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}): restore the file or choose another --workdir.") from error

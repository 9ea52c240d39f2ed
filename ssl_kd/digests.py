"""What the files of a checkpoint are: orbax loads changed bytes without a word, so they are compared before."""

import json
import zlib
from pathlib import Path

from ssl_kd.errors import reason

DIGESTS = "digests.json"
"""In the folder of a checkpoint, written last: path there → [bytes, CRC-32] of every other file."""


def file_digests(folder: Path, inside: str = "") -> dict[str, tuple[int, int]]:
    """(bytes, CRC-32) of every file in a folder, by its path there, prefixed with `inside`. Raises OSError."""
    found: dict[str, tuple[int, int]] = {}
    for path in folder.iterdir():
        if path.is_dir():
            found |= file_digests(path, f"{inside}{path.name}/")
        elif not path.name.startswith(DIGESTS):
            size = crc = 0
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    size, crc = size + len(block), zlib.crc32(block, crc)
            found[inside + path.name] = size, crc
    return found


def inspect(folder: Path) -> tuple[str, str]:
    """How a checkpoint differs from what was written; and if that cannot be known, why. '' for nothing."""
    try:
        written = {name: tuple(digest) for name, digest in json.loads((folder / DIGESTS).read_text()).items()}
    except FileNotFoundError:
        return "", f"it has no {DIGESTS}, as when its run was killed right after saving"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return "", f"its {DIGESTS} is damaged ({reason(error)})"
    try:
        found = file_digests(folder)
    except OSError as error:
        return f"a file of it cannot be read: {reason(error)}", ""
    for name, digest in written.items():
        if name not in found:
            return f"{name} is missing", ""
        if found[name] != digest:
            return f"{name} has not the bytes that were written", ""
    return "", ""

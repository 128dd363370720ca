"""A file that takes the place of another at once, when it is whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file to write to, which becomes the one at ``path`` when the block ends without an error.

    Until then, and after any error, what stands at ``path`` is as it was, and nothing else is left beside it. A
    symbolic link stays one: what it points to is replaced. The new file has the permissions of any new file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "state")
        ...     with replacing(path) as file:
        ...         written = file.write(b"whole")
        ...         seen = path.exists()
        ...     seen, path.read_bytes()
        (False, b'whole')
    """
    target = Path(os.path.realpath(path))
    # In the same folder, since a rename is atomic only within one file system.
    unfinished = target.with_name(f".paramstate-{secrets.token_hex(8)}.tmp")
    try:
        with unfinished.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else, after a crash, the new name may stand for a file without its bytes
        unfinished.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise
    _make_durable(target.parent)


def _make_durable(folder: Path) -> None:
    """Let a rename in a folder survive a crash, where the system can be asked for that: not all can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

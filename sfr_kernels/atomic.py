"""Files that are written whole or not at all."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial-"  # the prefix of a file while it is written


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into that becomes `path` when the block ends: `path` holds its old content or all of the new,
    even after a crash or a loss of power. OSError naming `path` if there is no room for it; after any error in the
    block the old content stays, and nothing else is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f"{PARTIAL}{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
        if os.name == "posix":  # makes the rename itself survive a loss of power
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except BaseException as error:
        Path(partial).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, f"no room left for {path}") from error
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `data` to `path` through `atomic_file`. Errors as there."""
    with atomic_file(path) as file:
        file.write(data)

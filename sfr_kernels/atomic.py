"""Files that are written whole or not at all."""

import errno
import os
import tempfile
from pathlib import Path

PARTIAL = ".partial-"  # the prefix of a file while it is written


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `data` to `path`, which holds its old content or all of the new, even after a crash or a loss of power.
    OSError naming the file if there is no room for it; the old content stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f"{PARTIAL}{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
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
            raise OSError(error.errno, f"no room left for {path} ({len(data)} bytes)") from error
        raise

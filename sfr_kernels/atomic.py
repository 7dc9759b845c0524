"""Files that are written whole or not at all."""

import errno
import os
import tempfile
from pathlib import Path

PARTIAL = ".partial-"  # what the name of a file that is being written begins with


def write_atomically(path: Path, data: bytes) -> None:
    """`path` holds either what it held or all of `data`, whenever the process ends, also after a loss of power.

    OSError naming the file if there is no room for it; what was there stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f"{PARTIAL}{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
        _sync_folder(path.parent)
    except BaseException as error:
        Path(partial).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, f"no room left for {path} ({len(data)} bytes)") from error
        raise


def _sync_folder(folder: Path) -> None:
    """Makes a rename in the folder survive a loss of power, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

"""Writing files that are whole or not there, and folders that one run has for itself."""

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import PowerQuantConfigError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its name when the block ends, with the permissions of any new file.

    If the block raises, it is removed and `path` is what it was. A link's target is what is written. Raises: OSError, also
    for what is there and is no file
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "there is something that is no regular file", str(path))
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    os.close(descriptor)
    unfinished = Path(name)
    try:
        yield unfinished
        # mkstemp, and safetensors, leave it readable by its owner alone
        unfinished.chmod(0o666 & ~umask())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def sole_use(folder: Path) -> Iterator[None]:
    """Meanwhile no other run may have the folder in this way. The kernel gives it free when the process dies.

    Raises: PowerQuantConfigError if another run has it, or the folder can't be written
    """
    path = folder / ".lock"
    while True:
        try:
            file = path.open("a+")
        except OSError as error:
            raise PowerQuantConfigError(f"cannot write {folder}: {error.strerror}; give one that you may write to") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise PowerQuantConfigError(
                    f"another run is writing {folder} (process {file.read().strip() or 'unknown'}); wait until it is done, "
                    "or give another folder"
                ) from None
            except OSError as error:
                raise PowerQuantConfigError(
                    f"cannot lock {path}: {error.strerror}; give a folder on a disk of this machine"
                ) from None
            # a run that ended between the two lines may have removed the file that is locked now
            if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                continue
            try:
                file.truncate(0)
                print(os.getpid(), file=file, flush=True)
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def umask() -> int:
    """What new files' permissions lack; the system tells it only when it is set."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask

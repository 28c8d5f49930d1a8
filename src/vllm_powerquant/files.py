"""Writing files that are whole or not there."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its name when the block ends, with the permissions of any new file.

    If the block raises, it is removed and `path` is what it was. Raises: OSError
    """
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


def umask() -> int:
    """What new files' permissions lack; the system tells it only when it is set."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask

"""Which weights a checkpoint holds, told from samples of its files: never the whole 141 GB.

Imports :mod:`.safetensors_index` and errors.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from ..errors import CheckpointError
from ..files import check_regular
from .safetensors_index import checkpoint_files

_SAMPLES = 16
_SAMPLE_BYTES = 4096


def fingerprint(folder: Path) -> str:
    """A digest of every weight file's name, size and 16 samples of 4 KiB, its header among them.

    Training changes nearly every weight, so that two fine-tunes of one model differ in nearly
    every sample; the 30 shards of a 70B take 2 MB of reading.

    :raises CheckpointError: no weights, or a file that can't be read.
    """
    files = checkpoint_files(folder) or tuple(sorted(folder.glob("pytorch_model*.bin")))
    if not files:
        raise CheckpointError(f"{folder}: holds no weights")
    found = hashlib.sha256()
    for path in sorted(files):
        try:
            check_regular(path)
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                found.update(f"{path.name} {size}\n".encode())
                for number in range(_SAMPLES):
                    file.seek(number * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                    found.update(file.read(_SAMPLE_BYTES))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return found.hexdigest()[:16]

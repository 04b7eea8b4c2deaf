"""The CUDA worker as a file to run: ``python -u .../machine/cuda_main.py``.

``python -m`` puts the current folder first on ``sys.path``, where a ``random.py`` of somebody's own
would be what torch imports. A file's own folder is put there instead, and taken off again here. The
package is the one that this file is part of, wherever the interpreter would find another.

Imports the standard library only.
"""

from __future__ import annotations

import os
import sys


def _load_package(folder: str) -> None:
    """``pytest_multigpu`` of that folder, which needs not be on ``sys.path``."""
    from importlib.util import module_from_spec, spec_from_file_location

    init = os.path.join(folder, "__init__.py")
    spec = spec_from_file_location("pytest_multigpu", init, submodule_search_locations=[folder])
    assert spec is not None
    assert spec.loader is not None
    package = module_from_spec(spec)
    sys.modules["pytest_multigpu"] = package
    spec.loader.exec_module(package)


if __name__ == "__main__":
    here = os.path.dirname(os.path.realpath(__file__))
    # Absent under PYTHONSAFEPATH; PYTHONPATH and what an installation added stay as they are.
    if sys.path and os.path.realpath(sys.path[0]) == here:
        del sys.path[0]
    _load_package(os.path.dirname(here))
    from pytest_multigpu.machine.cuda_worker import main

    code = main()
    # Skip the interpreter's slow farewell to torch; the driver frees what is left.
    sys.stderr.flush()
    os._exit(code)

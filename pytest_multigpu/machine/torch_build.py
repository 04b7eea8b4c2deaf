"""Which torch is installed and for which CUDA, without importing it.

Imports the standard library only.
"""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path


def read_torch_build() -> tuple[str | None, str | None]:
    """(version, CUDA version) of the installed torch: ``("2.11.0+cu128", "12.8")``.

    The second is None for a CPU build; both are None without torch.
    """
    spec = find_spec("torch")  # finds the package without importing it
    if spec is None or spec.origin is None:
        return None, None
    return parse_version_file(Path(spec.origin).with_name("version.py").read_text())


def parse_version_file(text: str) -> tuple[str | None, str | None]:
    """The constants ``__version__`` and ``cuda`` of torch's ``version.py``."""
    found: dict[str, str | None] = {}
    for node in ast.parse(text).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
            value = node.value.value
            for target in targets:
                if isinstance(target, ast.Name) and (value is None or isinstance(value, str)):
                    found[target.id] = value
    return found.get("__version__"), found.get("cuda")

"""What costs seconds to make, made once: for all processes of a run, and for all bundles that have it in common."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engines.contract import GraphName
from engines.export import run
from engines.manifest import Graph, Manifest


def made_once(folders: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` of this run, which `make` fills in the first of pytest's processes that asks for it."""
    base = folders.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, complete = shared / name, shared / f"{name}.complete"
    folder.parent.mkdir(exist_ok=True)
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that failed at it
            make(folder)
            complete.touch()
    return folder


@contextmanager
def reused_graphs(bundle: Path, out: Path, *names: GraphName) -> Iterator[None]:
    """Exports to `out` take these graphs of `bundle`, whose checkpoint has the same parts, in place of tracing them."""
    graphs = {name: Manifest.load(bundle).graphs[name] for name in names}
    (out / "onnx").mkdir(parents=True, exist_ok=True)
    for path in {file.path for graph in graphs.values() for onnx in graph.onnx.values() for file in onnx.files}:
        shutil.copyfile(bundle / path, out / path)
    real = run.export_graphs

    def export_graphs(*args: Any, known: dict[GraphName, Graph], **options: Any) -> dict[GraphName, Graph]:
        return real(*args, known={**graphs, **known}, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "export_graphs", export_graphs)
        yield

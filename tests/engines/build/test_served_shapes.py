"""A call padded as a server pads it: the same outputs."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest

from engines.backends.onnxruntime import OnnxRuntimeDevice
from engines.build.profiles import Shapes, shapes
from engines.build.served_shapes import ServedShapes
from engines.build.trajectory import GraphRunner
from engines.build.verify import random_case
from engines.contract import PLAIN_STEPS, Arrays, GraphName, TensorSpec
from engines.manifest import Manifest
from tests import ROOT

DEMO = ROOT / "engines" / "demo"
PADDED: tuple[GraphName, ...] = (*PLAIN_STEPS, "decode")


class Padding(OnnxRuntimeDevice):
    """A processor that pads as GPUs do."""

    pads = True


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return Manifest.read(DEMO)


@pytest.mark.parametrize("graph", PADDED)
def test_padding_changes_no_output(manifest: Manifest, graph: GraphName) -> None:
    files = {name: DEMO / "onnx" / f"{name}.onnx" for name in manifest.graphs}
    plain, padding = (GraphRunner(manifest, device(threads=1), files) for device in (OnnxRuntimeDevice, Padding))
    _, inputs = random_case(graph, manifest, shapes(manifest, graph)[0].profile)  # of one image: two rows are bound
    expected, made = plain(graph, inputs), padding(graph, inputs)
    for name, array in expected.items():
        assert made[name].shape == array.shape
        np.testing.assert_allclose(
            made[name].astype(np.float64), array, atol=2e-3 * float(np.abs(array.astype(np.float64)).max())
        )


@pytest.mark.parametrize("graph", PADDED)
def test_a_profile_takes_every_input(manifest: Manifest, graph: GraphName) -> None:
    for made in shapes(manifest, graph):
        for inputs in random_case(graph, manifest, made.profile):
            served = ServedShapes(manifest, graph, inputs).inputs
            assert any(_takes(one, manifest.graphs[graph].inputs, served) for one in shapes(manifest, graph))


def _takes(profile: Shapes, specs: Iterable[TensorSpec], inputs: Arrays) -> bool:
    ranges = [(inputs[spec.name].shape, *profile.of(spec)) for spec in specs]
    return all(
        low <= size <= high
        for given, least, _best, largest in ranges
        for size, low, high in zip(given, least, largest, strict=True)
    )

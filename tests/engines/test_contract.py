"""One contract of the graphs' inputs: declared once, with a neutral value, and followed everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from engines import contract
from engines.build.profiles import shapes
from engines.build.trajectory import Trajectory
from engines.build.verify import random_case
from engines.contract import (
    GRAPHS,
    OUTPUTS,
    STEPS,
    Array,
    Arrays,
    GraphName,
    Port,
    TensorSpec,
    build_inputs,
    inputs_of,
    random_values,
    sizes_of,
)
from engines.export.modules import Denoise, ShallowDenoise
from engines.export.trace import Traced, dynamic_shapes
from engines.manifest import Manifest, Profile
from tests import ROOT
from tests.support.contracts import with_inputs

SIZES = dict.fromkeys("SCLBRPNnhwHWcfTDVEQAGUZ", 3)
OPTIONAL = ("guidance_embedded", "ids_2", "text_embeds", "time_ids", "mask")
ROW_SCALE = Port("row_scale", "float32", ("R", 2), role="plan", fill=1)
POOLED = Port("pooled", "float32", ("C", "D"), role="pool")


@pytest.fixture(scope="module")
def bundle() -> Path:
    return ROOT / "engines" / "demo"


@pytest.fixture(scope="module")
def manifest(bundle: Path) -> Manifest:
    return Manifest.read(bundle)


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_input_that_is_not_given_is_neutral(graph: GraphName) -> None:
    ports = inputs_of(graph, OPTIONAL)
    made = build_inputs(ports, SIZES)
    assert list(made) == [port.name for port in ports]
    for port in ports:
        assert made[port.name].dtype == np.dtype(port.dtype)
        assert made[port.name].shape == port.shape(SIZES)
        assert (made[port.name] == port.fill).all()


@pytest.mark.parametrize(
    ("name", "array", "words"),
    [
        ("slots", np.zeros(3, np.int64), "no input slots: the inputs are state, slot"),
        ("slot", np.zeros(3, np.int32), r"slot is int32 \[3\]: it must be int64 \[3\], \[n\]"),
        ("slot", np.zeros((3, 1), np.int64), r"slot is int64 \[3, 1\]: it must be int64 \[3\]"),
        ("state", np.zeros((3, 5, 3, 3, 4), np.float32), r"must be float32 \[3, 5, 3, 3, 3\], \[S, 5, c, h, w\]"),
    ],
)
def test_what_is_given_is_checked(name: str, array: Array, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_inputs(inputs_of("decode"), SIZES, {name: array})


def test_a_dimension_without_a_size_is_named() -> None:
    with pytest.raises(ValueError, match="dimension n of slot"):
        build_inputs(inputs_of("decode"), {dim: size for dim, size in SIZES.items() if dim != "n"})


def test_random_values_stay_within_their_bounds() -> None:
    make = random_values(np.random.default_rng(0))
    made = build_inputs(inputs_of("denoise"), {**SIZES, "S": 9, "R": 50}, make=make)
    assert len(set(made["slot"])) == 3, "no slot takes a step twice at once"
    assert made["slot"].max() < 9
    assert set(made["row_image"]) == {0, 1, 2}
    assert 0 <= made["timestep"].min() < made["timestep"].max() < 1000
    assert made["state"].std() > 0.5


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec("slot", "int64", ("B", 1)),
        TensorSpec("slot", "int32", ("B",)),
        TensorSpec("slot", "int64", ("R",)),
        TensorSpec("slot", "int64", (4,)),
        TensorSpec("slots", "int64", ("B",)),
    ],
)
def test_a_spec_of_another_name_type_or_shape_does_not_match(spec: TensorSpec) -> None:
    (slot,) = (port for port in inputs_of("denoise") if port.name == "slot")
    assert slot.matches(TensorSpec("slot", "int64", ("B",)))
    assert not slot.matches(spec)


def test_graphs_match_the_ports_they_were_exported_from(manifest: Manifest) -> None:
    for name, graph in manifest.graphs.items():
        for port, spec in zip(inputs_of(name), graph.inputs, strict=True):
            assert port.matches(spec)
            assert port.spec(manifest.dims(manifest.resolutions[0]) | {"V": 1, "E": 1}) == spec


# An input that is declared, and nothing else


@pytest.fixture
def _declared(monkeypatch: pytest.MonkeyPatch) -> None:
    for graph in STEPS:
        monkeypatch.setitem(contract.INPUTS, graph, (*contract.INPUTS[graph], ROW_SCALE, POOLED))


@pytest.mark.usefixtures("_declared")
def test_a_declared_input_is_exported(manifest: Manifest) -> None:
    class Declared(Denoise):
        def __init__(self) -> None:
            super(Denoise, self).__init__()

    class DeclaredShallow(ShallowDenoise):
        def __init__(self) -> None:
            super(Denoise, self).__init__()

    for module in (Declared(), DeclaredShallow()):
        traced = Traced(module, SIZES, manifest.latent)
        inputs = traced.random_inputs()
        assert inputs["row_scale"].shape == (3, 2)
        assert inputs["pooled"].shape == (3, 3)
        assert TensorSpec("row_scale", "float32", ("R", 2)) in traced.inputs
        assert TensorSpec("pooled", "float32", ("C", 3)) in traced.inputs
        dynamic = dynamic_shapes(module.inputs, manifest.latent)
        assert list(dynamic["row_scale"]) == [0]
        assert list(dynamic["pooled"]) == [0]


@pytest.mark.usefixtures("_declared")
def test_a_declared_input_is_in_trajectories_verification_and_profiles(manifest: Manifest, bundle: Path) -> None:
    declared = with_inputs(manifest, ROW_SCALE, POOLED)
    trajectory = Trajectory(declared, bundle, steps=2)

    def zeros(graph: GraphName, inputs: Arrays) -> dict[str, Array]:
        sizes = sizes_of(inputs_of(graph), {name: array.shape for name, array in inputs.items()})
        return build_inputs(OUTPUTS[graph], {**declared.dims(trajectory.size), **sizes})

    recording = trajectory.run(zeros)
    profile = Profile(size=declared.resolutions[0], batch=4)
    width = declared.context.width
    recorded_steps: dict[GraphName, Sequence[Arrays]] = {
        "denoise": recording.full,
        "denoise_shallow": recording.shallow,
    }
    for graph, recorded in recorded_steps.items():
        assert recorded
        for inputs in recorded:
            np.testing.assert_array_equal(inputs["row_scale"], np.ones((2, 2)))
            np.testing.assert_array_equal(inputs["pooled"], np.zeros((2, width)))
        batch, first = random_case(graph, declared, profile)
        assert (batch["row_scale"].shape, first["row_scale"].shape) == ((4, 2), (1, 2))
        assert batch["pooled"].shape == first["pooled"].shape == (4, width)
    specs = {spec.name: spec for spec in declared.graphs["denoise"].inputs}
    assert shapes(declared, "denoise")[0].of(specs["row_scale"]) == ((2, 2), (2, 2), (2, 2))

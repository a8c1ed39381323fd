"""What LoRAs cost is counted from the graphs, and timed in turns with steps of the plain graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.lora import __main__ as lora_bench
from benchmarks.lora.graphs import count_graphs, row_bytes
from benchmarks.lora.report import named
from benchmarks.lora.results import LoraResults, StepTimes
from benchmarks.lora.steps import cases_of, ranks_per_row, step_inputs
from engines.demo.pictures import HERE as DEMO
from engines.manifest import LoraCapacity, Manifest, Size

CAPACITY = LoraCapacity(slots=8, rank=64)


def test_every_case_fits_the_pool() -> None:
    cases = cases_of(CAPACITY, loras=(1, 4, 8), ranks=(4, 64, 128), images=8)
    assert cases == [(4,), (4,) * 4, (4,) * 8, (64,), (64,) * 4, (64,) * 8]
    mixed = cases_of(CAPACITY, loras=(1, 4), ranks=(4, 16), images=8)[-1]
    assert mixed == (4, 16, 4, 16)
    assert max(map(len, cases_of(CAPACITY, loras=(1, 4, 8), ranks=(4,), images=4))) == 4


def test_ranks_are_padded_where_calls_are_captured() -> None:
    assert ranks_per_row((4, 16), CAPACITY, pads=False) == 16
    assert ranks_per_row((4, 16), CAPACITY, pads=True) == 32
    assert ranks_per_row((64,), CAPACITY, pads=True) == 128


def test_a_ratio_is_of_steps_of_the_same_round() -> None:
    plain = StepTimes(ranks=(), rounds=((1.0, 1.0), (10.0, 10.0), (1.0,)))
    ours = StepTimes(ranks=(4,), rounds=((1.5, 1.5), (15.0, 15.0), (9.0,)))
    assert ours.ratio(plain) == 1.5


def test_each_lora_has_ranks_of_its_own(lora_bundle: Path) -> None:
    manifest = Manifest.read(lora_bundle)
    inputs = step_inputs(manifest, Size(width=32, height=32), images=3, ranks=(2, 4))
    index, weight = inputs["row_lora"], inputs["lora_weight"]
    assert index.shape == weight.shape == (6, 4)
    assert np.count_nonzero(weight, axis=1).tolist() == [2, 2, 4, 4, 0, 0]
    used = [set(index[row][weight[row] > 0]) for row in range(4)]
    assert used[0] == used[1] == {0, 1}
    assert used[2] == used[3] == {2, 3, 4, 5}


def test_the_graph_gathers_what_the_layout_says(lora_bundle: Path) -> None:
    """The bytes are those of nodes that ran, the operations of down and up at every layer, by rank."""
    counted = count_graphs(lora_bundle, Size(width=32, height=32), (2, 4))
    two, four = (one.counts for one in counted.ranks)
    manifest = Manifest.read(lora_bundle)
    assert two.gathered == row_bytes(manifest, 2)
    assert four.gathered == row_bytes(manifest, 4) == 2 * two.gathered
    assert counted.plain.gathered == 0
    added = four.flops - counted.plain.flops
    assert added == 2 * (two.flops - counted.plain.flops)
    assert added >= 2 * row_bytes(manifest, 4) / 2  # each factor is used at least once
    assert counted.plain.nodes < two.nodes == four.nodes


def test_a_bundle_is_measured(lora_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "lora.json"
    few = ["--loras", "1", "--loras", "2", "--rank", "8", "--images", "2", "--rounds", "2", "--steps", "1"]
    backends = ["--backend", "onnxruntime", "--backend", "openvino", "--backend", "tensorrt"]
    command = ["--out", str(out), "--bundle", str(lora_bundle), *few, *backends, "--threads", "1"]
    assert lora_bench.main(command) == 0
    found = LoraResults.model_validate_json(out.read_bytes())
    assert [timed.backend for timed in found.timed] == ["onnxruntime", "openvino"]
    for timed in found.timed:
        assert [steps.ranks for steps in timed.steps] == [(), (8,), (8, 8)]
        assert all(seconds > 0 for steps in timed.steps for one in steps.rounds for seconds in one)
    (note,) = found.notes
    assert note.startswith("tensorrt: ")
    shown = " ".join(capsys.readouterr().out.split())
    assert named((8, 8)) in shown
    assert "not yet measured on a GPU" in shown


def test_a_bundle_without_graphs_for_loras_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lora_bench.main(["--out", str(tmp_path / "lora.json"), "--bundle", str(DEMO)]) == 1
    assert "build it with --lora-slots" in capsys.readouterr().err
    assert lora_bench.main(["--out", str(tmp_path / "lora.json")]) == 1
    assert "either a --bundle or a --model" in capsys.readouterr().err

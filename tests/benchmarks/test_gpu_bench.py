"""The benchmark's own numbers, the policy it compares with, and one short run of it over the demo bundle."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import models
from benchmarks.gpu import __main__ as gpu_bench
from benchmarks.gpu import stages, torch_bench
from benchmarks.gpu.bench import GpuBench
from benchmarks.gpu.figures import (
    POLICIES,
    Batch,
    Figures,
    FullSteps,
    Latencies,
    Peak,
    Quantiles,
    Rows,
    ServedLoad,
    Serving,
    alone,
    rate,
)
from benchmarks.gpu.measure import measure_decoding, measure_loras
from benchmarks.gpu.options import GpuBenchCommand
from benchmarks.gpu.report import lines, table
from benchmarks.gpu.results_file import STAGES, GpuResults, ResultsFile, StageResult, pytorch_at, slug, trace_name
from benchmarks.gpu.stages import measure_batches, measure_engine
from benchmarks.inprocess import Served
from benchmarks.models import BenchmarkModel
from benchmarks.policies import SwitchablePolicy
from benchmarks.spans import (
    TraceSpan,
    by_overlap,
    host_per_step,
    idle_share,
    inside,
    read_trace,
    rows_of,
    steps_in,
    waiting_share,
)
from engines.build import api
from engines.demo import BUNDLE as DEMO
from engines.errors import EngineError
from engines.manifest import Manifest, NoiseSchedule, Size
from engines.schedulers import Scheduler
from engines.schedulers import table as scheduler_table
from loadtest.analysis.statistics import Spread, goodput, percentile
from loadtest.arrivals import poisson
from loadtest.provenance import Environment, Run
from server.requests.params import GenerationParams
from server.requests.request import Request
from server.requests.tokenizer import Prompt
from server.runtime.batching.batcher import Batcher

SHORT = ["--steps", "2,4", "--runs", "2", "--seconds", "0.3", "--serve-seconds", "0.5", "--threads", "1"]


# --- who comes when


def test_arrivals_are_a_poisson_process() -> None:
    """Its gaps are exponential: as wide on average as their standard deviation."""
    arrivals = poisson(rate=50, seconds=200, steps=(20, 50), seed=1)
    gaps = np.diff([arrival.at for arrival in arrivals])
    assert len(arrivals) == pytest.approx(10_000, rel=0.05)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert 0 < arrivals[0].at < arrivals[-1].at < 200


def test_steps_are_drawn_evenly() -> None:
    counts = np.bincount([arrival.steps for arrival in poisson(rate=50, seconds=200, steps=(20, 23), seed=1)])
    assert not counts[:20].any()
    assert counts[20:] == pytest.approx(counts.sum() / 4, rel=0.1)


def test_a_seed_gives_the_same_callers_at_every_rate() -> None:
    calm, busy = (poisson(rate=rate, seconds=100 / rate, steps=(1, 9), seed=7) for rate in (2, 8))
    assert [arrival.steps for arrival in calm] == [arrival.steps for arrival in busy]
    assert [arrival.at for arrival in calm] == pytest.approx([4 * arrival.at for arrival in busy])
    assert poisson(rate=2, seconds=50, steps=(1, 9), seed=8) != calm


# --- numbers of numbers


def test_percentiles_lie_between_values() -> None:
    assert [percentile([4.0, 1.0, 3.0, 2.0], q) for q in (0, 50, 100)] == [1.0, 2.5, 4.0]


def test_goodput_counts_what_came_in_time() -> None:
    assert goodput([1.0, 2.0, 3.0], [1.0, 1.9, 5.0], seconds=4) == 0.5


def test_a_lone_picture_takes_a_line_s_time() -> None:
    assert alone({50: 5.5, 20: 2.5}, 30) == pytest.approx(3.5)


def test_a_rate_is_counted_between_the_first_and_the_last() -> None:
    assert rate([3.0, 3.5, 4.0]) == 2
    assert [rate(moments) for moments in ([], [1.0], [1.0, 1.0])] == [0, 0, 0]


# --- what a trace says

SPANS = (
    TraceSpan("executor", "plan", 0.0, 0.1),
    TraceSpan("executor", "launch", 0.1, 0.2),
    TraceSpan("steps", "step, 4 rows", 1.0, 2.0),
    TraceSpan("steps", "step, 4 rows", 2.5, 3.5),
    TraceSpan("executor", "wait", 3.0, 3.5),
    TraceSpan("decode", "decode, 1", 3.2, 3.4),
    TraceSpan("executor", "launch", 3.5, 3.7),
    TraceSpan("executor", "complete", 3.7, 3.8),
    TraceSpan("steps", "step, 2 rows", 3.5, 5.0),
)


def test_a_device_is_idle_between_its_steps() -> None:
    assert idle_share(steps_in(SPANS)) == pytest.approx(0.5 / 4)
    assert idle_share(steps_in(SPANS)[:1]) is None


def test_steps_that_overlap_leave_no_gap() -> None:
    assert idle_share([TraceSpan("steps", "step", 0, 2), TraceSpan("steps", "step", 1, 3)]) == 0


def test_the_host_s_work_is_shared_by_its_launches() -> None:
    assert host_per_step(SPANS) == pytest.approx((0.1 + 0.1 + 0.2 + 0.1) / 2)
    assert host_per_step(steps_in(SPANS)) is None
    assert waiting_share(SPANS, (0, 5)) == pytest.approx(0.1)


def test_steps_that_overlap_a_decode_are_told_apart() -> None:
    assert by_overlap(SPANS) == ([1.0, 1.5], [1.0])


def test_a_window_leaves_out_what_crosses_its_edges() -> None:
    assert [rows_of(step) for step in inside(steps_in(SPANS), (2.0, 5.0))] == [4, 2]


def test_a_trace_is_read_as_the_server_writes_it(tmp_path: Path) -> None:
    names = [{"ph": "M", "tid": 0, "args": {"name": "executor"}}, {"ph": "M", "tid": 1, "args": {"name": "steps"}}]
    events = [
        {"ph": "X", "tid": 1, "name": "step, 4 rows", "ts": 2e6, "dur": 5e5},
        {"ph": "X", "tid": 0, "name": "plan", "ts": 1e6, "dur": 1e6},
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": names + events}))
    assert read_trace(path) == (TraceSpan("executor", "plan", 1.0, 2.0), TraceSpan("steps", "step, 4 rows", 2.0, 2.5))


# --- request-level batching


def request(name: str, *, steps: int) -> Request:
    nothing, scheduler = Prompt("", ()), Scheduler("euler")
    params = GenerationParams(nothing, nothing, Size(width=64, height=64), scheduler, steps, 7.5, (0,))
    return Request(params, scheduler_table(scheduler, steps, NoiseSchedule()), (), name)


def taken(batcher: Batcher) -> str:
    """Who takes the next step; the finished leave."""
    batch = batcher.next_batch()
    assert batch is not None
    for item in batch.requests:
        item.advance()
        if item.denoised:
            batcher.leave(item)
    return "".join(item.id for item in batch.requests)


@pytest.mark.parametrize(
    ("by_request", "turns"),
    [(True, ["ab", "ab", "b", "c", "c"]), (False, ["ab", "abc", "bc"])],
    ids=["request", "step"],
)
def test_by_request_newcomers_wait_for_everybody_who_runs(by_request: bool, turns: list[str]) -> None:
    policy = SwitchablePolicy()
    policy.by_request = by_request
    batcher = Batcher(max_waiting=10, line=policy)
    batcher.add("", max_rows=8)
    for item in (request("a", steps=2), request("b", steps=3)):
        batcher.submit(item)
    seen = [taken(batcher)]
    batcher.submit(request("c", steps=2))
    seen += [taken(batcher) for _ in turns[1:]]
    assert seen == turns
    assert (batcher.running, batcher.waiting) == (0, 0)


# --- the record and the table

HERE = Environment(
    device="A GPU",
    compute_capability="9.0",
    gpu={},
    cuda=None,
    processor="",
    cores=1,
    system="",
    python="",
    packages={},
)
serving = partial(Serving, rows=16, capacity=10.0, unloaded={20: 1.0, 50: 2.0}, slo=3.0, seed=0)
found = partial(StageResult, stage="single", model="small", engine="tensorrt", run=0, seconds=1.0)


def book(folder: Path) -> ResultsFile:
    return ResultsFile.open(folder, Run(command="", began="2026-11-23T00:00:00+00:00", environment=HERE))


def latencies(seconds: float) -> Latencies:
    return Latencies(precision="fp16", first=9.0, by_steps={50: Spread(values=(seconds, seconds + 0.2, seconds + 0.1))})


def load(ours: float, theirs: float) -> ServedLoad:
    each = {policy: (seconds,) * 100 for policy, seconds in zip(POLICIES, (ours, theirs), strict=True)}
    return ServedLoad(share=0.8, rate=5.0, seconds=20.0, steps=(20,) * 100, latencies=each)


def options(folder: Path, **changes: Any) -> GpuBenchCommand:
    asked = {"budget": 1000.0, "bundle": DEMO, "backend": ("onnxruntime",), "only": (), "skip_torch": True}
    times = {"runs": 1, "seconds": 0.1, "serve_seconds": 0.1, "serve_rows": 4, "loads": (50,), "slo": 3.0}
    sizes = {"out": folder, "model": (), "steps": (1, 2), "rows": (2, 4), "seed": 0, "threads": 1}
    return GpuBenchCommand(**{**asked, **times, **sizes, **changes})


def bench(folder: Path, **changes: Any) -> GpuBench:
    return GpuBench(options(folder, **changes), book(folder), Console(quiet=True))


def output(record: GpuResults, figure: str) -> list[tuple[str, bool | None]]:
    return [(line.measured, line.met) for line in lines(record) if figure in line.figure]


def test_a_result_is_on_disk_as_soon_as_it_is_there(tmp_path: Path) -> None:
    begun = book(tmp_path)
    begun.put(found(figures=latencies(1.0)))
    again = book(tmp_path)
    assert again.path.name == "a-gpu-2026-11-23.json"
    assert again.record.results == begun.record.results
    assert len(again.record.runs) == 2


def test_a_failure_does_not_replace_what_was_measured(tmp_path: Path) -> None:
    kept = book(tmp_path)
    for note, figures in (("before", None), ("", latencies(1.0)), ("no time", None)):
        kept.put(found(figures=figures, note=note))
    assert [result.figures for result in kept.record.results] == [latencies(1.0)]


def test_a_device_s_name_becomes_a_file_s() -> None:
    assert slug("NVIDIA H200 (SXM)") == "nvidia-h200-sxm"


def test_an_empty_record_claims_nothing() -> None:
    assert [line.measured for line in lines(GpuResults(device="A GPU"))] == ["not measured"]


def test_figures_stand_beside_what_we_aim_at(tmp_path: Path) -> None:
    kept = book(tmp_path)
    kept.put(found(figures=latencies(1.0)))
    assert output(kept.record, "one image, 50") == [("1.10 s (1.00 s to 1.20 s, 3 runs); PyTorch not measured", None)]
    kept.put(found(stage="torch", engine="PyTorch", figures=latencies(5.0)))
    assert output(kept.record, "one image, 50")[-1] == (
        "1.10 s (1.00 s to 1.20 s, 3 runs); 4.64× PyTorch eager",
        None,  # as the target names compiled too
    )
    kept.put(found(stage="compile", engine="PyTorch", figures=latencies(2.0)))
    assert output(kept.record, "one image, 50")[-1] == (
        "1.10 s (1.00 s to 1.20 s, 3 runs); 4.64× PyTorch eager, 1.91× PyTorch compiled",
        True,
    )
    kept.put(found(stage="peak", model="", engine="", figures=Peak(flops=8e14, side=8192, dtype="fp16")))
    assert output(kept.record, "matrix") == [("800 TFLOP/s, 8192×8192", None)]
    assert output(kept.record, "idle") == [("not measured", None)]


def full(rows: int, **changes: Any) -> FullSteps:
    step = Quantiles(count=9, p5=0.009, median=0.01, p95=0.011)
    known = {"rows": rows, "images": 9, "images_per_second": 8.0, "step": step, "step_alone": step}
    times = {"step_overlapping_decode": step, "idle_share": 0.01, "host_per_step": 0.001, "waiting_share": 0.8}
    return FullSteps(**{**known, **times, **changes})


def test_full_steps_stand_beside_the_peak(tmp_path: Path) -> None:
    kept = book(tmp_path)
    kept.put(found(stage="peak", model="", engine="", figures=Peak(flops=447e12, side=8192, dtype="fp16")))
    good = Rows(steps=20, points=(full(2), full(4)), curve={2: 0.02}, left_out=(8,))
    kept.put(found(stage="rows", figures=good))
    assert output(kept.record, "4 rows") == [("8.00 images/s, 10 ms per step, 40% of peak", None)]
    assert output(kept.record, "8 rows") == [("not measured: out of time", None)]
    assert output(kept.record, "idle") == [("1.0% at 2, 1.0% at 4 rows", True)]
    assert [met for _, met in output(kept.record, "host time per step")] == [True]
    assert output(kept.record, "step time with an overlapping") == [
        ("10 ms alone, 10 ms overlapped at 2; 10 ms alone, 10 ms overlapped at 4", None)
    ]
    bad = full(4, idle_share=0.05, host_per_step=0.02)
    kept.put(found(stage="rows", figures=good.model_copy(update={"points": (full(2), bad)})))
    assert [met for figure in ("idle", "host time per step") for _, met in output(kept.record, figure)] == [
        False,
        False,
    ]


def test_each_engine_has_its_own_aim_for_one_image(tmp_path: Path) -> None:
    kept = book(tmp_path)
    kept.put(found(stage="torch", engine="PyTorch", figures=latencies(2.5)))
    for engine in ("onnxruntime_cuda", "tensorrt", "onnxruntime"):
        kept.put(found(engine=engine, figures=latencies(1.0)))
    kept.put(found(stage="compile", engine="PyTorch", figures=latencies(2.0)))
    judged = {line.engine: (line.target, line.met) for line in lines(kept.record) if "one image, 50" in line.figure}
    assert judged["onnxruntime_cuda"] == ("≥ 2× eager", True)
    assert judged["tensorrt"] == ("≥ 4× eager, ≥ 1.5× compiled", False)
    assert judged["onnxruntime"] == ("", None)


@pytest.mark.parametrize(("images", "seconds", "met"), [(30.0, 0.03, True), (28.0, 0.03, False), (30.0, 0.04, False)])
def test_32_rows_are_judged_by_images_and_by_the_peak(images: float, seconds: float, met: bool, tmp_path: Path) -> None:
    """447 GFLOP a row: 32 rows in 30 ms are 477 TFLOP/s."""
    kept = book(tmp_path)
    kept.put(found(stage="peak", model="", engine="", figures=Peak(flops=750e12, side=8192, dtype="fp16")))
    step = Quantiles(count=9, p5=seconds, median=seconds, p95=seconds)
    point = full(32, images_per_second=images, step=step)
    kept.put(found(stage="rows", figures=Rows(steps=20, points=(full(2), point), curve={})))
    assert [line.met for line in lines(kept.record) if line.figure.startswith("32 rows")] == [met]


def batch_of(rows: int, seconds: float) -> Batch:
    return Batch(precision="fp16", rows=rows, steps=20, seconds=Spread(values=(seconds,)), first=9.0, mode="")


def test_full_steps_stand_beside_pytorch_at_as_many_rows(tmp_path: Path) -> None:
    kept = book(tmp_path)
    kept.put(found(stage="rows", figures=Rows(steps=20, points=(full(2), full(4)), curve={})))
    kept.put(found(stage="batch", engine=pytorch_at(4), figures=batch_of(4, 1.0)))
    kept.put(found(stage="compile_batch", engine=pytorch_at(4), figures=batch_of(4, 0.5)))
    kept.put(found(stage="batch", engine=pytorch_at(64), note="The GPU's memory is full."))
    assert output(kept.record, "4 rows, 20 steps")[:2] == [
        ("2.00 images/s; a call 1.00 s (1.00 s to 1.00 s, 1 runs)", None),
        ("4.00 images/s; a call 500 ms (500 ms to 500 ms, 1 runs)", None),
    ]
    (ours,) = [line for line in lines(kept.record) if line.figure.startswith("4 rows")]
    assert ours.measured.endswith("; 4.00× eager at as many rows; 2.00× compiled at as many rows")
    assert output(kept.record, "64 rows") == [("not measured: The GPU's memory is full.", None)]
    assert output(kept.record, "profile") == [("trace-small-tensorrt.json, for Perfetto", None)]


def test_the_table_says_how_sure_each_kind_of_figure_is() -> None:
    caption = str(table(GpuResults(device="A GPU")).caption)
    assert [word in caption for word in ("measured on this device", "stub libraries", "aims")] == [True] * 3


@pytest.mark.parametrize(
    ("ours", "theirs", "met"),
    [(2.9, 3.1, True), (2.0, 2.9, True), (2.5, 2.9, False)],
    ids=["goodput", "p99", "neither"],
)
def test_by_step_has_to_be_clearly_better(ours: float, theirs: float, met: bool, tmp_path: Path) -> None:
    kept = book(tmp_path)
    kept.put(found(stage="serve", figures=serving(loads=(load(ours, theirs),))))
    assert [line.met for line in lines(kept.record) if line.figure.startswith("80% load")] == [met]


def test_an_accepted_latency_grows_with_the_steps() -> None:
    each = dict.fromkeys(POLICIES, (2.0, 5.0, 7.0))
    some = ServedLoad(share=0.8, rate=1.0, seconds=2.0, steps=(20, 50, 50), latencies=each)
    assert serving(loads=(some,)).goodput(some, "by step") == 1.0


# --- stages


def test_what_was_measured_is_measured_again_only_by_name(tmp_path: Path) -> None:
    first = bench(tmp_path)
    first.measure("single", "small", "tensorrt", lambda: latencies(1.0))
    assert not bench(tmp_path).due("single", "small", "tensorrt")
    assert bench(tmp_path).due("rows", "small", "tensorrt")
    assert bench(tmp_path, only=("single",)).due("single", "small", "tensorrt")
    assert not bench(tmp_path, only=("rows",)).due("single", "small", "tensorrt")
    assert not first.due("torch", "small", "PyTorch")


def test_what_no_longer_fits_is_left_out_and_said(tmp_path: Path) -> None:
    hurried = bench(tmp_path, budget=5.0)
    assert not hurried.measure("single", "small", "tensorrt", lambda: latencies(1.0))
    (result,) = hurried.results.record.results
    assert result.figures is None
    assert result.note.startswith("it needs about 20 s")


def test_a_stage_that_fails_leaves_the_others(tmp_path: Path) -> None:
    def fail() -> Figures:
        raise EngineError("The GPU is full.\nAnd more.")

    unlucky = bench(tmp_path)
    assert not unlucky.measure("single", "small", "tensorrt", fail)
    assert unlucky.measure("rows", "small", "tensorrt", lambda: latencies(1.0))
    assert output(unlucky.results.record, "one image")[-1] == ("not measured: The GPU is full.", None)


def test_rows_that_were_left_out_are_measured_by_the_next_call(tmp_path: Path) -> None:
    hurried = bench(tmp_path)
    part = Rows(steps=20, points=(full(2),), curve={}, left_out=(4,))
    hurried.measure("rows", "small", "tensorrt", lambda: part)
    assert bench(tmp_path).due("rows", "small", "tensorrt")
    hurried.measure("rows", "small", "tensorrt", lambda: part.model_copy(update={"left_out": ()}))
    assert not bench(tmp_path).due("rows", "small", "tensorrt")


def test_a_stage_that_breaks_the_executor_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages after it have an executor of their own."""
    opened: list[Served] = []

    class Counted(Served):
        def __enter__(self) -> Counted:
            opened.append(self)
            return super().__enter__()

    def breaks(session: Served, *_rest: Any) -> Figures:
        session._runtime.executor.fail(EngineError("The GPU fell off the bus."))
        session.draw(1)
        raise AssertionError

    monkeypatch.setattr(stages, "Served", Counted)
    monkeypatch.setattr(stages, "measure_single", breaks)
    unlucky = bench(tmp_path)
    measure_engine(unlucky, BenchmarkModel("demo", None, DEMO, given=True), "onnxruntime")
    results = {result.stage: result for result in unlucky.results.record.results}
    assert results["rows"].figures
    assert results["serve"].figures
    assert not results["single"].figures
    assert results["single"].note == "The executor failed: The GPU fell off the bus."
    assert len(opened) == 2
    assert (tmp_path / trace_name("demo", "onnxruntime")).exists()


def test_a_batch_that_is_too_large_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(_checkpoint: Path, rows: int, _options: Any, *, compiled: bool) -> Batch:
        if rows > 2:
            raise EngineError("The GPU's memory is full.")
        return batch_of(rows, 2.0 - compiled)

    monkeypatch.setattr(torch_bench, "measure_batch", measure)
    large = bench(tmp_path, skip_torch=False)
    for stage in ("batch", "compile_batch"):
        measure_batches(large, BenchmarkModel("demo", tmp_path, DEMO, given=True), stage)
    found = {(result.stage, result.engine): result for result in large.results.record.results}
    assert [(found[key].figures is not None, found[key].note) for key in sorted(found)] == [
        (True, ""),
        (False, "The GPU's memory is full."),
    ] * 2


def test_a_plan_tells_the_calls_that_the_budget_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--out", str(tmp_path / "none"), "--model", "small", "sd15", "--plan"]
    assert gpu_bench.main(command) == 0
    shown = capsys.readouterr().out
    seconds = [int(found) for found in re.findall(r"about (\d+) s", shown)]
    assert len(seconds) > 3
    assert max(seconds) <= 540
    for model in ("small", "sd15"):
        for stage in set(STAGES) - {"peak"}:
            assert f"{stage} {model}" in shown
    assert "--plan" not in shown
    assert not (tmp_path / "none").exists()


def test_a_model_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="neither a folder nor one of small, sd15"):
        models.find_model("nowhere", tmp_path)
    assert gpu_bench.main(["--out", str(tmp_path), "--model", "nowhere"]) == 1


@pytest.mark.parametrize("words", [["--only", "rows,nothing"], ["--rows", "2,0"], ["--seconds", "soon"]])
def test_wrong_options_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_bench.main(["--out", "nowhere", *words])
    assert words[0] in capsys.readouterr().err


# --- the models that are made


@pytest.mark.parametrize("model", models.ARCHITECTURES)
def test_the_work_of_a_model_is_counted(model: str) -> None:
    """Without attention's own products, which are batched; on tensors that have shapes and no memory."""
    architecture = models.ARCHITECTURES[model]
    with torch.device("meta"):
        unet, vae = models.make_unet(architecture.layers_per_block), models.make_vae()
        row = operations(lambda: unet(torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 77, 768)))
        decode = operations(lambda: vae.decode(torch.zeros(1, 4, 64, 64)))
    assert architecture.flops.row == pytest.approx(row, rel=0.01)
    assert architecture.flops.decode == pytest.approx(decode, rel=0.01)


def operations(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    by_name = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    return float(sum(count for name, count in by_name.items() if name != "aten.bmm"))


def test_sd15_is_as_large_as_the_real_one() -> None:
    with torch.device("meta"):
        unet = models.make_unet(models.ARCHITECTURES["sd15"].layers_per_block)
    assert sum(weight.numel() for weight in unet.parameters()) == 859_520_964


def test_a_bundle_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[api.CheckpointSource, dict[str, Any]]] = []

    def fake_build(source: api.CheckpointSource, out: Path, **options: Any) -> None:
        calls.append((source, options))
        out.mkdir()
        shutil.copy(DEMO / "manifest.json", out)

    monkeypatch.setattr(api, "build", fake_build)
    rows, mine = Manifest.read(DEMO).rows, BenchmarkModel("mine", tmp_path, tmp_path / "bundle")
    assert not models.is_built(mine, "onnxruntime", rows)
    assert models.build(mine, "onnxruntime", rows).rows == rows
    assert models.is_built(mine, "onnxruntime", rows) == ("onnxruntime" in Manifest.read(DEMO).builds)
    assert not models.is_built(mine, "onnxruntime", (2, 4))
    ((source, options),) = calls
    assert source == api.CheckpointSource(str(tmp_path))
    assert (options["backends"], options["verify"]) == (["onnxruntime"], False)
    assert options["options"] == api.ExportOptions(name="mine", rows=rows)


def test_a_bundle_that_cannot_be_built_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(EngineError, match=r"model_index\.json is missing"):
        models.build(BenchmarkModel("mine", tmp_path / "model", tmp_path / "bundle"), "openvino", (2,))
    assert not (tmp_path / "bundle").exists()


# --- for real


def test_a_run_over_the_demo_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--out", str(tmp_path), "--bundle", str(DEMO), "--backend", "onnxruntime", "--rows", "2,4", *SHORT]
    assert gpu_bench.main([*command, "--skip-torch", "--loads", "80", "--serve-rows", "4"]) == 0
    (path,) = tmp_path.glob("*-20*.json")
    record = GpuResults.model_validate_json(path.read_bytes())
    assert {result.stage for result in record.results if result.figures} == {"build", "rows", "single", "serve"}
    assert [point["rows"] for point in dumped(record, "rows")["points"]] == [2, 4]
    for point in dumped(record, "rows")["points"]:
        assert point["images_per_second"] > 0
        assert point["step"]["count"] > 0
        assert 0 <= point["idle_share"] < 1
        assert point["host_per_step"] is None  # the host is the device
    assert {int(steps): len(spread["values"]) for steps, spread in dumped(record, "single")["by_steps"].items()} == {
        2: 2,
        4: 2,
    }
    (under,) = dumped(record, "serve")["loads"]
    assert {policy: len(under["latencies"][policy]) for policy in POLICIES} == dict.fromkeys(
        POLICIES, len(under["steps"])
    )
    assert all(seconds > 0 for policy in POLICIES for seconds in under["latencies"][policy])
    assert record.runs[0].ended
    assert record.runs[0].environment.packages["numpy"] == np.__version__
    assert "benchmarks.gpu --out" in record.runs[0].command
    shown = capsys.readouterr().out
    assert "latentd-demo" in shown
    assert "not measured: the host is the device" in " ".join(shown.split())
    assert table(record).row_count == len(list(lines(record)))


def dumped(record: GpuResults, stage: str) -> dict[str, Any]:
    """A stage's figures, as they are in the file."""
    (result,) = (result for result in record.results if result.stage == stage)
    assert result.figures is not None
    return result.figures.model_dump()


def test_decoding_is_measured_at_every_priority(tmp_path: Path) -> None:
    demo = BenchmarkModel("demo", None, DEMO, given=True)
    measured = measure_decoding(demo, "onnxruntime", options(tmp_path))
    assert measured.rows == 4
    assert measured.rates.keys() == {"equal", "low", "between"}
    assert min(measured.rates.values()) > 0


def test_steps_with_loras_are_compared_with_plain_ones(lora_bundle: Path, tmp_path: Path) -> None:
    """By a stage of its own: what fails in it costs no other."""
    subject = BenchmarkModel("tiny", None, lora_bundle, given=True)
    short = options(tmp_path, runs=1, serve_rows=4)
    run = bench(tmp_path)
    assert run.measure("lora", "tiny", "onnxruntime", partial(measure_loras, subject, "onnxruntime", short))
    reread = GpuResults.model_validate_json(run.results.path.read_bytes())
    shown = output(reread, "LoRAs at 4 rows")
    assert len(shown) == 2  # the plain graph, and one LoRA of rank 4, the only one of those that fits
    assert shown[0][0].endswith("1.00× the plain one")
    demo = BenchmarkModel("demo", None, DEMO, given=True)
    assert not run.measure("lora", "demo", "onnxruntime", partial(measure_loras, demo, "onnxruntime", short))
    assert output(run.results.record, "steps with LoRAs") == [
        ("not measured: latentd-demo has no graphs for LoRAs: build it with --lora-slots 8.", None)
    ]


def test_pytorch_is_timed_over_a_checkpoint(checkpoint: Path) -> None:
    timed = torch_bench.measure_eager(checkpoint, (1, 2), 2)
    assert {steps: len(spread.values) for steps, spread in timed.by_steps.items()} == {1: 2, 2: 2}


def test_pytorch_is_timed_in_batches(checkpoint: Path, tmp_path: Path) -> None:
    timed = torch_bench.measure_batch(checkpoint, 4, options(tmp_path), compiled=False)
    assert (timed.rows, timed.steps, timed.mode) == (4, 1, "")
    assert len(timed.seconds.values) >= 2
    assert timed.images_per_second == pytest.approx(2 / timed.seconds.median)
    with pytest.raises(EngineError, match="torch finds no GPU"):
        torch_bench.measure_batch(checkpoint, 4, options(tmp_path), compiled=True)


def test_a_batch_without_memory_is_told(monkeypatch: pytest.MonkeyPatch, checkpoint: Path, tmp_path: Path) -> None:
    def full_memory(*_words: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB.")

    monkeypatch.setattr(torch_bench, "_generate", full_memory)
    with pytest.raises(EngineError, match="memory is full: CUDA out of memory"):
        torch_bench.measure_batch(checkpoint, 4, options(tmp_path), compiled=False)


def test_engines_that_do_not_load_are_told_for_each_stage(tmp_path: Path) -> None:
    subject = BenchmarkModel("demo", None, DEMO, given=True)
    unlucky = bench(tmp_path)
    measure_engine(unlucky, subject, "tensorrt_rtx")
    notes = {result.stage: result.note for result in unlucky.results.record.results if result.stage != "build"}
    assert notes.keys() == {"rows", "single", "serve", "decode"}
    assert all(notes.values())


def test_a_lone_picture_is_drawn(tmp_path: Path) -> None:
    with Served(DEMO, "onnxruntime", threads=1, trace=tmp_path / "trace.json") as session:
        assert session.draw(1) > 0
        assert len(steps_in(session.take_spans())) == 1
        assert session.draw(1) > 0  # which is no longer traced


def test_every_stage_has_a_guess_of_its_time(tmp_path: Path) -> None:
    assert all(options(tmp_path).needs(stage) > 0 for stage in STAGES)

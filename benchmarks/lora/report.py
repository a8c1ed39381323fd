"""The tables of a results file, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from rich.table import Table

from benchmarks.lora.results import CountedRank, LoraResults, Ranks, TimedSteps
from loadtest.charts import seconds

_BANDWIDTH = 4.8e12  # bytes per second: an H200's memory, as its maker states
_PASSES = 3  # over what is gathered: it is read, written, and read by the matrix product


def tables(results: LoraResults) -> Iterator[Table]:
    """One of each backend, and one of the graphs."""
    for timed in results.timed:
        yield _timed_table(results, timed)
    if results.graphs:
        yield _graph_table(results)


def _timed_table(results: LoraResults, timed: TimedSteps) -> Table:
    made = Table(title=f"{results.model}, {timed.size}, {timed.rows} rows per step, {timed.device}")
    for heading in ("LoRAs in the step", "ms per step", "of the plain graph's"):
        made.add_column(heading, justify="left" if heading.startswith("LoRAs") else "right")
    plain = timed.steps[0]
    for steps in timed.steps:
        made.add_row(named(steps.ranks), f"{steps.seconds * 1e3:.1f}", f"{steps.ratio(plain):.2f}×")
    return made


def named(ranks: Ranks) -> str:
    """How many LoRAs, and of which ranks."""
    if not ranks:
        return "0: the plain graph"
    kinds = sorted(Counter(ranks))
    return f"{len(ranks)} of rank {_list(kinds)}"


def _list(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def _graph_table(results: LoraResults) -> Table:
    graphs = results.graphs
    assert graphs is not None  # noqa: S101 - the caller has checked it
    made = Table(title=f"{results.model}, {graphs.size}: one row of a step")
    for heading in (
        "LoRA",
        "GFLOP",
        "added",
        "MB gathered",
        "nodes",
        "kernels, CPU",
        "GPU: gathering 16 rows takes at least",
    ):
        made.add_column(heading, justify="left" if heading == "LoRA" else "right")
    plain = graphs.plain
    made.add_row("none", f"{plain.flops / 1e9:.4g}", "", "0", str(plain.nodes), str(plain.kernels), "0")
    for counted in graphs.ranks:
        made.add_row(*_counted(counted, plain.flops))
    made.caption = (
        f"{results.layers} layers; the pool of {results.slots} LoRAs of rank {results.rank} takes "
        f"{results.pool / 2**20:.0f} MiB. GPU: not yet measured on a GPU, but derived: gathered bytes are read, "
        f"written and read again at {_BANDWIDTH / 1e12:.1f} TB/s."
    )
    return made


def _counted(counted: CountedRank, plain: float) -> tuple[str, ...]:
    counts = counted.counts
    least = 16 * counts.gathered * _PASSES / _BANDWIDTH
    return (
        f"rank {counted.rank}",
        f"{counts.flops / 1e9:.4g}",
        f"{counts.flops / plain - 1:+.1%}",
        f"{counts.gathered / 1e6:.3g}",
        str(counts.nodes),
        str(counts.kernels),
        seconds(least),
    )

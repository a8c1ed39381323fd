"""What every graph is exported from."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from engines.contract import GraphName, Port, inputs_of, outputs_of


class GraphModule(nn.Module):
    """A graph's computation. It takes the inputs of the contract by name.

    It returns a tensor, or a tuple of them where there are several outputs.
    """

    graph: ClassVar[GraphName]
    optional: tuple[Port, ...] = ()  # its inputs and outputs that only some models have

    @property
    def inputs(self) -> tuple[Port, ...]:
        return inputs_of(self.graph, [port.name for port in self.optional])

    @property
    def outputs(self) -> tuple[Port, ...]:
        return outputs_of(self.graph, [port.name for port in self.optional])

"""Stand-ins for large weights while a module is traced: of the right shape and type, and without memory."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from engines.checkpoints.loading.mapped import LARGE_WEIGHT, narrow
from engines.contract import Array
from engines.export.graph_module import GraphModule


class StandIns:
    """A copy of a module to trace, whose large weights are stand-ins.

    The exporter only ever transposes what is large, and never copies it: each stand-in is found again by its address.
    """

    def __init__(self, module: GraphModule, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._weights = {name: weight for name, weight in module.named_parameters() if weight.numel() >= LARGE_WEIGHT}
        stand_ins = {name: _stand_in(weight, dtype) for name, weight in self._weights.items()}
        self._names = {stand_in.data_ptr(): name for name, stand_in in stand_ins.items()}
        memo: dict[int, Any] = {id(weight): stand_ins[name] for name, weight in self._weights.items()}
        self.module: GraphModule = deepcopy(module, memo)
        narrow(self.module)
        self.module.to(dtype)

    def replace(self, graph: ir.Graph) -> set[str]:
        """Put the weights in place of the stand-ins; return their names in the graph."""
        found = set[str]()
        for value in list(graph.initializers.values()):
            if value.const_value is None or value.const_value.size < LARGE_WEIGHT:
                continue
            array = value.const_value.numpy()
            name = self._names.get(array.ctypes.data)
            if name is None:
                continue
            is_transposed = _is_transposed(array)
            value.const_value = self._read_late(name, is_transposed=is_transposed)
            wanted = f"{name}.T" if is_transposed else name
            if wanted not in graph.initializers:
                value.name = wanted
            found.add(str(value.name))
        return found

    def _read_late(self, name: str, *, is_transposed: bool) -> ir.TensorProtocol:
        weight, dtype = self._weights[name], self._dtype

        def read() -> ir.TensorProtocol:
            values = weight.detach().to(dtype)
            return ir.tensor(values.T.contiguous() if is_transposed else values)

        shape = ir.Shape(weight.shape[::-1] if is_transposed else weight.shape)
        return ir.LazyTensor(read, ir.tensor(torch.zeros(1, dtype=dtype)).dtype, shape, name=name)


def _stand_in(weight: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """Memory for one value of each row, seen as the whole: strides 1, 0, …, which tell how it was transposed."""
    rows = torch.zeros(len(weight), *[1] * (weight.ndim - 1), dtype=dtype)
    return nn.Parameter(rows.expand(weight.shape), requires_grad=False)


def _is_transposed(array: Array) -> bool:
    return array.ndim == 2 and array.strides[0] == 0

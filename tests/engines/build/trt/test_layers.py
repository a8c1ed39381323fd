"""Layers from the engine inspector's JSON."""

from __future__ import annotations

import json
from typing import Any

from engines.build.trt.layers import inspected_layers, summarize


def test_the_engine_inspectors_layers_are_counted() -> None:
    """TensorRT offers it only with a GPU, so this is an example, with the field names of both versions."""

    def layer(name: str, reads: str, writes: dict[str, str]) -> dict[str, Any]:
        return {"Name": name, "LayerType": "kgen", "Inputs": [{"Name": reads}], "Outputs": [{"Name": "y", **writes}]}

    half, single = {"Datatype": "Half"}, {"Format/Datatype": "Float"}
    first = [layer("__myl_SiluGnor_myl0_1", "x", half), layer("_gemm_mha_v2_myl0_2", "t", half)]
    second = [layer("__myl_Move_myl1_0", "x [profile 1]", single), layer("_gemm_mha_v2_myl1_1", "t", half)]
    table = inspected_layers(json.dumps({"Layers": [*first, *second, "named only_myl1_2"]}))
    assert summarize(table, {"attentions": 1, "group_norms": 1}) == {
        "total": 3,
        "attentions": 1,
        "fused_attentions": 1,
        "group_norms": 1,
        "fused_group_norms": 0,
        "precisions": {"Float": 1, "Half": 1},
    }

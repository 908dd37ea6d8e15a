"""Parts that stay in float32."""

import pytest
import torch
from torch import nn

from anomalib_ot.features.single_precision import SinglePrecisionParts


class Scaled(SinglePrecisionParts):
    single_precision = ("scale", "norm")

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)
        self.register_buffer("scale", torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("outer", [False, True])
def test_named_parts_stay_in_float32_wherever_the_module_is(dtype, outer):
    module = Scaled()
    (nn.Sequential(module) if outer else module).to(dtype)
    assert {name: value.dtype for name, value in module.state_dict().items()} == {
        "layer.weight": dtype,
        "layer.bias": dtype,
        "norm.weight": torch.float32,
        "norm.bias": torch.float32,
        "scale": torch.float32,
    }
    assert [name for name, _ in module.named_buffers()] == ["scale"]


def test_parts_follow_the_module_to_another_device():
    module = Scaled().half().to("meta")
    assert {value.device.type for value in module.state_dict().values()} == {"meta"}
    assert module.scale.dtype == torch.float32

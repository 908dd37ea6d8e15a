"""What exported graphs consist of."""

import pytest
import torch

from anomalib_ot import Duo, Pradot, WtFlow

openvino = pytest.importorskip("openvino")
pytestmark = pytest.mark.slow

SIZE = (96, 96)
# Node types that were looked up in the list of OpenVINO's GPU plugin, src/plugins/intel_gpu/include/intel_gpu/plugin/
# primitives_list.hpp. Look up a new one there before adding it.
ON_GPU = {
    "Add",
    "Clamp",
    "Concat",
    "Constant",
    "Convert",
    "Convolution",
    "Divide",
    "Gather",
    "Greater",
    "GreaterEqual",
    "GroupConvolution",
    "Interpolate",
    "IsNaN",
    "Less",
    "LogicalAnd",
    "LogicalOr",
    "MVN",
    "MatMul",
    "Maximum",
    "Multiply",
    "Parameter",
    "Power",
    "ReduceL2",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "Reshape",
    "Result",
    "Select",
    "ShapeOf",
    "Subtract",
    "Swish",
    "Transpose",
    "Unsqueeze",
}


def pradot():
    model = Pradot(**SMALL, prototypes_per_cell=1)
    features = model.model.extract(torch.rand(4, 3, *SIZE))
    model.model.fit_whitening([features])
    model.model.initialise(features)
    return model


def wt_flow():
    model = WtFlow(**SMALL, width=16)
    model.model.fit_normalization([model.model.extract(torch.rand(4, 3, *SIZE))])
    return model


def duo():
    model = Duo(**SMALL, pradot={"prototypes_per_cell": 1}, wt_flow={"width": 16})
    features = model.model.extract(torch.rand(4, 3, *SIZE))
    model.model.pradot.fit_whitening([features])
    model.model.pradot.initialise(features)
    model.model.wt_flow.fit_normalization([features])
    return model


SMALL = {"backbone": "tf_efficientnet_lite0", "layers": ["blocks.2"], "pre_trained": False, "image_size": SIZE}


@pytest.fixture(scope="module", params=[pradot, wt_flow, duo])
def exported(request, tmp_path_factory):
    """A model and its graph, as exported."""
    model = request.param()
    path = model.to_openvino(tmp_path_factory.mktemp(request.param.__name__), input_size=SIZE)
    return model, openvino.Core().read_model(path)


def test_graph_has_no_node_that_a_gpu_lacks(exported):
    assert {node.get_type_name() for node in exported[1].get_ops()} <= ON_GPU


def test_no_constant_is_larger_than_the_whitening(exported):
    model, graph = exported
    constants = [node for node in graph.get_ops() if node.get_type_name() == "Constant"]
    matrices = next(value for name, value in model.model.state_dict().items() if name.endswith("matrices"))
    assert max(node.get_output_size() and node.data.size for node in constants) == matrices.numel()

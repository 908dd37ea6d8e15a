import copy
import pickle

import torch

from anomalib_ot.transport import Workspace

CPU = torch.device("cpu")


def test_memory_is_allocated_again_if_the_last_does_not_fit():
    workspace = Workspace()
    first = workspace.take("kernel", torch.Size([3, 4]), torch.float32, CPU)
    assert workspace.take("kernel", torch.Size([2, 5]), torch.float32, CPU).data_ptr() == first.data_ptr()
    assert workspace.take("values", torch.Size([3, 4]), torch.float32, CPU).data_ptr() != first.data_ptr()
    assert workspace.take("kernel", torch.Size([4, 4]), torch.float32, CPU).shape == (4, 4)
    assert workspace.take("kernel", torch.Size([2, 2]), torch.bfloat16, CPU).dtype == torch.bfloat16


def test_copies_have_their_own_memory_and_it_can_be_released():
    workspace = Workspace(1e6)
    matrix = workspace.take("kernel", torch.Size([100, 100]), torch.float32, CPU)
    for other in (copy.deepcopy(workspace), pickle.loads(pickle.dumps(workspace))):
        assert other.memory == 1e6
        assert other.take("kernel", matrix.shape, torch.float32, CPU).data_ptr() != matrix.data_ptr()
    assert len(pickle.dumps(workspace)) < 1000
    assert workspace._buffers
    workspace.clear()
    assert not workspace._buffers

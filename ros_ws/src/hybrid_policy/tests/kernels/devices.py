"""Which GPU is here, for tests of kernels that one family alone runs."""

import pytest
import torch

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
#: on a test, or as a class's pytestmark
on_hopper = [pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU (compute capability 9.0)")]

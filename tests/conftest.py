import os

# Inductor keeps compiled graphs by the names of operators: graphs of a library built before would be run.
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"

import pytest
import torch
from torch.overrides import TorchFunctionMode

# Of PyTorch about itself: they tell nothing about this library.
TORCH_WARNINGS = (
    "ignore:.torch.jit.script(_method)?. is deprecated",
    "ignore:Attempted to insert a get_attr Node with no underlying reference",
)


class SameNumbers(TorchFunctionMode):
    """Numbers drawn from a generator of the CPU's are the same on every device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if isinstance(generator, torch.Generator) and generator.device.type == "cpu" and "device" not in kwargs:
            return func(*args, **kwargs, device="cpu").to(torch.get_default_device())
        return func(*args, **kwargs)


# TD_TEST_DEVICE=cuda runs the tests on a GPU.
if device := os.environ.get("TD_TEST_DEVICE"):
    torch.set_default_device(device)
    SameNumbers().__enter__()
    from_numpy = torch.from_numpy
    torch.from_numpy = lambda array: from_numpy(array).to(device)


def pytest_configure(config: pytest.Config) -> None:
    for action in ("error", *TORCH_WARNINGS):
        config.addinivalue_line("filterwarnings", action)
    config.addinivalue_line("markers", "slow: compiles graphs or starts processes; left out locally by -m 'not slow'")


@pytest.fixture(autouse=True)
def clean_torch():
    """Same random numbers for every test, and two threads, so that rows are really split."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    torch._dynamo.reset()

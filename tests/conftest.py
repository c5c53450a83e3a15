import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: compiles graphs or starts processes; left out locally by -m 'not slow'")


@pytest.fixture(autouse=True)
def clean_torch():
    """Same random numbers for every test, and two threads, so that rows are really split."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    torch._dynamo.reset()

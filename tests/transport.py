"""What the tests of the exact transport losses share."""

import json
from pathlib import Path

import torch

CASES = json.loads((Path(__file__).parent / "reference" / "exact_transport_cases.json").read_text())


def case(name, *keys):
    """The case's expected value, and its arguments as float64 tensors."""
    c = CASES[name]
    return c["expected"]["value"], *(torch.tensor(c[key], dtype=torch.float64) for key in keys)


def weights(*shape, zeros=(), dtype=torch.float64):
    """Random ones that sum to 1 along the last dimension."""
    w = torch.rand(*shape, dtype=torch.float64) + 0.1
    w[..., list(zeros)] = 0
    return (w / w.sum(-1, keepdim=True)).to(dtype)


def on_simplex(free):
    """Weights as a function of free parameters, by which their masses stay equal."""
    return free.softmax(-1)


def raises(call, *words):
    import pytest

    with pytest.raises(ValueError) as error:
        call()
    assert type(error.value) is ValueError
    for word in words:
        assert word in str(error.value), f"no {word!r} in: {error.value}"

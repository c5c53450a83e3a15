"""Reads ../data/digits.bin: 1797 handwritten digits of 8 x 8 pixels, see ../data/README.md."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

PATH = Path(__file__).resolve().parent.parent / "data" / "digits.bin"
N_TRAIN = 1297


class Digits(NamedTuple):
    """Images are (n, 1, 8, 8) float32 in [0, 1], labels are (n,) int64 in 0..9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits(path: Path = PATH) -> Digits:
    """The digits, split into 1297 to train on and 500 to test on. The rows of the file are in random order."""
    rows = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).view(-1, 65)
    images = rows[:, :64].reshape(-1, 1, 8, 8).float() / 16
    labels = rows[:, 64].long()
    return Digits(images[:N_TRAIN], labels[:N_TRAIN], images[N_TRAIN:], labels[N_TRAIN:])

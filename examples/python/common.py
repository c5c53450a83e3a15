"""What several examples need: a classifier of digits, figures about generated samples, and pictures."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch_divergence as td
from digits import Digits
from torch import Tensor, nn

BATCH = 64
# 97.5 % quantile of Student's t by degrees of freedom: the half-width of a 95 % interval in standard errors.
T_QUANTILE = {2: 4.303, 4: 2.776, 9: 2.262}


def make_classifier() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.25), nn.Linear(32 * 4 * 4, 10),
    )  # fmt: skip


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In per cent."""
    was_training = model.training
    model.eval()
    correct = model(images).argmax(dim=1) == labels
    model.train(was_training)
    return 100 * correct.float().mean().item()


def shift(images: Tensor) -> Tensor:
    """The images moved by at most one pixel in each direction, all by the same."""
    dy, dx = torch.randint(3, (2,)).tolist()
    return F.pad(images, (1, 1, 1, 1))[:, :, dy : dy + 8, dx : dx + 8]


def train_classifier(data: Digits, epochs: int) -> nn.Module:
    """Learns from all training labels. It is returned in evaluation mode."""
    torch.manual_seed(0)
    classifier = make_classifier()
    optimizer = torch.optim.Adam(classifier.parameters(), lr=5e-3)
    for epoch in range(epochs):
        for batch in torch.randperm(len(data.train_images)).split(BATCH):
            loss = td.cross_entropy(classifier(shift(data.train_images[batch])), data.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if (epoch + 1) % 5 == 0:
            percent = accuracy(classifier, data.test_images, data.test_labels)
            print(f"  epoch {epoch + 1:2d}  test accuracy {percent:.1f} %", flush=True)
    return classifier.eval()


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval."""
    half_width = T_QUANTILE[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), half_width


def tile(images: Tensor, columns: int) -> Tensor:
    """Images (n, 1, 8, 8) as one picture, row by row, with a pixel of margin. n is a multiple of columns."""
    rows = len(images) // columns
    padded = F.pad(images.detach(), (0, 1, 0, 1), value=math.nan).view(rows, columns, 9, 9)
    return padded.transpose(1, 2).reshape(rows * 9, columns * 9)[:-1, :-1]


def show(axes: Any, images: Tensor, columns: int, title: str) -> None:
    """Draws the images dark on light."""
    axes.imshow(tile(images, columns), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set(title=title, xticks=[], yticks=[])
    axes.spines[:].set_visible(False)

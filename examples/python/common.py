"""What several examples need: a classifier of digits, figures about generated samples, and pictures."""

import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch_divergence as td
from digits import Digits
from torch import Tensor, nn

BATCH = 64
LATENT, HIDDEN = 16, 128  # of generators and critics
MAX_JS = 0.05  # nats, between the classes of samples and of training images
# 97.5 % quantile of Student's t by degrees of freedom: the half-width of a 95 % interval in standard errors.
T_QUANTILE = {4: 2.776, 9: 2.262}


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


def make_generator() -> nn.Sequential:
    """Turns Gaussian latents (n, LATENT) into images (n, 1, 8, 8)."""
    return nn.Sequential(
        nn.Linear(LATENT, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(),
        nn.Linear(HIDDEN, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(),
        nn.Linear(HIDDEN, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)),
    )  # fmt: skip


def make_critic(dropout: float = 0.0) -> nn.Sequential:
    """One number for each image: a discriminator's logit or a critic's score."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, HIDDEN), nn.LeakyReLU(0.2), nn.Dropout(dropout),
        nn.Linear(HIDDEN, HIDDEN), nn.LeakyReLU(0.2), nn.Dropout(dropout),
        nn.Linear(HIDDEN, 1), nn.Flatten(0),
    )  # fmt: skip


@torch.no_grad()
def generate(generator: nn.Module, n: int) -> Tensor:
    """Samples in evaluation mode, the same each time for the same generator."""
    generator.eval()
    samples = generator(torch.randn(n, LATENT, generator=torch.Generator().manual_seed(0)))
    generator.train()
    return samples


class Verdict(NamedTuple):
    classes: Tensor  # of each sample, by the classifier
    found: int  # of the ten digits
    js: float
    distance: float


class Judge:
    """Measures samples with a classifier that their generator never met, and by a distance to the test images.

    - A digit is found if at least 2 % of the samples are classified as it: a fifth of an equal share.
    - JS is the Jensen-Shannon divergence, in nats, of the samples' classes to those of the training labels.
    - The distance is the Sinkhorn divergence of as many samples as there are test images. On its scale `near` is that
      of training images, and `far` that of images whose pixels are drawn independently, each from the training images.
    """

    def __init__(self, data: Digits) -> None:
        self.classifier = train_classifier(data, epochs=10)
        self.test_images = data.test_images
        self.shares = data.train_labels.bincount(minlength=10) / len(data.train_labels)
        self.near = self.distance(data.train_images)
        pixels = data.train_images.flatten(1)
        rows = torch.randint(len(pixels), pixels.shape, generator=torch.Generator().manual_seed(0))
        self.far = self.distance(pixels.gather(0, rows))

    def distance(self, images: Tensor) -> float:
        """|x - y|^2 / 2 between images, moved at least cost."""
        x, y = images[: len(self.test_images)].flatten(1), self.test_images.flatten(1)
        return td.sinkhorn_divergence(x, y, blur=0.5).item()

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Verdict:
        classes = self.classifier(samples).argmax(dim=1)
        shares = classes.bincount(minlength=10) / len(classes)
        js = td.js_div(shares, self.shares, space="probs").item()
        return Verdict(classes, int((shares >= 0.02).sum()), js, self.distance(samples))

    def report(self, name: str, verdict: Verdict) -> bool:
        """Prints the line that says how good the samples are, and whether they pass."""
        print(
            f"{name}: {verdict.found} of 10 digits, JS of the classes {verdict.js:.4f}, "
            f"distance {verdict.distance:.3f} (training images {self.near:.3f}, independent pixels {self.far:.3f})"
        )
        passed = verdict.found == 10 and verdict.js < MAX_JS and verdict.distance < (self.near + self.far) / 2
        if not passed:
            print(
                f"FAILED: all digits, JS below {MAX_JS} and a distance nearer to training images expected",
                file=sys.stderr,
            )
        return passed

    def draw(self, path: Path, title: str, samples: Tensor, curve: dict[int, float], label: str) -> None:
        """Samples of each class, the shares of the classes, and what was measured by step of the training."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        classes = self(samples).classes
        figure, axes = plt.subplot_mosaic("ab;ac", figsize=(10, 4.8), layout="constrained", width_ratios=(1.2, 1))
        columns = 12
        rows = [samples[classes == digit][:columns] for digit in range(10)]
        rows = [F.pad(row, (0, 0, 0, 0, 0, 0, 0, columns - len(row))) for row in rows]  # white where a class is rare
        show(axes["a"], torch.cat(rows), columns, f"{title}, a row for each class")
        digits, shares = torch.arange(10), classes.bincount(minlength=10) / len(classes)
        axes["b"].bar(digits - 0.2, self.shares, 0.4, color="0.7", label="training images")
        axes["b"].bar(digits + 0.2, shares, 0.4, color="tab:blue", label="samples")
        axes["b"].set(title="share of each class", xticks=digits, ylim=(0, 0.19))
        axes["b"].legend(loc="upper right", ncols=2, frameon=False)
        axes["c"].plot(list(curve), list(curve.values()), color="tab:blue")
        axes["c"].set(title=label, xlabel="steps of the generator", xlim=0, ylim=min(0, *curve.values()))
        axes["c"].grid(alpha=0.3)
        figure.savefig(path, dpi=100)

"""Knowledge distillation on handwritten digits.

A convolutional teacher learns from all 1297 training labels. A small student then sees 100 labels only: once alone, and
once together with the teacher's logits on all the training images, which cost no label. The student's loss is that of
Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network" (2015), section 2:

    alpha T^2 KL(teacher_T || student_T) + (1 - alpha) cross_entropy(student, label)

The gain in test accuracy is measured over 10 seeds. The program fails if the teacher does not reach 97 %, or if the
95 % interval of the mean gain reaches down to 0.

    python distillation.py            about 20 seconds
    python distillation.py --quick    the same with 5 seeds and fewer epochs
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch_divergence as td
from common import BATCH, accuracy, mean_interval, train_classifier
from digits import Digits, load_digits
from torch import Tensor, nn

TEMPERATURE = 4.0
ALPHA = 0.9
N_LABELLED = 100


def make_student() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


def train_student(data: Digits, teacher_logits: Tensor | None, seed: int, epochs: int) -> list[float]:
    """Test accuracy after each epoch. The seed chooses the labelled images and the start, with a teacher or without."""
    torch.manual_seed(seed)
    labelled = torch.randperm(len(data.train_images))[:N_LABELLED]
    images, labels = data.train_images[labelled], data.train_labels[labelled]
    student = make_student()
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-3)
    percents = []
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_images)).split(BATCH):
            loss = td.cross_entropy(student(images), labels)
            if teacher_logits is not None:
                kl = td.kl_div(student(data.train_images[batch]), teacher_logits[batch], temperature=TEMPERATURE)
                loss = ALPHA * TEMPERATURE**2 * kl + (1 - ALPHA) * loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        percents.append(accuracy(student, data.test_images, data.test_labels))
    return percents


def draw(path: Path, alone: Tensor, distilled: Tensor, teacher_accuracy: float) -> None:
    """The mean accuracy by epoch over the seeds (rows), with the range of the seeds shaded."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.axhline(teacher_accuracy, color="black", linestyle="--", label="teacher, 1297 labels")
    for curves, name, color in (
        (distilled, f"student, {N_LABELLED} labels and the teacher's logits", "tab:blue"),
        (alone, f"student, {N_LABELLED} labels", "tab:orange"),
    ):
        epochs = range(1, curves.size(1) + 1)
        axes.fill_between(epochs, curves.amin(0), curves.amax(0), color=color, alpha=0.2, linewidth=0)
        axes.plot(epochs, curves.mean(0), color=color, label=name)
    axes.set(xlabel="epoch", ylabel="test accuracy, %", title="Distillation on handwritten digits", ylim=(60, 100))
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description="Knowledge distillation on handwritten digits.")
    parser.add_argument("--quick", action="store_true", help="5 seeds and fewer epochs")
    parser.add_argument("--picture", type=Path, default=Path("distillation.png"), help="where to draw the curves")
    options = parser.parse_args()
    n_seeds, teacher_epochs, student_epochs = (5, 15, 25) if options.quick else (10, 30, 40)
    torch.set_num_threads(1)  # such small models gain nothing from a second thread
    start = time.perf_counter()

    data = load_digits()
    print(f"teacher: all {len(data.train_images)} labels", flush=True)
    teacher = train_classifier(data, teacher_epochs)
    teacher_accuracy = accuracy(teacher, data.test_images, data.test_labels)
    with torch.no_grad():
        teacher_logits = teacher(data.train_images)

    print(f"student: {N_LABELLED} labels, alone and with the teacher's logits", flush=True)
    alone, distilled = [], []
    for seed in range(1, n_seeds + 1):
        alone.append(train_student(data, None, seed, student_epochs))
        distilled.append(train_student(data, teacher_logits, seed, student_epochs))
        print(f"  seed {seed:2d}  alone {alone[-1][-1]:.1f} %  distilled {distilled[-1][-1]:.1f} %", flush=True)

    draw(options.picture, torch.tensor(alone), torch.tensor(distilled), teacher_accuracy)
    gains = [d[-1] - a[-1] for a, d in zip(alone, distilled, strict=True)]
    gain, half_width = mean_interval(gains)
    print(f"teacher {teacher_accuracy:.2f} %")
    print(f"student alone {statistics.mean(a[-1] for a in alone):.2f} %")
    print(f"student distilled {statistics.mean(d[-1] for d in distilled):.2f} %")
    print(
        f"gain {gain:+.2f} points, 95 % interval [{gain - half_width:+.2f}, {gain + half_width:+.2f}], {n_seeds} seeds"
    )
    print(f"picture {options.picture.resolve()}")
    print(f"time {time.perf_counter() - start:.0f} s")
    if teacher_accuracy < 97 or gain - half_width <= 0:
        print("FAILED: the teacher must reach 97 % and the interval must lie above 0", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

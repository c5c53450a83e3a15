"""One photograph takes on the colours of another: the optimal transport of their pixels, as points of RGB space.

From 2000 pixels of each photograph, `td.sinkhorn` finds the plan that moves the colours of the one onto those of the
other at the least cost (Ferradans et al., "Regularized Discrete Optimal Transport", 2014). `barycentric_projection`
says where each of the 2000 goes; the potential g extends that map to every colour z,

    T(z) = sum_j w_j y_j / sum_j w_j,    w_j = b_j exp((g_j - |z - y_j|^2 / 2) / eps)

(Pooladian and Niles-Weed, "Entropic estimation of optimal transport maps", 2021), and so to every pixel. What has been
won is measured on other pixels, which the plan has not seen. The program fails unless the Sinkhorn divergence between
the colour distributions falls to a 20th, and unless the extension agrees with the plan's own projection.

    python colour_transfer.py                    china.jpg in the colours of flower.jpg, which scikit-learn brings along
    python colour_transfer.py --quick            the same with fewer pixels
    python colour_transfer.py a.jpg b.jpg        the first in the colours of the second; then only the figures are given
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch_divergence as td
from torch import Tensor

BLUR = 0.03  # in units of the range of a channel


def load(path: Path | str) -> Tensor:
    """(height, width, 3) in [0, 1]: a file, or a sample photograph of scikit-learn by its name."""
    if isinstance(path, Path):
        import numpy
        from PIL import Image

        pixels = numpy.asarray(Image.open(path).convert("RGB"))
    else:
        from sklearn.datasets import load_sample_image

        pixels = load_sample_image(path)
    return torch.tensor(pixels).float() / 255


def sample(image: Tensor, count: int, seed: int) -> Tensor:
    """Colours of pixels drawn at random, (count, 3)."""
    pixels = image.reshape(-1, 3)
    return pixels[torch.randint(len(pixels), (count,), generator=torch.Generator().manual_seed(seed))]


def transport(colours: Tensor, y: Tensor, result: td.SinkhornResult) -> Tensor:
    """T of each colour, (..., 3), in blocks: the plan's rows for points that it has not seen."""
    eps = BLUR**2
    distinct, index = colours.reshape(-1, 3).unique(dim=0, return_inverse=True)  # fewer than the pixels
    blocks = []
    for z in distinct.split(8192):
        # |z - y|^2 / 2 without |z|^2 / 2, which is the same for all j. The weights b_j are equal here.
        scores = (result.g - y.square().sum(-1) / 2 + z @ y.T) / eps
        blocks.append(scores.softmax(-1) @ y)
    return torch.cat(blocks)[index].view(colours.shape)


def divergence(image: Tensor, other: Tensor, count: int) -> float:
    """Between the colours of pixels other than those that the plan was made of."""
    return td.sinkhorn_divergence(sample(image, count, 2), sample(other, count, 3), blur=BLUR, tol=1e-3).item()


def draw(path: Path, images: dict[str, Tensor], count: int) -> None:
    """The photographs, and under each its colours in the plane of red and blue."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(9, 5.2), layout="constrained", height_ratios=(1, 1))
    for column, (name, image) in enumerate(images.items()):
        axes[0, column].imshow(image)
        axes[0, column].set_title(name)
        axes[0, column].set_axis_off()
        colours = sample(image, count, 2)
        axes[1, column].scatter(colours[:, 0], colours[:, 2], s=2, c=colours)
        axes[1, column].set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="red", xticks=(0, 1), yticks=(0, 1))
    axes[1, 0].set_ylabel("blue")
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description="One photograph in the colours of another.")
    parser.add_argument("photographs", nargs="*", type=Path, metavar="FILE", help="two photographs, or none")
    parser.add_argument("--quick", action="store_true", help="fewer pixels")
    parser.add_argument("--picture", type=Path, default=Path("colour_transfer.png"), help="where to draw the three")
    options = parser.parse_args()
    if len(options.photographs) not in (0, 2):
        parser.error(f"got {len(options.photographs)} photograph, expected two or none")
    torch.set_num_threads(1)
    begin = time.perf_counter()

    source, target = map(load, options.photographs or ("china.jpg", "flower.jpg"))
    count = 600 if options.quick else 2000
    x, y = sample(source, count, 0), sample(target, count, 1)
    result = td.sinkhorn(x, y, blur=BLUR, tol=1e-3)
    print(f"plan between {count} pixels of each: {int(result.n_iter)} iterations", flush=True)
    mismatch = (transport(x, y, result) - result.barycentric_projection()).abs().max().item()
    print(f"extension and projection differ by {mismatch:.1e}", flush=True)
    recoloured = transport(source, y, result)

    before, after = divergence(source, target, count), divergence(recoloured, target, count)
    draw(options.picture, {"source": source, "colours of": target, "result": recoloured.clamp(0, 1)}, count)
    print(f"divergence of the colours {before:.5f} -> {after:.5f}: {before / after:.1f} times less")
    print(f"picture {options.picture.resolve()}")
    print(f"time {time.perf_counter() - begin:.0f} s")
    if options.photographs:
        return 0
    if not (before > 20 * after and mismatch < 1e-3):
        print("FAILED: the divergence must fall to a 20th, and the two maps must agree to 1e-3", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

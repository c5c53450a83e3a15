"""A variational autoencoder of handwritten digits with two latent dimensions.

Encoder and decoder minimise `td.vae_loss`, the negative evidence lower bound of Kingma and Welling, "Auto-Encoding
Variational Bayes" (2013), with a Bernoulli likelihood of each pixel. It is compared on the test images with the
baseline of a decoder that ignores its latent: the best of those predicts the mean training image, and needs no KL.
The program fails if the VAE is not at least MARGIN nats below the baseline.

    python vae.py                      half a minute
    python vae.py --quick              fewer epochs
    python vae.py --picture vae.png    also draws the latent plane and samples
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch_divergence as td
from common import show
from digits import Digits, load_digits
from torch import Tensor, nn

LATENT, HIDDEN = 2, 128
EPOCHS, QUICK_EPOCHS = 300, 60
BATCH, LEARNING_RATE = 64, 2e-3
MARGIN, QUICK_MARGIN = 2.5, 1.5  # nats


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
            nn.Linear(HIDDEN, 2 * LATENT),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Linear(LATENT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
            nn.Linear(HIDDEN, 64), nn.Unflatten(1, (1, 8, 8)),
        )  # fmt: skip

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the reconstruction, and mean and log-variance of the latent."""
        mean, log_var = self.encoder(images).chunk(2, dim=1)
        latent = mean + (log_var / 2).exp() * torch.randn_like(mean)
        return self.decoder(latent), mean, log_var


@torch.no_grad()
def test_loss(vae: VAE, images: Tensor, draws: int = 1) -> tuple[float, float]:
    """The negative ELBO of the images in nats, by so many draws of each latent, and the KL that it contains."""
    images = images.repeat(draws, 1, 1, 1)
    logits, mean, log_var = vae(images)
    return td.vae_loss(logits, images, mean, log_var).item(), td.gaussian_kl(mean, log_var).item()


def baseline_loss(data: Digits) -> float:
    """The negative ELBO of the best decoder without a latent, with the posterior at the prior."""
    # One more image, all grey, keeps pixels that are white in every training image from a probability of 0.
    pixels = (data.train_images.sum(0) + 0.5) / (len(data.train_images) + 1)
    logits = pixels.logit().expand_as(data.test_images)
    prior = torch.zeros(len(logits), LATENT)
    return td.vae_loss(logits, data.test_images, prior, prior).item()


@torch.no_grad()
def draw(path: Path, vae: VAE, data: Digits) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (plane, decoded, samples) = plt.subplots(1, 3, figsize=(13, 4.5), layout="constrained")
    mean = vae.encoder(data.test_images)[:, :LATENT]
    for digit in range(10):
        x, y = mean[data.test_labels == digit].T
        plane.scatter(x, y, s=14, color=plt.cm.tab10(digit), label=str(digit), linewidth=0)
    plane.set(title="latent means of the test images", aspect="equal")
    plane.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, handletextpad=0)

    # Quantiles of the prior, as in Kingma and Welling's figure 4, so that each tile stands for the same probability.
    steps = 12
    quantiles = torch.special.ndtri((torch.arange(steps) + 0.5) / steps)
    grid = torch.cartesian_prod(-quantiles, quantiles).flip(1)
    show(decoded, vae.decoder(grid).sigmoid(), steps, "decoder over the plane, by quantiles of the prior")
    latent = torch.randn(steps * steps, LATENT, generator=torch.Generator().manual_seed(0))
    show(samples, vae.decoder(latent).sigmoid(), steps, "samples")
    figure.savefig(path, dpi=100)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    parser.add_argument("--picture", type=Path, help="where to draw")
    options = parser.parse_args()
    epochs, margin = (QUICK_EPOCHS, QUICK_MARGIN) if options.quick else (EPOCHS, MARGIN)
    torch.set_num_threads(1)  # such small models gain nothing from a second thread
    start = time.perf_counter()

    data = load_digits()
    torch.manual_seed(0)
    vae = VAE()
    optimizer = torch.optim.Adam(vae.parameters(), lr=LEARNING_RATE)
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(data.train_images)).split(BATCH):
            images = data.train_images[batch]
            logits, mean, log_var = vae(images)
            loss = td.vae_loss(logits, images, mean, log_var)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch % (epochs // 10) == 0:
            loss, kl = test_loss(vae, data.test_images)
            print(f"  epoch {epoch:3d}  negative ELBO of the test images {loss:.2f} nats, KL {kl:.2f}", flush=True)

    if options.picture:
        draw(options.picture, vae, data)
        print(f"picture {options.picture.resolve()}")
    loss, kl = test_loss(vae, data.test_images, draws=20)
    baseline = baseline_loss(data)
    print(f"time {time.perf_counter() - start:.0f} s")
    print(f"vae: negative ELBO of the test images {loss:.2f} nats, KL {kl:.2f}, without a latent {baseline:.2f}")
    if loss > baseline - margin:
        print(f"FAILED: the negative ELBO must be {margin} nats below the baseline", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

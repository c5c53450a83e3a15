"""A generative adversarial network of handwritten digits: a game played on the Jensen-Shannon divergence.

The discriminator minimises `td.gan_discriminator_loss`, the generator the non-saturating `td.gan_generator_loss`, after
Goodfellow et al., "Generative Adversarial Nets" (2014). As they play, `td.gan_js_estimate` on the test images tells how
much of JS(data, samples) the discriminator sees: log 2 = 0.69 where it knows every sample, 0 where it knows none.
A classifier that the generator never met then judges the samples. The program fails if it does not find all ten digits
among them, if the JS of their classes to the data's is 0.05 or more, or if they are no nearer to the test images than
halfway from images of independent pixels to training images.

    python gan.py                      half a minute
    python gan.py --quick              fewer steps
    python gan.py --picture gan.png    also draws samples, classes and the estimate of JS
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch_divergence as td
from common import LATENT, Judge, generate, make_critic, make_generator
from digits import load_digits
from torch import Tensor, nn

STEPS, QUICK_STEPS = 6000, 3000
BATCH, LEARNING_RATE, BETAS = 64, 1e-3, (0.5, 0.99)
DROPOUT = 0.3  # in the discriminator: without, it learns the training images by heart
SAMPLES = 2000


@torch.no_grad()
def js_estimate(discriminator: nn.Module, images: Tensor, samples: Tensor) -> float:
    discriminator.eval()
    estimate = td.gan_js_estimate(discriminator(images), discriminator(samples)).item()
    discriminator.train()
    return estimate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--picture", type=Path, help="where to draw")
    options = parser.parse_args()
    steps = QUICK_STEPS if options.quick else STEPS
    torch.set_num_threads(1)  # such small models gain nothing from a second thread
    start = time.perf_counter()

    data = load_digits()
    print("classifier", flush=True)
    judge = Judge(data)
    print("generator and discriminator", flush=True)
    torch.manual_seed(0)
    generator, discriminator = make_generator(), make_critic(DROPOUT)
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=LEARNING_RATE, betas=BETAS)
    discriminator_optimizer = torch.optim.Adam(discriminator.parameters(), lr=LEARNING_RATE, betas=BETAS)
    curve = {}
    for step in range(1, steps + 1):
        real = data.train_images[torch.randint(len(data.train_images), (BATCH,))]
        fake = generator(torch.randn(BATCH, LATENT))
        loss = td.gan_discriminator_loss(discriminator(real), discriminator(fake.detach()))
        discriminator_optimizer.zero_grad()
        loss.backward()
        discriminator_optimizer.step()

        loss = td.gan_generator_loss(discriminator(fake))
        generator_optimizer.zero_grad()
        loss.backward()
        generator_optimizer.step()

        if step % (steps // 40) == 0:
            samples = generate(generator, SAMPLES)
            curve[step] = js_estimate(discriminator, data.test_images, samples)
            if step % (steps // 10) == 0:
                verdict = judge(samples)
                print(f"  step {step}  JS estimate {curve[step]:.3f}  {verdict.found} digits", flush=True)

    if options.picture:
        judge.draw(
            options.picture, "samples of the GAN", samples, curve, "JS(data, samples) seen by the discriminator, nats"
        )
        print(f"picture {options.picture.resolve()}")
    print(f"time {time.perf_counter() - start:.0f} s")
    return 0 if judge.report("gan", verdict) else 1


if __name__ == "__main__":
    sys.exit(main())

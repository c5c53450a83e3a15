"""``python -m torch_divergence [x y] [--picture FILE]``: see :mod:`torch_divergence.comparison`."""

import argparse
import sys
from pathlib import Path

from torch_divergence import comparison


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m torch_divergence",
        description="Without arguments: KL, JS and Wasserstein compared on two families that slide apart, every row "
        "of the comparison table checked. With two files (.npy, .csv, .pt: N numbers, or N rows of D): the samples "
        "compared.",
    )
    parser.add_argument("samples", nargs="*", type=Path, metavar="FILE", help="two samples to compare")
    parser.add_argument("--picture", type=Path, help="where to write the table's figure (needs matplotlib)")
    options = parser.parse_args(arguments)
    if len(options.samples) not in (0, 2):
        parser.error(f"got {len(options.samples)} file, expected two or none")

    if options.samples:
        try:
            x, y = map(comparison.load_sample, options.samples)
            lines = comparison.compare_samples(x, y)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        print(f"x: {len(x)} points, y: {len(y)} points, {x.shape[1]} dimension{'s' * (x.shape[1] > 1)}\n")
        header = ("divergence", "value", "what it means")
        width = max(len(name) for name, _, _ in lines)
        print(f"{header[0]:<{width}}  {header[1]:>12}  {header[2]}")
        for name, value, meaning in lines:
            print(f"{name:<{width}}  {value:>12.6g}  {meaning}")
        return 0

    families = (comparison.discrete_family(), comparison.gaussian_family())
    for family in families:
        print(comparison.format_family(family), end="\n\n\n")
    rows = comparison.checks(*families)
    table = [(c.property, c.kl, c.js, c.wasserstein, "holds" if c.holds else "FAILS") for c in rows]
    print(comparison.format_table(("", "KL", "JS", "Wasserstein", "computed"), table), end="\n\n")
    for check in rows:
        print(f"{check.property}: {check.evidence}")
    if options.picture is not None:
        try:
            comparison.draw(families, options.picture)
            print(f"\npicture: {options.picture}")
        except ImportError:
            print("\nno picture: matplotlib is not installed ('pip install matplotlib')", file=sys.stderr)
            return 1
    return 0 if all(check.holds for check in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Divergences between probability distributions, with gradients of every argument to any order.

The functions are in :mod:`torch_divergence.functional`, the ``nn.Module`` losses in :mod:`torch_divergence.modules`;
all of them are also here. C++ programs call ``find_package(TorchDivergence)`` with :data:`cmake_prefix_path`.
"""

from pathlib import Path

import torch


def _check_torch() -> None:
    """Raises ImportError unless the library was built, with the minor version of torch that is running.

    LibTorch's ABI changes with the minor version: a library built with another one fails to load with "undefined
    symbol", or worse, loads.
    """
    rebuild = "run 'pip install --no-build-isolation --force-reinstall --no-deps .' in its source tree"
    try:
        from torch_divergence._build_info import TORCH_VERSION
    except ImportError:
        raise ImportError(f"torch_divergence is not built: {rebuild} (with '-e .' for an editable install).") from None
    if TORCH_VERSION.split(".")[:2] != torch.__version__.split(".")[:2]:
        raise ImportError(
            f"torch_divergence was built with torch {TORCH_VERSION}, but torch {torch.__version__} is running. "
            f"To rebuild it with this one, {rebuild} (with '-e .' for an editable install)."
        )


_check_torch()

from torch_divergence import _C, _transforms, functional, modules  # noqa: E402
from torch_divergence.functional import js_div, kl_div  # noqa: E402
from torch_divergence.modules import JSDivLoss, KLDivLoss  # noqa: E402

_transforms.register()

__version__: str = _C.__version__

#: The folder for CMake to search: ``cmake -DCMAKE_PREFIX_PATH=$(python -c "import torch_divergence as td;
#: print(td.cmake_prefix_path)")``, as with ``torch.utils.cmake_prefix_path``.
cmake_prefix_path: str = str(Path(__file__).parent)


def empty_cache() -> None:
    """Gives back the one block of memory that is kept for the next large gradient.

    Gradients of 2 MB and more are written to huge pages where the system has them, and the block last freed is kept,
    because fresh pages cost more time than the arithmetic.

    >>> import torch_divergence as td
    >>> td.empty_cache()
    """
    _C.empty_cache()


__all__ = [
    "JSDivLoss",
    "KLDivLoss",
    "__version__",
    "cmake_prefix_path",
    "empty_cache",
    "functional",
    "js_div",
    "kl_div",
    "modules",
]

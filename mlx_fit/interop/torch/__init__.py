"""For those who come from PyTorch: weights in and out, a checker of ports, PyTorch's optimizers.

Nothing here imports torch before it is needed.
"""

from mlx_fit.interop.torch import optimizers
from mlx_fit.interop.torch.compare import compare
from mlx_fit.interop.torch.comparison import Comparison
from mlx_fit.interop.torch.groups import param_groups
from mlx_fit.interop.torch.report import LoadedArray, LoadReport
from mlx_fit.interop.torch.seeding import seed_everything
from mlx_fit.interop.torch.weights import export_weights, load_weights

__all__ = [
    "Comparison",
    "LoadReport",
    "LoadedArray",
    "compare",
    "export_weights",
    "load_weights",
    "optimizers",
    "param_groups",
    "seed_everything",
]

"""Data: the order of samples, datasets of rows, and the loader that batches them."""

from typing import TYPE_CHECKING

from mlx_fit._lazy import lazy
from mlx_fit.data.order import order  # at once: a module has the name too

if TYPE_CHECKING:
    from mlx_fit.data.csv_file import read_csv
    from mlx_fit.data.dataset import ArrayDataset, ConcatDataset, Map, Subset, random_split
    from mlx_fit.data.images import ImageFolder
    from mlx_fit.data.loader import DataLoader
    from mlx_fit.data.map_batches import MapBatches
    from mlx_fit.data.mapped import open_arrays
    from mlx_fit.data.samplers import StratifiedSampler, WeightedRandomSampler


__all__ = [
    "ArrayDataset",
    "ConcatDataset",
    "DataLoader",
    "ImageFolder",
    "Map",
    "MapBatches",
    "StratifiedSampler",
    "Subset",
    "WeightedRandomSampler",
    "open_arrays",
    "order",
    "random_split",
    "read_csv",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "csv_file": ("read_csv",),
        "dataset": (
            "ArrayDataset",
            "ConcatDataset",
            "Map",
            "Subset",
            "random_split",
        ),
        "images": ("ImageFolder",),
        "loader": ("DataLoader",),
        "map_batches": ("MapBatches",),
        "mapped": ("open_arrays",),
        "samplers": (
            "StratifiedSampler",
            "WeightedRandomSampler",
        ),
    },
)

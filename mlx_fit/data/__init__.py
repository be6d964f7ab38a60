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
    from mlx_fit.data.mlx_data import from_mlx_data
    from mlx_fit.data.samplers import RowGroupSampler, StratifiedSampler, WeightedRandomSampler
    from mlx_fit.data.table import open_table


__all__ = [
    "ArrayDataset",
    "ConcatDataset",
    "DataLoader",
    "ImageFolder",
    "Map",
    "MapBatches",
    "RowGroupSampler",
    "StratifiedSampler",
    "Subset",
    "WeightedRandomSampler",
    "from_mlx_data",
    "open_arrays",
    "open_table",
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
        "mlx_data": ("from_mlx_data",),
        "samplers": (
            "RowGroupSampler",
            "StratifiedSampler",
            "WeightedRandomSampler",
        ),
        "table": ("open_table",),
    },
)

"""Data: the order of samples, datasets of rows, and the loader that batches them."""

from mlx_fit.data.csv_file import read_csv
from mlx_fit.data.dataset import ArrayDataset, ConcatDataset, Map, Subset, random_split
from mlx_fit.data.images import ImageFolder
from mlx_fit.data.loader import DataLoader
from mlx_fit.data.map_batches import MapBatches
from mlx_fit.data.mapped import open_arrays
from mlx_fit.data.order import order
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

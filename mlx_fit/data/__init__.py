"""Data: the order of samples, datasets of rows, and the loader that batches them."""

from mlx_fit.data.dataset import ArrayDataset, ConcatDataset, Map, Subset, random_split
from mlx_fit.data.loader import DataLoader
from mlx_fit.data.order import order

__all__ = [
    "ArrayDataset",
    "ConcatDataset",
    "DataLoader",
    "Map",
    "Subset",
    "order",
    "random_split",
]

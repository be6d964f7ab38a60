"""Text data for language models: rows to tokens and targets, and batches with little padding."""

from mlx_fit.batch import TextBatch
from mlx_fit.text.bucket import BucketBatches
from mlx_fit.text.dataset import TextDataset
from mlx_fit.text.jsonl import JsonLines
from mlx_fit.text.pack import PackedBatches
from mlx_fit.text.packed_model import apply_packed, check_packing, is_packed
from mlx_fit.text.preference import PreferenceBatch, PreferenceBatches, PreferenceDataset
from mlx_fit.text.report import TextReport

__all__ = [
    "BucketBatches",
    "JsonLines",
    "PackedBatches",
    "PreferenceBatch",
    "PreferenceBatches",
    "PreferenceDataset",
    "TextBatch",
    "TextDataset",
    "TextReport",
    "apply_packed",
    "check_packing",
    "is_packed",
]

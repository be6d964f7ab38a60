"""The network of ``digits.toml``: what a file of settings names is ordinary Python."""

import mlx.core as mx
import mlx.nn as nn


class Net(nn.Module):
    """Two layers for 8 x 8 images: ``(batch, 8, 8)`` to ``(batch, 10)``."""

    def __init__(self, hidden: int = 64, dropout: float = 0.1) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, hidden)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, 10)

    def __call__(self, x: mx.array) -> mx.array:
        x = nn.relu(self.hidden(x.reshape(len(x), 64)))
        return self.head(self.dropout(x))

"""A character model with two LSTM layers: the port of lstm_torch.py."""

import mlx.nn as nn
import numpy as np

from mlx_fit import Trainer
from mlx_fit.interop.torch import optimizers, param_groups

TEXT = "the quick brown fox jumps over the lazy dog. " * 40
CHARACTERS = sorted(set(TEXT))


class CharLSTM(nn.Module):
    def __init__(self, size=24):
        super().__init__()
        self.embed = nn.Embedding(len(CHARACTERS), size)
        self.lstm = [nn.LSTM(size, size), nn.LSTM(size, size)]  # num_layers=2
        self.head = nn.Linear(size, len(CHARACTERS))

    def __call__(self, tokens):
        hidden = self.embed(tokens)
        for layer in self.lstm:
            hidden, _ = layer(hidden)
        return self.head(hidden)


def data(rows=100, length=16):
    codes = np.array([CHARACTERS.index(character) for character in TEXT])
    windows = np.stack([codes[row : row + length + 1] for row in range(rows)])
    return windows[:, :-1], windows[:, 1:]


def train(model, dataset, epochs=5, shuffle=True):
    # PyTorch's LSTM has two biases, which get the same update each: their sum moves twice as far.
    biases = {"params": "lstm.*.bias", "lr": 2e-3}
    optimizer = param_groups(model, optimizers.RMSprop, [biases], lr=1e-3, eps=1e-5)
    trainer = Trainer(model, optimizer, "cross_entropy", batch_size=16)
    return trainer.fit(dataset, epochs=epochs, shuffle=shuffle, verbose=0).history["loss"]


if __name__ == "__main__":
    print(train(CharLSTM(), data()))

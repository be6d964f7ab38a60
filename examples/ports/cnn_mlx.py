"""Handwritten digits with a small CNN: the port of cnn_torch.py."""

import mlx.nn as nn
import numpy as np

from mlx_fit import Trainer, datasets
from mlx_fit.interop.torch import optimizers


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(16 * 2 * 2, 10)

    def __call__(self, x):
        x = self.pool(nn.relu(self.conv1(x)))
        x = self.pool(nn.relu(self.conv2(x)))
        # PyTorch flattens (channel, height, width); its weights expect that order.
        return self.fc(x.transpose(0, 3, 1, 2).reshape(len(x), -1))


def data(rows=1500):
    images, labels = datasets.digits()
    x = images[:rows, ..., None].astype(np.float32)  # channels last
    return x, labels[:rows]


def train(model, dataset, epochs=5, shuffle=True):
    trainer = Trainer(model, optimizers.Adam(lr=2e-3), "cross_entropy", batch_size=32)
    return trainer.fit(dataset, epochs=epochs, shuffle=shuffle, verbose=0).history["loss"]


if __name__ == "__main__":
    print(train(CNN(), data()))

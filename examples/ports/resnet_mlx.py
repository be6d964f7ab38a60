"""A small ResNet on images of 32 x 32: the port of resnet_torch.py."""

import math

import mlx.nn as nn
import numpy as np

from mlx_fit import Trainer, datasets
from mlx_fit.interop.torch import optimizers
from mlx_fit.schedules import warmup_cosine


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def __call__(self, x):
        y = nn.relu(self.bn1(self.conv1(x)))
        return nn.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(Block(width, width, 2), Block(width, 2 * width, 2))
        self.head = nn.Linear(2 * width, 10)

    def __call__(self, x):
        x = self.blocks(nn.relu(self.stem(x)))
        return self.head(x.mean((1, 2)))


def data(rows=1500):
    images, labels = datasets.digits()
    large = np.kron(images[:rows], np.ones((1, 4, 4)))  # 8 x 8 to 32 x 32
    large += np.random.default_rng(0).normal(0, 0.1, large.shape)
    return np.repeat(large[..., None], 3, axis=-1).astype(np.float32), labels[:rows]


def train(model, dataset, epochs=5, shuffle=True):
    num_steps = epochs * math.ceil(len(dataset[1]) / 32)
    optimizer = optimizers.SGD(
        lr=warmup_cosine(0.05, num_steps, warmup_steps=0),
        momentum=0.9,
        weight_decay=5e-4,
        nesterov=True,
    )
    trainer = Trainer(model, optimizer, "cross_entropy", batch_size=32, clip_norm=1.0)
    return trainer.fit(dataset, epochs=epochs, shuffle=shuffle, verbose=0).history["loss"]


if __name__ == "__main__":
    print(train(ResNet(), data()))

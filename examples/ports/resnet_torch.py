"""A small ResNet on images of 32 x 32: the PyTorch script. Its port is resnet_mlx.py."""

import numpy as np
import torch
from torch import nn

from mlx_fit import datasets


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(Block(width, width, 2), Block(width, 2 * width, 2))
        self.head = nn.Linear(2 * width, 10)

    def forward(self, x):
        x = self.blocks(torch.relu(self.stem(x)))
        return self.head(x.mean((2, 3)))


def data(rows=1500):
    images, labels = datasets.digits()
    large = np.kron(images[:rows], np.ones((1, 4, 4)))  # 8 x 8 to 32 x 32
    large += np.random.default_rng(0).normal(0, 0.1, large.shape)
    x = torch.tensor(large, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1)
    return torch.utils.data.TensorDataset(x, torch.tensor(labels[:rows], dtype=torch.long))


def train(model, dataset, epochs=5, shuffle=True):
    loader = torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=shuffle)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    losses = []
    for _ in range(epochs):
        model.train()
        total = 0.0
        for x, y in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(x)
        losses.append(total / len(dataset))
    return losses


if __name__ == "__main__":
    print(train(ResNet(), data()))

"""Handwritten digits with a small CNN: the PyTorch script. Its port is cnn_mlx.py."""

import torch
from torch import nn

from mlx_fit import datasets


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(16 * 2 * 2, 10)

    def forward(self, x):
        x = self.pool(torch.relu(self.conv1(x)))
        x = self.pool(torch.relu(self.conv2(x)))
        return self.fc(x.flatten(1))


def data(rows=1500):
    images, labels = datasets.digits()
    x = torch.tensor(images[:rows], dtype=torch.float32)[:, None]  # channels first
    return torch.utils.data.TensorDataset(x, torch.tensor(labels[:rows], dtype=torch.long))


def train(model, dataset, epochs=5, shuffle=True):
    loader = torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=shuffle)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    loss_function = nn.CrossEntropyLoss()
    losses = []
    for _ in range(epochs):
        model.train()
        total = 0.0
        for x, y in loader:
            optimizer.zero_grad()
            loss = loss_function(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(x)
        losses.append(total / len(dataset))
    return losses


if __name__ == "__main__":
    print(train(CNN(), data()))

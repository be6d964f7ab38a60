"""A character model with two LSTM layers: the PyTorch script. Its port is lstm_mlx.py."""

import torch
from torch import nn

TEXT = "the quick brown fox jumps over the lazy dog. " * 40
CHARACTERS = sorted(set(TEXT))


class CharLSTM(nn.Module):
    def __init__(self, size=24):
        super().__init__()
        self.embed = nn.Embedding(len(CHARACTERS), size)
        self.lstm = nn.LSTM(size, size, num_layers=2, batch_first=True)
        self.head = nn.Linear(size, len(CHARACTERS))

    def forward(self, tokens):
        hidden, _ = self.lstm(self.embed(tokens))
        return self.head(hidden)


def data(rows=100, length=16):
    codes = torch.tensor([CHARACTERS.index(character) for character in TEXT])
    windows = torch.stack([codes[row : row + length + 1] for row in range(rows)])
    return torch.utils.data.TensorDataset(windows[:, :-1], windows[:, 1:])


def train(model, dataset, epochs=5, shuffle=True):
    loader = torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=shuffle)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, eps=1e-5)
    losses = []
    for _ in range(epochs):
        total = 0.0
        for x, y in loader:
            optimizer.zero_grad()
            logits = model(x)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
            loss.backward()
            optimizer.step()
            total += loss.item() * len(x)
        losses.append(total / len(dataset))
    return losses


if __name__ == "__main__":
    print(train(CharLSTM(), data()))

"""A small GPT with tied weights: the PyTorch script. Its port is gpt_mlx.py."""

import math

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

VOCABULARY, LENGTH, SIZE, HEADS = 17, 12, 16, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(SIZE)
        self.qkv = nn.Linear(SIZE, 3 * SIZE)
        self.out = nn.Linear(SIZE, SIZE)
        self.norm2 = nn.LayerNorm(SIZE)
        self.mlp = nn.Sequential(nn.Linear(SIZE, 64), nn.GELU("tanh"), nn.Linear(64, SIZE))

    def forward(self, x):
        batch, length, _ = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, SIZE))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, SIZE)
        self.wpe = nn.Embedding(LENGTH, SIZE)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(SIZE)
        self.head = nn.Linear(SIZE, VOCABULARY, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def data(rows=128):
    start = torch.arange(rows)[:, None]
    tokens = (start + torch.arange(LENGTH + 1) * (1 + start % 3)) % VOCABULARY
    return torch.utils.data.TensorDataset(tokens[:, :-1], tokens[:, 1:])


def train(model, dataset, epochs=5, shuffle=True):
    loader = torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=shuffle)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, weight_decay=0.1)
    total_steps, warmup = epochs * len(loader), 4
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            (step + 1) / warmup
            if step < warmup
            else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total_steps - warmup)))
        ),
    )
    losses = []
    for _ in range(epochs):
        total = 0.0
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(x)
        losses.append(total / len(dataset))
    return losses


if __name__ == "__main__":
    print(train(GPT(), data()))

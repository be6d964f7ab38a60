"""A small GPT with tied weights: the port of gpt_torch.py."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_fit import Trainer
from mlx_fit.interop.torch import optimizers, param_groups
from mlx_fit.schedules import warmup_cosine

VOCABULARY, LENGTH, SIZE, HEADS = 17, 12, 16, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = nn.LayerNorm(SIZE)
        self.qkv = nn.Linear(SIZE, 3 * SIZE)
        self.out = nn.Linear(SIZE, SIZE)
        self.norm2 = nn.LayerNorm(SIZE)
        self.mlp = nn.Sequential(nn.Linear(SIZE, 64), nn.GELU("tanh"), nn.Linear(64, SIZE))

    def __call__(self, x):
        batch, length, _ = x.shape
        heads = self.qkv(self.norm1(x)).reshape(batch, length, 3, HEADS, -1)
        q, k, v = heads.transpose(2, 0, 3, 1, 4)
        scale = (SIZE // HEADS) ** -0.5
        attended = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
        x = x + self.out(attended.transpose(0, 2, 1, 3).reshape(batch, length, SIZE))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, SIZE)
        self.wpe = nn.Embedding(LENGTH, SIZE)
        self.blocks = [Block(), Block()]
        self.norm = nn.LayerNorm(SIZE)

    def __call__(self, tokens):
        x = self.wte(tokens) + self.wpe(mx.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.wte.as_linear(self.norm(x))  # the tied head


def data(rows=128):
    start = np.arange(rows)[:, None]
    tokens = (start + np.arange(LENGTH + 1) * (1 + start % 3)) % VOCABULARY
    return tokens[:, :-1], tokens[:, 1:]


def train(model, dataset, epochs=5, shuffle=True):
    num_steps = epochs * math.ceil(len(dataset[0]) / 16)
    optimizer = param_groups(
        model,
        optimizers.AdamW,
        no_decay=True,
        lr=warmup_cosine(3e-3, num_steps, warmup_steps=4),
        weight_decay=0.1,
    )
    trainer = Trainer(model, optimizer, "cross_entropy", batch_size=16, clip_norm=1.0)
    return trainer.fit(dataset, epochs=epochs, shuffle=shuffle, verbose=0).history["loss"]


if __name__ == "__main__":
    print(train(GPT(), data()))

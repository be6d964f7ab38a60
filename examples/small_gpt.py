"""A small transformer written with ``mlx.nn``, and a callback that shows what it writes."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_fit import Callback, TensorBoard


class Block(nn.Module):
    def __init__(self, size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.RMSNorm(size)
        self.qkv = nn.Linear(size, 3 * size, bias=False)
        self.out = nn.Linear(size, size, bias=False)
        self.rope = nn.RoPE(size // num_heads)
        self.norm2 = nn.RMSNorm(size)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.ReLU2(), nn.Linear(4 * size, size))
        self.dropout = nn.Dropout(dropout)

    def __call__(self, x: mx.array, mask: mx.array | str) -> mx.array:
        batch, length, size = x.shape
        heads = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.num_heads, -1)
        q, k, v = heads.transpose(2, 0, 3, 1, 4)
        q, k = self.rope(q), self.rope(k)
        scale = (size // self.num_heads) ** -0.5
        attended = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
        attended = attended.transpose(0, 2, 1, 3).reshape(batch, length, size)
        x = x + self.dropout(self.out(attended))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """Tokens of shape ``(batch, length)`` to logits of shape ``(batch, length, vocabulary)``.

    ``segments``, of the tokens' shape, numbers the documents of packed rows: a token sees its own.
    """

    def __init__(
        self,
        vocabulary: int,
        size: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size)
        self.blocks = [Block(size, num_heads, dropout) for _ in range(num_layers)]
        self.norm = nn.RMSNorm(size)

    def __call__(self, tokens: mx.array, segments: mx.array | None = None) -> mx.array:
        mask: mx.array | str = "causal"
        if segments is not None:
            is_same = segments[:, None, :, None] == segments[:, None, None, :]
            mask = is_same & mx.tril(mx.ones((tokens.shape[1],) * 2, mx.bool_))
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.embedding.as_linear(self.norm(x))  # a tied head


def sample(
    model: nn.Module, prompt: np.ndarray, num_tokens: int, window: int, temperature: float = 0.8
) -> np.ndarray:
    """The prompt and ``num_tokens`` more. Simple and slow: the window is read anew each time.

    It draws from a key of its own, so that training goes on as if nothing had been sampled.
    """
    tokens, key = list(prompt), mx.random.key(0)
    was_training = model.training
    model.eval()
    for _ in range(num_tokens):
        key, draw = mx.random.split(key)
        # Padding on the right, which causal attention does not see, keeps the shape the same.
        seen = tokens[-window:]
        padded = np.zeros((1, window), np.int32)
        padded[0, : len(seen)] = seen
        logits = model(mx.array(padded))[0, len(seen) - 1]
        tokens.append(int(mx.random.categorical(logits / temperature, key=draw)))
    model.train(was_training)
    return np.array(tokens)


NUM_SAMPLED = 200


class Samples(Callback):
    """Shows after every validation what the model writes by now."""

    def __init__(
        self,
        board: TensorBoard,
        prompt: np.ndarray,
        decode: Callable[[np.ndarray], str],
        window: int,
    ) -> None:
        self.board = board
        self.prompt = prompt
        self.decode = decode
        self.window = window

    def on_validation_end(self, logs: dict) -> None:
        text = self.decode(sample(self.model, self.prompt, NUM_SAMPLED, self.window))
        print(f"\nafter {self.trainer.step} steps, validation loss {logs['val_loss']:.3f}:\n{text}")
        self.board.add_text("sample", f"```\n{text}\n```", self.trainer.step)

"""A variational autoencoder: the port of vae_torch.py. A loss of its own is an objective."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_fit import Trainer, datasets
from mlx_fit.interop.torch import optimizers


class VAE(nn.Module):
    def __init__(self, latent=4):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, 32), nn.GELU(), nn.Linear(32, 64))

    def __call__(self, x, noise):
        mean, log_variance = mx.split(self.encoder(x), 2, axis=-1)
        z = mean + noise * mx.exp(0.5 * log_variance)
        return self.decoder(z), mean, log_variance


def objective(model, batch):
    x, noise = batch
    logits, mean, log_variance = model(x, noise)
    reconstruction = nn.losses.binary_cross_entropy(logits, x, reduction="sum")
    divergence = -0.5 * (1 + log_variance - mean**2 - mx.exp(log_variance)).sum()
    return (reconstruction + divergence) / len(x)


def data(rows=1500, latent=4):
    images, _ = datasets.digits()
    x = images[:rows].reshape(-1, 64).astype(np.float32)
    noise = np.random.default_rng(0).normal(size=(len(x), latent)).astype(np.float32)
    return x, noise


def train(model, dataset, epochs=5, shuffle=True):
    trainer = Trainer(model, optimizers.AdamW(lr=1e-3), objective=objective, batch_size=32)
    return trainer.fit(dataset, epochs=epochs, shuffle=shuffle, verbose=0).history["loss"]


if __name__ == "__main__":
    print(train(VAE(), data()))

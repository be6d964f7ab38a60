"""A variational autoencoder: the PyTorch script. Its port is vae_mlx.py.

The noise comes with the data here, so that two libraries can be compared.
"""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from mlx_fit import datasets


class VAE(nn.Module):
    def __init__(self, latent=4):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent, 32), nn.GELU(), nn.Linear(32, 64))

    def forward(self, x, noise):
        mean, log_variance = self.encoder(x).chunk(2, dim=-1)
        z = mean + noise * torch.exp(0.5 * log_variance)
        return self.decoder(z), mean, log_variance


def data(rows=1500, latent=4):
    images, _ = datasets.digits()
    x = torch.tensor(images[:rows].reshape(-1, 64), dtype=torch.float32)
    noise = torch.randn(len(x), latent, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.TensorDataset(x, noise)


def train(model, dataset, epochs=5, shuffle=True):
    loader = torch.utils.data.DataLoader(dataset, batch_size=32, shuffle=shuffle)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(epochs):
        total = 0.0
        for x, noise in loader:
            optimizer.zero_grad()
            logits, mean, log_variance = model(x, noise)
            reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
            divergence = -0.5 * (1 + log_variance - mean**2 - log_variance.exp()).sum()
            loss = (reconstruction + divergence) / len(x)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(x)
        losses.append(total / len(dataset))
    return losses


if __name__ == "__main__":
    print(train(VAE(), data()))

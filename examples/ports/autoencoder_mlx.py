"""An autoencoder: the port of autoencoder_lightning.py. Module and data module keep their form."""

import mlx.nn as nn
import numpy as np

from mlx_fit import DataLoader, datasets
from mlx_fit.interop.torch import optimizers
from mlx_fit.lightning import LightningModule, lightning_trainer


class Autoencoder(LightningModule):
    def __init__(self, width=32, latent=8):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, latent))
        self.decoder = nn.Sequential(nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, 64))

    def forward(self, x):
        return self.decoder(self.encoder(x))

    def training_step(self, batch, batch_idx):
        (x,) = batch
        loss = nn.losses.mse_loss(self(x), x)
        self.log("mse", loss)  # the history has it by epoch, and with "val_" for validation
        return loss

    def configure_optimizers(self):
        return optimizers.Adam(lr=1e-2)


class Digits:
    def __init__(self, rows=1500, shuffle=True):
        self.rows, self.shuffle = rows, shuffle

    def setup(self, stage):
        images, _ = datasets.digits()
        x = images[: self.rows].reshape(-1, 64).astype(np.float32)
        num_train = self.rows * 5 // 6
        self.train, self.val = (x[:num_train],), (x[num_train:],)

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=32, shuffle=self.shuffle)

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=32)


def train(model, data, epochs=5):
    history = lightning_trainer(model).fit(data, epochs=epochs, verbose=0).history
    return history["mse"], history["val_mse"]


if __name__ == "__main__":
    print(train(Autoencoder(), Digits()))

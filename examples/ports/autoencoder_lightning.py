"""An autoencoder: the Lightning script. Its port is autoencoder_mlx.py."""

import lightning as L  # noqa: N812
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from mlx_fit import datasets


class Autoencoder(L.LightningModule):
    def __init__(self, width=32, latent=8):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, latent))
        self.decoder = nn.Sequential(nn.Linear(latent, width), nn.ReLU(), nn.Linear(width, 64))

    def forward(self, x):
        return self.decoder(self.encoder(x))

    def training_step(self, batch, batch_idx):
        (x,) = batch
        loss = F.mse_loss(self(x), x)
        self.log("train_mse", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        (x,) = batch
        self.log("val_mse", F.mse_loss(self(x), x))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Digits(L.LightningDataModule):
    def __init__(self, rows=1500, shuffle=True):
        super().__init__()
        self.rows, self.shuffle = rows, shuffle

    def setup(self, stage):
        images, _ = datasets.digits()
        x = torch.tensor(images[: self.rows].reshape(-1, 64), dtype=torch.float32)
        num_train = self.rows * 5 // 6
        self.train = torch.utils.data.TensorDataset(x[:num_train])
        self.val = torch.utils.data.TensorDataset(x[num_train:])

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.train, batch_size=32, shuffle=self.shuffle)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(self.val, batch_size=32)


class Losses(L.Callback):
    """Lightning keeps no history: this does."""

    def __init__(self):
        self.train, self.val = [], []

    def on_train_epoch_end(self, trainer, module):
        self.train.append(trainer.callback_metrics["train_mse"].item())
        self.val.append(trainer.callback_metrics["val_mse"].item())


def train(model, data, epochs=5):
    losses = Losses()
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[losses],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, datamodule=data)
    return losses.train, losses.val


if __name__ == "__main__":
    print(train(Autoencoder(), Digits()))

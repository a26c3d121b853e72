"""Lightning: a Trainer trains a ticket, fast_swamp prunes it on the same data, and the Trainer evaluates the result."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_a_lightning_module_and_its_data(tmp_path):
    pytest.importorskip("lightning", reason="needs the extra integrations, from pyproject.toml")
    import lightning
    import torch
    import torch.nn.functional as F
    from sklearn.datasets import load_digits
    from torch.utils.data import DataLoader, TensorDataset, random_split

    from swamp_fast import fast_swamp
    from swamp_fast.models import SmallCNN

    class Digits(lightning.LightningDataModule):
        def setup(self, stage):
            digits = load_digits()
            data = TensorDataset(torch.tensor(digits.images[:, None] / 16).float(), torch.tensor(digits.target))
            self.train, self.val = random_split(data, [1500, 297], torch.Generator().manual_seed(0))

        def train_dataloader(self):
            return DataLoader(self.train, batch_size=64, shuffle=True)

        def val_dataloader(self):
            return DataLoader(self.val, batch_size=64)

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = SmallCNN(1, 10)

        def forward(self, images):
            return self.network(images)

        def training_step(self, batch, _):
            images, labels = batch
            return F.cross_entropy(self(images), labels)

        def validation_step(self, batch, _):
            images, labels = batch
            self.log("accuracy", (self(images).argmax(1) == labels).float().mean())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    data, model = Digits(), Classifier()
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(model, data)
    settings = {"ticket_epochs": 0, "epochs": 2, "cycles": 2, "particles": 2, "lr": 0.05, "progress": False}
    result = fast_swamp(model, data.train_dataloader(), val=data.val_dataloader(), **settings)
    (scores,) = trainer.validate(result.model, data, verbose=False)

    assert scores["accuracy"] == pytest.approx(result.history[-1]["val_accuracy"], abs=1e-6)
    assert scores["accuracy"] > 0.5

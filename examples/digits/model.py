"""The digits job: scikit-learn's 1,797 real handwritten digits, and a small convolutional classifier with dropout."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from milepost import LightningModule

TRAIN_SAMPLES = 1437
BATCH_SIZE = 32


class Digits(Dataset[tuple[Tensor, int, int]]):
    """Images of shape (1, 8, 8) in [0, 1], label, and index in the full set, so that a log can name samples."""

    def __init__(self, first: int, stop: int) -> None:
        digits = load_digits()
        self.images = torch.tensor(digits.images[first:stop] / 16.0, dtype=torch.float32).unsqueeze(1)
        self.labels = digits.target[first:stop].tolist()
        self.first = first

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        return self.images[index], self.labels[index], self.first + index


class DigitsClassifier(LightningModule):
    """Two convolutions, dropout, one linear layer; logs `val_acc`, the share of validation digits read correctly."""

    def __init__(self, learning_rate: float = 1e-3, dropout: float = 0.3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.net = nn.Sequential(
            nn.Conv2d(1, 48, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(48, 96, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(96 * 16, 10),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, 1, 8, 8) to class scores (batch, 10)."""
        scores: Tensor = self.net(images)
        return scores

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels, _ = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        images, labels, _ = batch
        correct = (self(images).argmax(dim=1) == labels).float().mean()
        self.log("val_acc", correct, prog_bar=True, batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int, int]]:
        return DataLoader(Digits(0, TRAIN_SAMPLES), batch_size=BATCH_SIZE, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int, int]]:
        return DataLoader(Digits(TRAIN_SAMPLES, 1797), batch_size=BATCH_SIZE)

"""Trains a small pixel-space diffusion transformer with LightningCLI, with SLA2 switched on in YAML alone.

    python examples/train_jit.py fit -c examples/train_jit.yaml
    python examples/train_jit.py fit -c examples/train_jit.yaml --ckpt_path last.ckpt      # resume

The LightningModule knows nothing of SLA2: the configuration wraps its model in `sla2_compile.lightning.sla2_denoiser`
and adds callbacks. It has what such trainings have: an EMA copied in `__init__`, bf16-mixed, gradient clipping, and
checkpoints without the state of callbacks.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.cli import LightningCLI
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).parent))
from jit import JiT, JiTConfig, diffusion_loss

PHOTO = Path(__file__).parent / "data" / "astronaut.jpg"


def jit(patch: int = 4, width: int = 64, depth: int = 2, head_dim: int = 32, classes: int = 2) -> nn.Module:
    """A JiT of these sizes: what a configuration names as the model."""
    return JiT(JiTConfig(patch=patch, width=width, depth=depth, head_dim=head_dim, classes=classes))


class Crops(Dataset[tuple[Tensor, int]]):
    """Square crops of the photograph, half of them mirrored, which is their label.

    Args:
        size: pixels along a side; count: how many there are, the same ones in each epoch.
    """

    def __init__(self, size: int, count: int) -> None:
        pixels = np.asarray(Image.open(PHOTO).convert("RGB")).copy()
        self.photo = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1.0
        self.size, self.count = size, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        full = min(self.photo.shape[1:])
        side = int(torch.randint(full // 2, full, (), generator=generator))
        top, left = (int(torch.randint(n - side + 1, (), generator=generator)) for n in self.photo.shape[1:])
        crop = self.photo[None, :, top : top + side, left : left + side]
        crop = F.interpolate(crop, size=(self.size, self.size), mode="area")[0]
        return (crop.flip(-1), 1) if index % 2 else (crop, 0)


class CropsModule(pl.LightningDataModule):
    """Batches of crops."""

    def __init__(self, size: int = 64, count: int = 256, batch_size: int = 4) -> None:
        super().__init__()
        self.size, self.count, self.batch_size = size, count, batch_size

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        return DataLoader(Crops(self.size, self.count), self.batch_size, drop_last=True)


class Diffusion(pl.LightningModule):
    """Trains a denoiser, and keeps an exponential moving average of it.

    Args:
        denoiser: the model, called as denoiser(x, t, y).
        lr: learning rate of AdamW.
        ema_decay: of the average, per step.
    """

    def __init__(self, denoiser: nn.Module, lr: float = 1e-4, ema_decay: float = 0.99) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.ema_denoiser = copy.deepcopy(denoiser).requires_grad_(False)
        self.lr, self.ema_decay = lr, ema_decay

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        # noise and times depend on the step alone, so that a resumed training draws the same
        generator = torch.Generator().manual_seed(self.global_step)
        t = torch.sigmoid(0.8 * torch.randn(x.shape[0], generator=generator) - 0.4).to(x)
        noise = torch.randn(x.shape, generator=generator).to(x)
        loss = diffusion_loss(self.denoiser, x, y, t, noise)
        self.log("loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        average, now = ([p.detach() for p in m.parameters()] for m in (self.ema_denoiser, self.denoiser))
        torch._foreach_lerp_(average, now, 1 - self.ema_decay)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.denoiser.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=self.lr, weight_decay=0.0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # as some trainers do, to resume with other callbacks; the schedule is in the model's state dict
        checkpoint.pop("callbacks", None)


def main(args: list[str] | None = None) -> LightningCLI:
    """Run the command line; args: instead of the process's own."""
    return LightningCLI(
        pl.LightningModule, pl.LightningDataModule, subclass_mode_model=True, subclass_mode_data=True,
        save_config_callback=None, args=args,
    )  # fmt: skip


if __name__ == "__main__":
    main()

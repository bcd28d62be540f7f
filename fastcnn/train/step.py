"""One optimisation step: forward, loss, backward, clipping, update, averaging, figures.

Nothing here waits for the device: the learning rate is a function of the step's number, the loss
scaler's check stays in the optimiser's kernel, and the figures are summed on the device.
"""

import torch
from torch import Tensor, nn

from fastcnn.config import OptimConfig
from fastcnn.train.ema import Ema
from fastcnn.train.metrics import Metrics, cross_entropy
from fastcnn.train.mix import mix
from fastcnn.train.optimizer import build_optimizer, set_learning_rate
from fastcnn.train.precision import Precision
from fastcnn.train.schedule import learning_rate


class TrainStep:
    """Model, optimiser, loss scaler and averaged weights, advanced a batch at a time."""

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        precision: Precision,
        steps_per_epoch: int,
        seed: int,
        device: torch.device,
    ):
        self.model = model
        self.config = config
        self.precision = precision
        self.steps_per_epoch = steps_per_epoch
        self.seed = seed
        self.step = 0
        self.optimizer = build_optimizer(model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision.scales_loss)
        self.ema = Ema(model, config.ema) if config.ema else None
        self.metrics = Metrics(device)

    def lr_of(self, step: int) -> float:
        """Learning rate of step `step` (0-based, over the whole run)."""
        return learning_rate(step, self.steps_per_epoch, self.config)

    @property
    def evaluated_model(self) -> nn.Module:
        """The model whose accuracy counts: the averaged one if there is one."""
        return self.ema.model if self.ema else self.model

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Train on images (N, 3, H, W), channels-last, and labels int64 (N,)."""
        set_learning_rate(self.optimizer, self.lr_of(self.step))
        self.optimizer.zero_grad(set_to_none=True)
        loss, logits = self._forward(images, labels)
        self.scaler.scale(loss).backward()
        if self.config.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema:
            self.ema.update(self.model, self.step)
        self.metrics.update(loss.detach(), logits.detach(), labels)
        self.step += 1

    def _forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        smoothing = self.config.label_smoothing
        if not (self.config.mixup or self.config.cutmix):
            with self.precision.autocast():
                logits = self.model(images)
            return cross_entropy(logits, labels, smoothing), logits
        mixed = mix(images, labels, self.config, self.seed, self.step)
        with self.precision.autocast():
            logits = self.model(mixed.images)
        first = cross_entropy(logits, mixed.labels, smoothing)
        second = cross_entropy(logits, mixed.others, smoothing)
        return mixed.weight * first + (1 - mixed.weight) * second, logits

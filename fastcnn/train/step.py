"""One optimisation step: batch, forward, loss, backward, clipping, update, averaging, figures.

Nothing in it waits for the device, and nothing that changes from step to step is a number on the
host: the learning rate, the averages' weight and the mixing of each step of an epoch lie in a table
on the device, beside a clock that the step itself moves on. So a step can be captured as a CUDA
graph and replayed.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastcnn.config import OptimConfig
from fastcnn.data.loaders.upload import upload
from fastcnn.train.checkpoints.checkpoint import load_weights
from fastcnn.train.distributed import ALONE, Distributed, parallel
from fastcnn.train.graph import WARM_UP, GraphMode, Recorder, Replay, recorder_for
from fastcnn.train.metrics import Metrics, cross_entropy
from fastcnn.train.numerics.guard import Guard
from fastcnn.train.numerics.half import half_network, refresh
from fastcnn.train.numerics.precision import Precision
from fastcnn.train.numerics.scaling import LossScale, gradient_factor
from fastcnn.train.optim import mix
from fastcnn.train.optim.ema import Ema, move_of
from fastcnn.train.optim.optimizer import Optimizer
from fastcnn.train.optim.schedule import learning_rate

PARALLEL_WARM_UP = 11  # steps until DistributedDataParallel has settled its buckets


class TrainStep:
    """Model, optimiser, loss scale and averaged weights, advanced a batch at a time.

    `model` holds the fp32 weights; with half precision the step computes with copies of them.
    `graph`: whether steps become CUDA graphs; `replay.note` says why they could not. `ranks`: whose
    gradients are averaged; `last_weight`: what this rank's last batch of an epoch counts in that.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        precision: Precision,
        steps_per_epoch: int,
        seed: int,
        device: torch.device,
        *,
        graph: GraphMode = "off",
        backend: str = "auto",
        recorder: Recorder | None = None,
        ranks: Distributed = ALONE,
        last_weight: float = 1.0,
    ):
        self.model = model
        self.config = config
        self.precision = precision
        self.steps_per_epoch = steps_per_epoch
        self.seed = seed
        self.step = 0
        self.scale = LossScale(device) if precision.scales_loss else None
        # before anything takes a copy of the model, or a reference to its statistics
        self.guard = Guard(model, self.scale, device, backend)
        self.network, self._halves = half_network(model, precision.dtype)
        self.ema = Ema(model) if config.ema else None
        averages = self.ema.parameters if self.ema else ()
        self.optimizer = Optimizer(model, config, self._halves, averages, backend)
        self.metrics = Metrics(device)
        self.mixes = bool(config.mixup or config.cutmix)
        self.ranks, self.last_weight = ranks, last_weight
        recorder = recorder or recorder_for(device, graph)
        # its exchange runs on the stream that it was made on, which a capture must see
        with recorder.aside() if recorder else nullcontext():
            self._parallel = parallel(self.network, ranks, device)
        self._settled = False
        columns = 3 + (mix.NUMBERS if self.mixes else 0)
        self._table = torch.zeros(steps_per_epoch, columns, device=device)
        self._clock = torch.zeros(1, dtype=torch.int64, device=device)
        self._table_epoch = self._clock_step = -1
        self.replay = Replay(
            recorder,
            required=graph == "on",
            warm_up=WARM_UP if self._parallel is None else PARALLEL_WARM_UP,
        )

    def lr_of(self, step: int) -> float:
        """Learning rate of step `step` (0-based, over the whole run)."""
        return learning_rate(step, self.steps_per_epoch, self.config)

    @property
    def evaluated_model(self) -> nn.Module:
        """The model whose accuracy counts: the averaged one if there is one."""
        return self.ema.model if self.ema else self.model

    def epoch(self, loader: Any) -> Iterator[None]:
        """Train on the rest of the loader's epoch; yields after each step."""
        self.network.train()
        steps = self.replay.epoch(loader, self._work)
        while True:
            self._prepare()
            if next(steps, None) is None:
                return
            self.step += 1
            yield

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Train on images (N, 3, H, W), channels-last, and labels int64 (N,)."""
        self._prepare()
        self.replay.feed(images, labels, self._work)
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the random generators and the loader's position."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scale": self.scale.state_dict() if self.scale else None,
            "guard": self.guard.state_dict(),
            "sums": self.metrics.sums.clone(),
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any], where: Path) -> None:
        """Take up a state from the checkpoint `where`.

        Raises CheckpointError for weights of another network, and as `Optimizer.load_state_dict`.
        """
        load_weights(self.model, state["model"], where)
        if self.ema:
            load_weights(self.ema.model, state["ema"], where)
        refresh(self._halves)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scale:
            self.scale.load_state_dict(state["scale"])
        self.guard.load_state_dict(state["guard"])
        self.step = state["step"]
        self.metrics.load(state["sums"], self.step % self.steps_per_epoch, self.ranks)

    def _prepare(self) -> None:
        """Bring table and clock to the step that comes: at the start, and when an epoch begins."""
        epoch, position = divmod(self.step, self.steps_per_epoch)
        if epoch != self._table_epoch:
            upload(self._table, torch.tensor(self._rows(epoch), dtype=torch.float32))
            self._table_epoch = epoch
        if self.step != self._clock_step or position == 0:
            self._clock.fill_(position)
        self._clock_step = self.step + 1

    def _rows(self, epoch: int) -> list[list[float]]:
        """Learning rate, move of the averages, weight of the loss and mixing of each step of an
        epoch."""
        rows = []
        for step in range(epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch):
            last = (step + 1) % self.steps_per_epoch == 0
            weight = self.last_weight if last else 1.0
            row = [self.lr_of(step), move_of(self.config.ema, step), weight]
            rows.append(row + list(mix.draw(self.config, self.seed, step) if self.mixes else ()))
        return rows

    def forward(self, images: Tensor, labels: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Loss and logits that step `position` (0-based) of the present epoch has of a batch."""
        return self._forward(self.network, images, labels, self._table[position])

    def _work(self, images: Tensor, labels: Tensor) -> None:
        """One step, on the device alone."""
        if self._parallel is not None and not self._settled:
            self._settle(self._parallel, images)
        row = self._table.index_select(0, self._clock)[0]
        self.guard.snapshot()
        loss, logits = self._forward(self._parallel or self.network, images, labels, row)
        gradients = self._gradients(loss * self.scale.scale[0] if self.scale else loss, row[2])
        aligned = self.optimizer.aligned(gradients)
        uncounted = self.guard.check_finite(aligned, loss)
        factor = gradient_factor(gradients, self.config.clip_grad, self.scale)
        self.optimizer.step(aligned, row[:2], factor, self.guard.found)
        self.guard.commit()
        if self.ema:
            self.ema.update_statistics(row[1])
        self.metrics.update(loss.detach(), logits.detach(), labels, uncounted)
        self._clock += 1

    def _settle(self, parallel: nn.Module, images: Tensor) -> None:
        """Go forward and backward once without a trace.

        DistributedDataParallel lays out its buckets anew after a process's first backward, and then
        adds up the ranks' gradients in another order: a resumed run would do so a second time.
        """
        statistics = self.guard.statistics
        before = None if statistics is None else statistics.clone()
        with torch.random.fork_rng([images.device] if images.is_cuda else []):
            parallel(images.to(self.precision.dtype or images.dtype)).sum().backward()
        if statistics is not None and before is not None:
            statistics.copy_(before)
        self._settled = True

    def _gradients(self, loss: Tensor, weight: Tensor) -> list[Tensor]:
        """Gradients of the optimiser's leaves, the mean over the ranks where there are several."""
        leaves = self.optimizer.leaves
        if self._parallel is None:
            return list(torch.autograd.grad(loss, leaves))
        for leaf in leaves:
            leaf.grad = None  # a view into the bucket that is averaged, once the backward has run
        (loss * weight).backward()
        return [cast(Tensor, leaf.grad) for leaf in leaves]

    def _forward(
        self, network: nn.Module, images: Tensor, labels: Tensor, row: Tensor
    ) -> tuple[Tensor, Tensor]:
        how = (self.config.label_smoothing, self.config.loss)
        images = images.to(self.precision.dtype or images.dtype)
        if not self.mixes:
            logits = network(images)
            return cross_entropy(logits, labels, *how), logits
        images, own = mix.mix(images, row[3:])
        logits = network(images)
        first = cross_entropy(logits, labels, *how)
        second = cross_entropy(logits, labels.roll(1), *how)
        return own * first + (1 - own) * second, logits

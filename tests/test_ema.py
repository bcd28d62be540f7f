"""The averaged model against the recurrence written out."""

import torch
from torch import nn

from fastcnn.train.ema import Ema


def test_shadow_follows_the_recurrence_in_weights_and_statistics():
    model = nn.BatchNorm1d(3)
    ema = Ema(model, 0.9)
    weight, mean = model.weight.detach().clone(), model.running_mean.clone()
    for step in range(300):
        with torch.no_grad():
            model.weight.normal_()
            model.running_mean.normal_()
            model.num_batches_tracked += 1
        ema.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        weight = decay * weight + (1 - decay) * model.weight.detach()
        mean = decay * mean + (1 - decay) * model.running_mean
    torch.testing.assert_close(ema.model.weight, weight)
    torch.testing.assert_close(ema.model.running_mean, mean)
    assert ema.model.num_batches_tracked == 300
    assert not ema.model.training
    assert not ema.model.weight.requires_grad

"""Figures against scikit-learn and torchmetrics."""

import pytest
import torch
from torch.nn import functional as F

from fastcnn.train.metrics import Metrics, confusion, cross_entropy


@pytest.mark.parametrize("classes", [2, 4, 10, 200])
def test_sums_over_uneven_batches_are_means_over_images(classes):
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(103, classes, generator=generator)
    labels = torch.randint(classes, (103,), generator=generator)
    metrics = Metrics(torch.device("cpu"))
    for part in torch.arange(103).split(20):
        loss = cross_entropy(logits[part], labels[part])
        metrics.update(loss, logits[part], labels[part])
    figures = metrics.read()
    assert figures.images == 103
    assert figures.loss == pytest.approx(F.cross_entropy(logits.double(), labels).item(), rel=1e-5)
    every = range(classes)
    for k, found in ((1, figures.top1), (min(5, classes), figures.top5)):
        if k < classes and classes > 2:
            oracle = sklearn_metrics.top_k_accuracy_score(labels, logits, k=k, labels=every)
        else:
            oracle = (logits.argmax(1) == labels).double().mean().item() if k == 1 else 1.0
        assert found == pytest.approx(oracle)


def test_reset_forgets():
    metrics = Metrics(torch.device("cpu"))
    metrics.update(torch.tensor(1.0), torch.eye(3), torch.arange(3))
    metrics.reset()
    assert metrics.read().images == 0


def test_confusion_is_scikit_learns():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(3)
    logits, labels = torch.randn(500, 7, generator=generator), torch.randint(6, (500,))
    oracle = sklearn_metrics.confusion_matrix(labels, logits.argmax(1), labels=range(7))
    assert confusion(logits, labels).tolist() == oracle.tolist()


def test_cross_entropy_is_fp32_with_smoothing():
    logits, labels = torch.randn(8, 5).bfloat16(), torch.arange(8) % 5
    found = cross_entropy(logits, labels, 0.1)
    assert found.dtype is torch.float32
    log_p = logits.float().log_softmax(1)
    target = torch.full((8, 5), 0.02).scatter(1, labels[:, None], 0.92)
    torch.testing.assert_close(found, -(target * log_p).sum(1).mean())


def test_cross_entropy_of_a_softmax_taken_for_logits():
    logits, labels = torch.randn(8, 5), torch.arange(8) % 5
    p = logits.softmax(1)
    expected = -(p.gather(1, labels[:, None])[:, 0] - p.exp().sum(1).log()).mean()
    torch.testing.assert_close(cross_entropy(logits, labels, loss="softmax-twice"), expected)
    sure = torch.full((1, 5), -99.0).index_fill(1, torch.tensor([2]), 99.0)
    floor = cross_entropy(sure, torch.tensor([2]), loss="softmax-twice")
    assert float(floor) == pytest.approx(torch.log(torch.tensor(4 + torch.e)).item() - 1)

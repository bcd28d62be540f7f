"""An experiment as planned, and results of it without a training."""

from fastcnn.reports.catalogue import REPORTS
from fastcnn.reports.outcome import results_by_key
from fastcnn.reports.planning import Images, plan_experiment
from fastcnn.study.options import ReproduceOptions
from fastcnn.study.plan import RunResult, VariantResult

CIFAR = Images("cifar10", 50_000, 10_000, True)
TRIAL = Images("digits", 1_438, 359, False, False)


def planned(key, experiment, root, images=CIFAR, **options):
    report = REPORTS[key]
    options = ReproduceOptions(output=str(root), **options)
    return plan_experiment(report, report.experiment(experiment), images, options, {})


def reached(one, figures):
    """Results of a planned experiment: by row, a list of (top-1, top-5, seconds) in percent."""
    found = []
    for variant in one.variants:
        runs = tuple(
            RunResult(
                seed,
                one.root / variant.key / f"seed-{seed}",
                {
                    "test_top1": top1 / 100,
                    "test_top5": top5 / 100,
                    "test_loss": 7.0,
                    "train_seconds": seconds,
                    "images": {"test": 1000},
                    "epochs": 2,
                },
                {"epoch": [1.0], "train_loss": [float(seed)]},
            )
            for seed, (top1, top5, seconds) in enumerate(figures.get(variant.key, []))
        )
        found.append(VariantResult(variant, runs))
    return results_by_key(found)

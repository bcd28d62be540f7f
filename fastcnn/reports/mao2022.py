"""mao2022: what filters, layers, activation, dropout and batch norm add to a small CNN, and what
batch size, learning rate and shuffling do to the best of them."""

from dataclasses import replace

from fastcnn.reports.experiment import Claim, Experiment, Published, Report, Row

STRUCTURE = {
    "mao-default": ("Default", 69.32),
    "mao-filters": ("64, 128, 256 filters", 71.46),
    "mao-fc": ("Default + FC 128", 70.18),
    "mao-kernels": ("Kernels 7, 5, 3", 70.03),
    "mao-leaky": ("Leaky ReLU", 71.99),
    "mao-dropout": ("Leaky ReLU, dropout", 73.58),
    "mao-batchnorm": ("Leaky ReLU, dropout, batch norm", 74.87),
}

ROWS = tuple(
    Row(arch, label, {"arch": arch, "recipe": "report"}, Published(top1, place=0.01))
    for arch, (label, top1) in STRUCTURE.items()
)

# section 4: of the best network; the times are those of its batches of 64 and of 256
BEST = {"arch": "mao-batchnorm", "recipe": "report"}
TRAINING = (
    replace(ROWS[-1], label="As before", published=Published(74.87, seconds=4544, place=0.01)),
    Row(
        "batch-256",
        "Batch size 256",
        BEST | {"batch_size": 256},
        Published(72.36, seconds=4164, place=0.01),
    ),
    Row("lr-0.1", "Learning rate 0.1", BEST | {"lr": 0.1}, Published(73.91, place=0.01)),
    Row("shuffle", "Shuffled", BEST | {"shuffle": True}, Published(74.79, place=0.01)),
)

REPORT = Report(
    "mao2022",
    "EQ2425 Analysis and Search of Visual Data, Project 3: Image Classification using CNNs",
    "Jingxuan Mao, Yuqi Zheng, Aarati Medehal",
    "2022",
    "cifar10",
    (
        Experiment(
            "structure",
            "Network structure",
            "sections 2.2 and 3, figures 2 to 7",
            ROWS,
            (
                Claim("More filters beat the default", "mao-filters", "mao-default"),
                Claim("More filters beat a further layer", "mao-filters", "mao-fc"),
                Claim("Kernels 5, 3, 3 beat 7, 5, 3", "mao-filters", "mao-kernels"),
                Claim("A leaky ReLU beats the ReLU", "mao-leaky", "mao-filters"),
                Claim("Dropout beats none", "mao-dropout", "mao-leaky"),
                Claim("Batch norm beats none", "mao-batchnorm", "mao-dropout"),
            ),
            (
                "Every row was trained once in the report.",
                "Kernels 7, 5, 3: the report's text has 0.7018, its figure 0.7003.",
            ),
            figures=("bars", "losses"),
            modern=("mao-default", "mao-batchnorm"),
            modern_options={"epochs": 300},
        ),
        Experiment(
            "training",
            "Batch size, learning rate, shuffling",
            "section 4, figures 8 to 10",
            TRAINING,
            (
                Claim("Batches of 64 beat those of 256", "mao-batchnorm", "batch-256"),
                Claim("A rate of 0.001 beats 0.1", "mao-batchnorm", "lr-0.1"),
                Claim("The given order beats a new one each epoch", "mao-batchnorm", "shuffle"),
            ),
            ("Every row was trained once in the report; the first one is that of its structure.",),
            figures=("bars", "losses"),
        ),
    ),
)

"""skagerstrom2018: CNNs of nine convolutions on Tiny ImageNet, by solver, norm and penalty."""

from fastcnn.reports.experiment import Claim, Experiment, Published, Report, Row

TABLE3 = {
    "tiny-a": ("A: SGD, RUI", Published(17, 37, place=1)),
    "tiny-b": ("B: Adam, RUI, BN", Published(22, 45, place=1)),
    "tiny-c": ("C: Adam, RUI, dropout", Published(6, 20, place=1)),
    "tiny-d": ("D: Adam, HEI, dropout, BN", Published(29, 55, place=1)),
    "tiny-e": ("E: Adam, HEI, BN, L2", Published(25, 50, place=1)),
    "tiny-f": ("F: Adam, HEI, BN, L2", Published(24, 48, place=1)),
}

REPORT = Report(
    "skagerstrom2018",
    "Classification of ImageNet with Convolutional Neural Networks",
    "W. Skagerström, T. Price, N. Lindqvist",
    "2018",
    "tiny-imagenet",
    (
        Experiment(
            "table3",
            "Six configurations",
            "table 3, figures 4, 6 and 7",
            tuple(
                Row(arch, label, {"arch": arch, "recipe": "report", "grayscale": "drop"}, figures)
                for arch, (label, figures) in TABLE3.items()
            ),
            (
                Claim("D beats A", "tiny-d", "tiny-a"),
                Claim("D beats B", "tiny-d", "tiny-b"),
                Claim("D beats C", "tiny-d", "tiny-c"),
                Claim("D beats E", "tiny-d", "tiny-e"),
                Claim("D beats F", "tiny-d", "tiny-f"),
            ),
            (
                "The published figures are of the validation images, as ours. Grey images are left "
                "out, as in the report.",
            ),
            figures=("bars", "curves"),
            modern=("tiny-d", "resnet18"),
            modern_options={"epochs": 60, "grayscale": "drop"},
        ),
    ),
)

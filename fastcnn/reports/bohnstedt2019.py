"""bohnstedt2019: VGG16 with batch norm on CIFAR-10."""

from fastcnn.reports.experiment import Experiment, Published, Report, Row

REPORT = Report(
    "bohnstedt2019",
    "Image Classification on the CIFAR10 Dataset",
    "Timo Bohnstedt, Tim Löhr",
    "2019",
    "cifar10",
    (
        Experiment(
            "vgg",
            "VGG16 with batch norm",
            "section 4, figure 8",
            (
                Row(
                    "vgg16",
                    "VGG16",
                    {"arch": "vgg16", "recipe": "report"},
                    Published(top1_range=(92.0, 94.0)),
                ),
            ),
            notes=(
                "The report prints no figure of its own, and cites 92 to 94 % as what VGG networks "
                "reach. Published by others for this network: 92.64 (kuangliu/pytorch-cifar), 93.6 "
                "(Keras' cifar-vgg), 94.00 (huyvnphan/PyTorch_CIFAR10), 94.16 "
                "(chenyaofo/pytorch-cifar-models).",
            ),
            modern=("vgg16", "resnet18"),
            modern_options={"epochs": 100},
        ),
    ),
)

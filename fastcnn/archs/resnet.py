"""ResNet-18 for small images: He et al. 2016, table 1, with a 3x3 stem and no pool after it."""

from fastcnn.archs.spec import Conv, GlobalAvgPool, Linear, Network, Residual

STEM = Conv(64, norm=True, post_slope=0.0)
BLOCKS = (
    Residual(64),
    Residual(64),
    Residual(128, stride=2),
    Residual(128),
    Residual(256, stride=2),
    Residual(256),
    Residual(512, stride=2),
    Residual(512),
)

NETWORKS = (
    Network(
        "resnet18",
        "",
        (32, 64),
        10,
        (STEM, *BLOCKS, GlobalAvgPool(), Linear()),
        "The residual network that marie2019 and skagerstrom2018 recommend next, in the form usual "
        "for 32x32 images; shortcuts that change the shape are 1x1 convolutions → BN.",
    ),
)

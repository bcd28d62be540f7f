"""marie2019: the depth of plain CNNs on a part of CIFAR-10 (table 1), and CNN A on all of it."""

"""The version of fastcnn."""

__version__ = "0.1.0"

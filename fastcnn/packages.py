"""Packages that only some commands need: what is missing or broken is told in one line."""

import importlib

from fastcnn.errors import UsageError
from fastcnn.text import first_line


class PackageError(UsageError, ImportError):
    """A package that is missing or cannot be imported."""


def require(*modules: str) -> None:
    """Import modules of other packages. Raises PackageError, which names the package, for one that
    is missing, and for one that raises whatever: a library that is gone, another's version."""
    for module in modules:
        package = module.split(".")[0]
        try:
            importlib.import_module(package)
            importlib.import_module(module)
        except Exception as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == package
            state = "is missing" if missing else f"cannot be imported ({first_line(error)})"
            raise PackageError(f"{package} {state}; see fastcnn doctor", name=package) from error

"""Training: one step, the loop over epochs, checkpoints and the run folder.

The package can be called: fastcnn.train(arch="cnn-a", data="digits", epochs=2) trains and returns
the model; see fastcnn.api.train.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from fastcnn.train.host import share_the_cores


class _Callable(ModuleType):
    """This package as the function of the same name.

    Whatever imports fastcnn.train.loop makes this package the attribute `train` of fastcnn, where
    users look for the function; Python lets a module have a class of its own for such ends ("The
    Python Language Reference", 3.3.2.1). The function lies above this package and needs torch, and
    so is only looked for when it is called.
    """

    def __call__(self, config: Any = None, /, *, quiet: bool = False, **options: Any) -> Any:
        """Train, and return the model: fastcnn.api.train."""
        share_the_cores()
        return import_module("fastcnn.api").train(config, quiet=quiet, **options)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return import_module, (self.__name__,)


sys.modules[__name__].__class__ = _Callable

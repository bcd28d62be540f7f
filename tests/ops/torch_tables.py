"""torch's own tables of operators and their sample inputs."""

from types import ModuleType

import torch


def import_tables() -> ModuleType:
    """The module of `op_db` and its kin, without what its import does to the process.

    It freezes the settings of torch.backends for ever, which `train(deterministic=True)` sets.
    """
    from torch.testing._internal import common_methods_invocations

    settings = torch.backends.flags_frozen.__globals__
    settings["__allow_nonbracketed_mutation_flag"] = True
    assert not torch.backends.flags_frozen()
    return common_methods_invocations

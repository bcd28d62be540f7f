"""A JSON value with one of its parts of another kind, at every place of it."""

import copy

WRONG = (None, True, 3, 2.5, "a text", [], ["a", "b"], [3], [[3]], [None], {}, {"a": 1})


def places(value, path=()):
    """The paths of all parts of a value."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    for name, part in value.items() if isinstance(value, dict) else ():
        yield (*path, name)
        yield from places(part, (*path, name))


def mutated(value):
    """Yield the value with each of its parts replaced by each of WRONG."""
    for *path, name in places(value):
        for wrong in WRONG:
            changed = copy.deepcopy(value)
            where = changed
            for step in path:
                where = where[step]
            where[name] = wrong
            yield changed

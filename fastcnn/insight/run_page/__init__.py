"""The page of a run, and several runs compared."""

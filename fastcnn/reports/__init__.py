"""The experiments of the five student reports as data, and their published figures beside ours."""

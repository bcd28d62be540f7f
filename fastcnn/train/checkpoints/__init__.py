"""Checkpoints: what is saved, their formats, the disk, and loading a run again."""

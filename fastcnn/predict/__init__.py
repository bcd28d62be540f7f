"""Predictions on a user's images: which files, decoded ahead, and the network that judges them."""

"""The operations after a convolution or a linear layer; `reference` holds them in plain torch."""

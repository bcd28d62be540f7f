"""How a step moves the weights: optimisers, the learning rate, averages, mixed images."""

"""PyTorch's own tables of operations and modules, under every strategy, against the plain loop."""

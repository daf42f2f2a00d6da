"""What a loss does while it runs: calls of PyTorch functions, seen and replaced."""

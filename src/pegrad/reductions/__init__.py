"""What a backward pass over a trace is turned into: stacked gradients, norms and weighted sums, inner products."""

"""How each leaf's norms and weighted sum are found: decided from shapes, before the backward pass."""

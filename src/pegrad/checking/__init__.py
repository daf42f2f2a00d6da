"""What `pegrad.check` is made of: the plain loop, the comparison, the report."""

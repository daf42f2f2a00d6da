"""What reproduces the papers: their networks, data, training and comparisons; `import pegrad` does not load it."""

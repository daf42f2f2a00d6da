"""The commands of `python -m pegrad`: one module each, imported when its command runs."""

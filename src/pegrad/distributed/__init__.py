"""Private steps on many machines, by `torch.distributed`."""

"""One thread for the tests: their tensors are tiny, and two threads that wait for each other are slower than one."""

import os

import torch

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

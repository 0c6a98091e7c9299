"""Limit each process of pytest-xdist to one thread, so that tests that run side by side do not wait for each other."""

import os

import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

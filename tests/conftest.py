"""No network, and one thread, so that a result does not depend on how many tests run beside it."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before any test module
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import torch


torch.set_num_threads(1)

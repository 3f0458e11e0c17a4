"""No network, and one thread, so that a result does not depend on how many tests run beside it."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before any test module
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import torch


torch.set_num_threads(1)

# Minutes in few tests: begun first, so that at the end no worker waits for another's.
LONG = {
    "test_train_sd35_ocr",
    "test_two_processes",
    "test_killed",
    "test_notebook",
    "test_hub_push",
    "test_data",
    "test_offline",
    "test_benchmarks",
    "test_dgpo_trainer",
    "test_splits",
    "test_cli",
}


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem not in LONG)

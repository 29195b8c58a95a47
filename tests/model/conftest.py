"""The tiny checkpoint of each version, as our model and in the `rwkv` package."""

import pytest
import torch
from package_model import PackageModel
from tiny_model import TINY, write_checkpoint

from mrss_provider.model import load_model


@pytest.fixture(scope="session", params=[7, 6], ids=["rwkv7", "rwkv6"])
def version(request):
    return request.param


@pytest.fixture(scope="session")
def checkpoint_path(version, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model") / f"tiny{version}.pth", version)


@pytest.fixture(scope="session")
def package_model(checkpoint_path, version):
    return PackageModel(checkpoint_path, version)


@pytest.fixture(scope="session")
def model(checkpoint_path):
    """The tiny model in fp32."""
    return load_model(checkpoint_path, device="cpu", dtype="fp32", threads=1)


@pytest.fixture(scope="session")
def token_ids():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, TINY.vocab_size, (70,), generator=generator)

"""Every test stays off the network, so that no hub is reached by accident, and out of the user's cache."""
import os
import tempfile

import pytest

cache = tempfile.TemporaryDirectory()  # gone when the tests end
os.environ["PRUNING_CACHE"] = cache.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A function that returns the folder of a family's pipeline, which is made once."""
    import torch  # here, as most tests need neither
    from families import FAMILIES
    made = {}

    def make(family):
        if family not in made:
            torch.manual_seed(0)
            made[family] = tmp_path_factory.mktemp("models") / family
            FAMILIES[family]().save_pretrained(made[family], safe_serialization=True)
        return made[family]
    return make

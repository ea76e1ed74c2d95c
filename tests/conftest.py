"""Every test stays off the network, so that no hub is reached by accident, and out of the user's cache."""
import os
import tempfile

cache = tempfile.TemporaryDirectory()  # gone when the tests end
os.environ["PRUNING_CACHE"] = cache.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

"""What all tests share: no network, few threads, and the tiny family."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported

import pytest
import torch

from meswitch.demo.family import family as tiny_family
from meswitch.demo.paths import Family

torch.set_num_threads(min(4, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def family() -> Family:
    """A base and three real fine-tunes of it, trained once and cached."""
    return tiny_family()

"""What all tests share: no network, few threads, and the tiny family."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported

import hypothesis
import pytest
import torch

from meswitch.demo.family import family as tiny_family
from meswitch.demo.paths import Family

torch.set_num_threads(min(4, os.cpu_count() or 1))
hypothesis.settings.register_profile("without deadlines", deadline=None)  # no test depends on the machine's speed
hypothesis.settings.load_profile("without deadlines")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU that torch can use"))


@pytest.fixture(scope="session")
def family() -> Family:
    """A base and three real fine-tunes of it, trained once and cached."""
    return tiny_family()


@pytest.fixture(scope="session")
def cuda_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CUDA driver with the kernels of this project, all of it compiled for the processor.

    `CUDA_HOST_LIBRARY` names one that was compiled otherwise, as `make cuda-check` does.
    """
    from cuda_host import build

    library = os.environ.get("CUDA_HOST_LIBRARY")
    return Path(library) if library else build(tmp_path_factory.mktemp("cuda"))


@pytest.fixture(scope="session")
def example_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the examples of docstrings find where they run: a tiny base, a fine-tune, a LoRA, a delta, and text."""
    from families import config_of, save_finetune, save_random
    from meswitch import compress
    from test_adapter import save_adapter

    folder = tmp_path_factory.mktemp("examples")
    base = save_random(folder / "base", config_of("llama"))
    finetune = save_finetune(folder / "math", base, seed=1)
    save_adapter(base, folder / "math-lora", r=4, target_modules=["q_proj", "v_proj"])
    compress(base, finetune, folder / "experts" / "math")
    for name, count in (("prompts", 12), ("heldout", 4)):
        lines = (f'{{"text": "{number} + 1 = {number + 1}."}}\n' for number in range(count))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    prompts = [("What is {} * 2?", "math"), ("Sing of summer {}.", "base")]
    lines = (
        f'{{"prompt": "{text.format(number)}", "expert": "{expert}"}}\n'
        for number in range(8)
        for text, expert in prompts
    )
    (folder / "labelled.jsonl").write_text("".join(lines))
    return folder

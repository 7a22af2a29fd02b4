"""What is done without deltas: whole models, loaded when they are asked for, as many as the memory holds."""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass
class _Waiting:
    prompt: str
    future: Future[list[int]]


class RestoredModels:
    """Answers with restored checkpoints under transformers' own `generate`; from any thread.

    `room`: how many models are in memory at a time, the least recently used one leaves. One thread serves whoever waits
    for one model in one batch: first those whose models are in memory, then the model that most wait for.
    """

    def __init__(self, base: Path, folders: dict[str, Path], room: int, tokens: int) -> None:
        self._folders, self._room, self._tokens = folders, room, tokens
        self._tokenizer: Any = AutoTokenizer.from_pretrained(base, padding_side="left")
        self._models: OrderedDict[str, Any] = OrderedDict()
        self._waiting: dict[str, list[_Waiting]] = {}
        self._changed = threading.Condition()
        self._closed = False
        self.loads = self.batches = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def generate(self, expert: str, prompt: str) -> list[int]:
        """The new tokens, greedy."""
        waiting = _Waiting(prompt, Future())
        with self._changed:
            self._waiting.setdefault(expert, []).append(waiting)
            self._changed.notify()
        return waiting.future.result()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self._models.clear()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting) or self._closed)
                if self._closed:
                    return
                resident = [name for name in self._waiting if name in self._models]
                name = max(resident or self._waiting, key=lambda name: len(self._waiting[name]))
                batch = self._waiting.pop(name)
            try:
                answers = self._answers(self._model(name), [one.prompt for one in batch])
            except Exception as error:
                for one in batch:
                    one.future.set_exception(error)
                continue
            for one, answer in zip(batch, answers, strict=True):
                one.future.set_result(answer)

    def _model(self, name: str) -> Any:
        if name not in self._models:
            while len(self._models) >= self._room:
                self._models.popitem(last=False)
            self._models[name] = AutoModelForCausalLM.from_pretrained(self._folders[name]).eval()
            self.loads += 1
        self._models.move_to_end(name)
        return self._models[name]

    def _answers(self, model: Any, prompts: list[str]) -> list[list[int]]:
        inputs = self._tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        with torch.inference_mode():
            outputs = model.generate(**inputs, max_new_tokens=self._tokens, do_sample=False)
        self.batches += 1
        return [row[inputs["input_ids"].shape[1] :].tolist() for row in outputs]

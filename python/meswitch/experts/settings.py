"""What a model's own small files say: config, generation config, end-of-sequence ids, tokenizer.

Everything is read when the model is opened and stays with it; nothing is read of a path later. An expert is never given
the base's settings in the place of its own: without a generation_config.json it has the one that transformers makes of
its config.json. Only an expert whose directory has no vocabulary at all speaks with the base's.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from meswitch.delta.directory import Delta
from meswitch.errors import ArchitectureError, CheckpointError, FormatError, MeswitchError, RequestError
from meswitch.experts.files import ContentStore, SmallFiles, base_files, delta_files, written_out
from meswitch.experts.tokenizers import Tokenizer, TokenizerFiles, TokenizerStore
from meswitch.huggingface.config import config_changes, parse_json, text_config

_log = logging.getLogger(__name__)
_CONFIG, _GENERATION = "config.json", "generation_config.json"
_OTHER_WAYS: dict[str, tuple[Any, ...]] = {
    "constraints": (),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "force_words_ids": (),
    "guidance_scale": (1,),
    "max_time": (),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "token_healing": (False,),
}
"""Settings of transformers that ask for a way to decode that the engine has not, and their values that do not ask."""


@dataclass(frozen=True, eq=False)
class ModelSettings:
    """What was read of one model, the base or an expert, when it was opened. May be used from any thread.

    `name`: as errors say it. `config`: its text config. `generation`: its generation config, without what the engine
    does not do. `tokenizer_files`: `None` where it has no tokenizer.
    """

    name: str
    config: Any
    generation: GenerationConfig
    tokenizer_files: TokenizerFiles | None
    tokenizers: TokenizerStore

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Its tokenizer, built when it is first needed: never on the engine's thread. Raises `CheckpointError`."""
        if self.tokenizer_files is None:
            return None
        try:
            return self.tokenizers.get(self.tokenizer_files)
        except Exception as error:  # tokenizers raises what it likes for what is no tokenizer
            cause = error.__cause__ or error
            raise CheckpointError(
                f"the tokenizer of {self.name} does not load: {cause}",
                hint="correct its tokenizer files",
            ) from error

    @property
    def required_tokenizer(self) -> Tokenizer:
        """Its tokenizer. Raises `RequestError` where there is none."""
        tokenizer = self.tokenizer
        if tokenizer is None:
            raise RequestError(f"{self.name} has no tokenizer files", hint="pass prompts as lists of token ids")
        return tokenizer

    @property
    def eos_ids(self) -> set[int]:
        """The ids that end a sequence: by the generation config, else the model's config, else the tokenizer."""
        for owner in (self.generation, self.config):
            if ids := _eos_ids(owner, self.name):
                return ids
        tokenizer = self.tokenizer
        return set() if tokenizer is None else _eos_ids(tokenizer.inner, self.name)


class SettingsReader:
    """Reads the settings of the base in `folder`, at once, and of experts when they are opened.

    `config`: the base's text config. `base`: its settings. Raises `CheckpointError` for a generation_config.json of the
    base that transformers does not read.
    """

    def __init__(self, folder: Path, config: Any) -> None:
        self._contents = ContentStore()
        self._tokenizers = TokenizerStore()
        self._base_files = files = base_files(folder, self._contents)
        generation = _generation_config(files, folder, CheckpointError)
        self.base = self._settings("the base", config, generation, TokenizerFiles.of(files))
        # Copied, since a running step changes fields of the model's config and changes them back.
        self._base_config = copy.deepcopy(config.to_dict())

    def read(self, name: str, delta: Delta) -> ModelSettings:
        """The settings of the expert `name`, whose delta was opened.

        Raises `FormatError`, `OSError`, and `ArchitectureError` where its config computes differently from the base's.
        """
        files = delta_files(delta, self._contents)
        if _CONFIG not in files:
            raise FormatError(f"{delta.path}: expected the fine-tune's config.json, found none")
        with written_out({_CONFIG: files[_CONFIG]}) as folder:
            try:
                config = text_config(folder)
            except Exception as error:  # transformers raises what it likes for what is no config
                raise _unreadable(delta.path, _CONFIG, error, folder, FormatError) from error
        changes = config_changes(self._base_config, config.to_dict())
        if changes:
            found = ", ".join(f"{field}: base {ours!r}, expert {theirs!r}" for field, (ours, theirs) in changes.items())
            raise ArchitectureError(
                f"expert {name!r} computes differently from the base; {found}",
                hint="one base serves only fine-tunes that keep its settings: `meswitch restore` it, serve it alone",
            )
        generation = _generation_config(files, delta.path, FormatError)
        tokenizer = TokenizerFiles.of(files, self._base_files)
        return self._settings(f"expert {name!r}", config, generation, tokenizer)

    def _settings(
        self, name: str, config: Any, generation: GenerationConfig, tokenizer: TokenizerFiles | None
    ) -> ModelSettings:
        asked = {field: value for field in _OTHER_WAYS if (value := getattr(generation, field, None)) is not None}
        for field in asked:
            setattr(generation, field, None)
        ignored = [f"{field}={value!r}" for field, value in asked.items() if value not in _OTHER_WAYS[field]]
        if ignored:
            _log.warning("%s: its generation settings ask for %s; answers are made without", name, ", ".join(ignored))
        _eos_ids(generation, name)
        return ModelSettings(name, config, generation, tokenizer, self._tokenizers)


def _eos_ids(owner: Any, name: str) -> set[int]:
    value = getattr(owner, "eos_token_id", None)
    ids = value if isinstance(value, list | tuple) else [value]
    if not all(token is None or type(token) is int for token in ids):
        raise FormatError(f"{name}: expected eos_token_id to be a token id or a list of them, found {value!r}")
    return {token for token in ids if token is not None}


def _generation_config(files: SmallFiles, path: Path, kind: type[MeswitchError]) -> GenerationConfig:
    """The model's generation_config.json, else what transformers makes of its config.json."""
    name = _GENERATION if _GENERATION in files else _CONFIG
    if name not in files:
        return GenerationConfig()
    from_model: dict[str, Any] = {"_from_model_config": True} if name == _CONFIG else {}
    with written_out({name: files[name]}) as folder:
        try:
            if not isinstance(parse_json(files[name].data), dict):
                raise ValueError("not a JSON object")
            config: GenerationConfig = GenerationConfig.from_pretrained(
                folder, config_file_name=name, local_files_only=True, **from_model
            )
        except Exception as error:
            raise _unreadable(path, name, error, folder, kind) from error
    return config


def _unreadable(path: Path, name: str, error: Exception, folder: Path, kind: type[MeswitchError]) -> MeswitchError:
    found = str(error).replace(str(folder), str(path))
    return kind(f"{path}: expected a {name} that transformers reads, found otherwise: {found}")

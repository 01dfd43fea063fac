"""The settings of a LoRA adapter, as PEFT writes them into `adapter_config.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from adaptive_merge.errors import InputError
from adaptive_merge.limits import PATTERN_REPETITIONS, LimitError, read_json

__all__ = ["LoraSettings"]

_WHOLE: Final = ("CLIP", "CustomTextCLIP", "CLIPModel")  # where names without a prefix are the text tower's

# What says nothing about the weights, or is read below.
_KNOWN: Final = frozenset(
    ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias")
    + ("auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "init_lora_weights")
    + ("layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "megatron_config", "peft_version")
    + ("modules_to_save", "qalora_group_size", "revision", "target_modules", "task_type", "ensure_weight_tying")
    + ("eva_config", "runtime_config", "lora_dtype")
)
_KEEPS_BASE: Final = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class LoraSettings:
    """The settings of an adapter that its weights depend on."""

    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    square_root: bool
    text_too: bool
    biases: bool
    path: str
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> LoraSettings:
        """From `adapter_config.json`.

        Raises:
            InputError: no LoRA, or a form of it whose weights cannot be told from this configuration.
        """
        config = read_json(path)
        if config.get("peft_type") != "LORA":
            raise InputError(
                f"`{path}`: peft_type {config.get('peft_type')!r}; only LORA adapters are read. Merge others into the "
                "model with PEFT's `merge_and_unload` and save that"
            )
        if config.get("init_lora_weights", True) not in _KEEPS_BASE:
            raise InputError(
                f"`{path}`: init_lora_weights {config['init_lora_weights']!r} also changed the base, which this "
                "adapter does not hold; save it anew with `path_initial_model_for_weight_conversion`"
            )
        odd = {key: value for key, value in config.items() if key not in _KNOWN and value not in (None, False, {}, [])}
        odd.pop("loftq_config", None)
        odd |= {"fan_in_fan_out": True} if config.get("fan_in_fan_out") else {}
        if odd:
            raise InputError(
                f"`{path}`: {', '.join(f'{key} {value!r}' for key, value in odd.items())}: not known how this changes "
                "the weights; merge the adapter into its model with PEFT's `merge_and_unload` and save that"
            )
        return cls._checked(path, config)

    @classmethod
    def _checked(cls, path: Path, config: dict[str, Any]) -> LoraSettings:
        name, mapping = config.get("base_model_name_or_path"), config.get("auto_mapping")
        settings = cls(
            config.get("r", 8),
            config.get("lora_alpha", 8),
            config.get("rank_pattern") or {},
            config.get("alpha_pattern") or {},
            bool(config.get("use_rslora")),
            isinstance(mapping, dict) and mapping.get("base_model_class") in _WHOLE,
            config.get("bias", "none") != "none",
            str(path),
            (f"adapter of {name}",) if name else (),
        )
        _check_patterns(settings)
        numbers = [settings.rank, settings.alpha, *settings.ranks.values(), *settings.alphas.values()]
        if not all(
            isinstance(number, int | float) and not isinstance(number, bool) and 0 < number < 1e9 for number in numbers
        ):
            raise InputError(f"`{path}`: r, lora_alpha and their patterns should be positive numbers, found {numbers}")
        return settings

    def of(self, module: str, rank: int) -> float:
        """The scale of a module's product, whose first factor has `rank` rows."""
        stated = self._matching(self.ranks, module, self.rank)
        if rank != stated:
            raise InputError(
                f"`{self.path}`: module `{module}`: rank {rank} in the weights, {stated} in the configuration; they do "
                "not belong together"
            )
        return float(self._matching(self.alphas, module, self.alpha)) / (rank**0.5 if self.square_root else rank)

    def _matching(self, pattern: Mapping[str, Any], module: str, default: Any) -> Any:
        """As PEFT: the first key that is the module's name or, as a regular expression, its end after a dot."""
        try:
            return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)
        except re.error as error:
            raise InputError(f"`{self.path}`: a key of rank_pattern or alpha_pattern is no pattern: {error}") from error


def _check_patterns(settings: LoraSettings) -> None:
    """Tables of patterns that end: how long one takes grows with the power of what it repeats."""
    for key in ("ranks", "alphas"):
        if not isinstance(getattr(settings, key), dict):
            raise InputError(f"`{settings.path}`: {key[:-1]}_pattern should map patterns to numbers; save it again")
    for pattern in (*settings.ranks, *settings.alphas):
        if len(re.findall(r"[*+{]", pattern)) > PATTERN_REPETITIONS or re.search(r"\)[*+{]", pattern):
            raise LimitError(
                f"`{settings.path}`: refused, pattern {pattern!r:.80} repeats groups, or more than "
                f"{PATTERN_REPETITIONS} times; name the modules"
            )

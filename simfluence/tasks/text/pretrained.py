"""Pretrained language models from a hub name or a local folder, with full or adapter tuning.

transformers and peft are imported when a model is loaded, not with simfluence.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from simfluence._internal.fields import check_fields
from simfluence.errors import InvalidInput, did_you_mean

__all__ = ["PRECISIONS", "TUNINGS", "Factory", "Outputs", "Pretrained", "extra"]

TUNINGS = ("full", "lora", "ia3")
PRECISIONS = (None, "bfloat16")

#: Texts per pass when features are computed.
_EMBEDDING_BATCH = 64

#: Default arguments of a LoRA adapter.
_LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A pretrained model and the choice of parameters to train.

    Args:
        name: folder with a saved model and tokenizer, or name of a model on the hub (read from the local cache if
            possible). Weights must be safetensors: nothing is unpickled.
        tuning: "full", "lora" or "ia3" (through peft). A new classification head is always trained.
        tuning_args: for "lora" and "ia3", arguments of peft's configuration, such as ``{"r": 2, "target_modules":
            ["query", "value"]}``; for "full", ``{"layers": […]}``: patterns of the names of parameters to train, such
            as ``"classifier.*"``, instead of all.
        dropout: rate of all dropouts in the model; 0 by default, as only noise from the curriculum can be simulated.
            None keeps the model's own rates.
        precision: "bfloat16" runs the model's matrix products in that type (autocast); weights and losses keep the
            recipe's type.
        revision: revision of a model on the hub.
        trust_remote_code: run code that comes with the model. Specification files cannot set this.

    Raises:
        InvalidInput: the tuning or precision is unknown; when the model is loaded, the extra ``hf`` is not installed,
            the folder or hub name does not exist, there is no network, the weights are not safetensors, or peft rejects
            its arguments.
    """

    name: str | Path
    tuning: str = "full"
    tuning_args: Mapping[str, Any] = field(default_factory=dict)
    dropout: float | None = 0.0
    precision: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.tuning not in TUNINGS:
            raise InvalidInput(f"unknown tuning {self.tuning!r}, {did_you_mean(self.tuning, TUNINGS)}")
        if self.precision not in PRECISIONS:
            raise InvalidInput(f"unknown precision {self.precision!r}: choose 'bfloat16' or None")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise InvalidInput(f"dropout must be from 0 up to below 1, or None, got {self.dropout!r}")
        unknown = set(self.tuning_args) - {"layers"} if self.tuning == "full" else set()
        if unknown:
            raise InvalidInput(f"full tuning takes no {min(unknown)!r}, choose from: layers")

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, with a padding token; texts are padded on the right."""
        with self._loading():
            tokenizer = extra("transformers").AutoTokenizer.from_pretrained(self.name, **self._source)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        tokenizer.padding_side = "right"
        return tokenizer

    @cached_property
    def config(self) -> Any:
        """The model's configuration, with the chosen dropout."""
        with self._loading():
            config = extra("transformers").AutoConfig.from_pretrained(self.name, **self._source)
        config.use_cache = False
        for name, value in vars(config).items():
            if self.dropout is not None and "drop" in name and isinstance(value, float):
                setattr(config, name, float(self.dropout))
        return config

    @property
    def max_length(self) -> int | None:
        """Longest sequence that the model has positions for, in tokens; None if there is no such limit."""
        positions: int | None = getattr(self.config, "max_position_embeddings", None)
        return None if positions is None else min(positions, self.tokenizer.model_max_length)

    def build(self, auto: str, **config: Any) -> nn.Module:
        """Build a fresh model with its adapters, by the transformers class ``auto``, such as "AutoModelForCausalLM".

        Weights that are not in the checkpoint (a head, adapters) are drawn from torch's present random state.
        """
        base, fresh = self.load(auto, **config)
        weights = {name: tensor for name, tensor in base.state_dict().items() if name not in fresh}
        return Outputs(self._tuned(base, fresh), self._digest(weights), self.precision)

    def load(self, auto: str, **config: Any) -> tuple[nn.Module, set[str]]:
        """Load the pretrained model, and return it with the names of the parameters that its checkpoint lacks."""
        loader = getattr(extra("transformers"), auto)
        settings = type(self.config).from_dict(self.config.to_dict() | config)
        with self._loading():
            model, info = loader.from_pretrained(
                self.name, config=settings, use_safetensors=True, dtype=torch.float32,
                attn_implementation="eager", output_loading_info=True, ignore_mismatched_sizes=True, **self._source,
            )  # fmt: skip
        return model, set(info["missing_keys"]) | {key[0] for key in info["mismatched_keys"]}  # a head of another size

    def embedded(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Average the pretrained model's last hidden states over tokens that are not padding, ``[batch, width]``."""
        model, _ = self.load("AutoModel")
        encoder = model.get_encoder() if self.config.is_encoder_decoder else model  # type: ignore[operator]
        means = []
        with torch.no_grad():
            for ids, mask in zip(
                torch.split(input_ids, _EMBEDDING_BATCH), torch.split(attention_mask, _EMBEDDING_BATCH), strict=True
            ):
                states = encoder.eval()(input_ids=ids, attention_mask=mask).last_hidden_state
                means.append((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        return torch.cat(means)

    def _tuned(self, base: nn.Module, fresh: set[str]) -> nn.Module:
        if self.tuning == "full":
            return _only(base, self.tuning_args.get("layers"))
        peft = extra("peft")
        heads = sorted({name.split(".")[0] for name in fresh})
        transposed = any(type(module).__name__ == "Conv1D" for module in base.modules())
        defaults = {"modules_to_save": heads or None, "fan_in_fan_out": transposed}
        try:
            if self.tuning == "lora":
                adapters = peft.LoraConfig(**(defaults | _LORA | dict(self.tuning_args)))
            else:
                adapters = peft.IA3Config(**(defaults | dict(self.tuning_args)))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # peft's, about changes in transformers
                tuned: nn.Module = peft.get_peft_model(base, adapters)
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"tuning {self.tuning!r} of {str(self.name)!r}: {error}") from None
        return tuned

    def _digest(self, weights: Mapping[str, Tensor]) -> str:
        """Return the SHA-256 over the pretrained weights, computed once."""
        if "digest" not in self.__dict__:
            digest = hashlib.sha256()
            for name, tensor in sorted(weights.items()):
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
            self.__dict__["digest"] = digest.hexdigest()
        return str(self.__dict__["digest"])

    @property
    def _source(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    @contextlib.contextmanager
    def _loading(self) -> Iterator[None]:
        """Load without messages and progress bars, and turn errors into ``InvalidInput`` with advice.

        Raises:
            InvalidInput: loading fails.
        """
        name = str(self.name)
        if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
            raise InvalidInput(f"there is no folder {name!r}: pass a folder with a saved model, or a name on the hub")
        logging = extra("transformers").utils.logging
        level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
            raise InvalidInput(f"model {name!r} cannot be loaded: {_advice(name, error)}") from error
        finally:
            logging.set_verbosity(level)
            if bars:
                logging.enable_progress_bar()


class Outputs(nn.Module):
    """A Hugging Face model that returns only its logits, as one tensor.

    Args:
        model: any model whose outputs have ``logits``.
        weights: digest of the pretrained weights; part of a task's fingerprint.
        precision: same as in ``Pretrained``.
    """

    def __init__(self, model: nn.Module, weights: str = "", precision: str | None = None) -> None:
        super().__init__()
        self.model = model
        self.weights = weights
        self.precision = precision

    def forward(self, **inputs: Any) -> Tensor:
        logits: Tensor = self.call(**inputs).logits
        return logits.float() if self.precision else logits

    def call(self, **inputs: Any) -> Any:
        """Return the model's own outputs."""
        if self.precision is None:
            return self.model(**inputs)
        with torch.autocast(next(self.parameters()).device.type, getattr(torch, self.precision)):
            return self.model(**inputs)

    def extra_repr(self) -> str:
        return f"weights={self.weights}, precision={self.precision}"


@dataclass(frozen=True, eq=False)
class Factory:
    """A function that builds fresh models of ``pretrained``, each wrapped by ``wrap``."""

    pretrained: Pretrained
    auto: str
    config: Mapping[str, Any] = field(default_factory=dict)
    wrap: Callable[[nn.Module], nn.Module] | None = None

    def __call__(self) -> nn.Module:
        model = self.pretrained.build(self.auto, **self.config)
        return model if self.wrap is None else self.wrap(model)


def extra(package: str) -> Any:
    """Import a package of the extra ``hf``.

    Raises:
        InvalidInput: the package is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InvalidInput(
            f"language models need the package {package!r} ({error}): pip install 'simfluence[hf]'"
        ) from None


def _only(model: nn.Module, patterns: Any) -> nn.Module:
    """Freeze all parameters of the model except those whose names match a pattern."""
    if patterns is None:
        return model
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise InvalidInput(f"tuning_args: no parameter is called {pattern!r}, {did_you_mean(pattern, names)[:300]}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
    return model


def _advice(name: str, error: Exception) -> str:
    lines = str(error).strip().splitlines()
    first = lines[0] if lines else type(error).__name__
    if "trust_remote_code" in str(error):
        return f"it comes with its own code, which runs only with trust_remote_code=True ({first})"
    if "safetensors" in str(error):
        return f"its weights must be safetensors, as nothing is unpickled: save them as safetensors ({first})"
    if Path(name).is_dir():
        return f"the folder must have config.json, weights and tokenizer, as save_pretrained writes them ({first})"
    return (
        f"it is not a local folder, not in the cache, and not available from the hub. On a machine with a network run "
        f"`hf download {name} --local-dir FOLDER`, copy the folder here, and pass its path as the name ({first})"
    )

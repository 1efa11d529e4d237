"""Pretrained language models: from a hub name or a local folder, tuned in full or through adapters.

transformers and peft are imported when a model is asked for, never with simfluence.
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

from simfluence.errors import InvalidInput, did_you_mean

TUNINGS = ("full", "lora", "ia3")
PRECISIONS = (None, "bfloat16")

#: Texts that are embedded at a time.
_AT_ONCE = 64

#: What a LoRA adapter has unless it is said otherwise.
_LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0}


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A pretrained model and how much of it is trained.

    Args:
        name: a folder with a saved model and tokenizer, or the name of one on the hub (from the local cache if it is
            there). Weights must be safetensors: nothing is unpickled.
        tuning: "full", "lora" or "ia3" (through peft). A new classification head is always trained.
        tuning_args: for "lora" and "ia3" arguments of peft's configuration, such as ``{"r": 2, "target_modules":
            ["query", "value"]}``; for "full" ``{"layers": […]}``, patterns of the names of the parameters that are
            trained, such as ``"classifier.*"``, instead of all.
        dropout: of all of the model's dropouts; 0 by default, as noise that is not the curriculum's cannot be
            simulated. None leaves them as the model has them.
        precision: "bfloat16" runs the model's matrix products in that type (autocast); weights and losses stay in the
            recipe's.
        revision: of a model on the hub.
        trust_remote_code: run code that comes with the model. Not to be had from a file.

    Raises:
        InvalidInput: an unknown tuning or precision; when the model is loaded, a missing extra, a folder or name that
            is not there, a network that is not, weights that are no safetensors, arguments that peft does not take.
    """

    name: str | Path
    tuning: str = "full"
    tuning_args: Mapping[str, Any] = field(default_factory=dict)
    dropout: float | None = 0.0
    precision: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.tuning not in TUNINGS:
            raise InvalidInput(f"unknown tuning {self.tuning!r}, {did_you_mean(self.tuning, TUNINGS)}")
        if self.precision not in PRECISIONS:
            raise InvalidInput(f"unknown precision {self.precision!r}: give 'bfloat16' or None")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise InvalidInput(f"dropout must be from 0 up to below 1, or None, got {self.dropout!r}")
        unknown = set(self.tuning_args) - {"layers"} if self.tuning == "full" else set()
        if unknown:
            raise InvalidInput(f"full tuning takes no {min(unknown)!r}, known is: layers")

    @cached_property
    def tokenizer(self) -> Any:
        """With a padding token; texts are padded on the right."""
        with self._loading():
            found = extra("transformers").AutoTokenizer.from_pretrained(self.name, **self._source)
        if found.pad_token is None:
            found.pad_token = found.eos_token or found.unk_token
        found.padding_side = "right"
        return found

    @cached_property
    def config(self) -> Any:
        """The model's, with the dropout that is asked for."""
        with self._loading():
            found = extra("transformers").AutoConfig.from_pretrained(self.name, **self._source)
        found.use_cache = False
        for name, value in vars(found).items():
            if self.dropout is not None and "drop" in name and isinstance(value, float):
                setattr(found, name, float(self.dropout))
        return found

    @property
    def max_length(self) -> int | None:
        """The longest sequence that the model has positions for, in tokens; None where there is no such limit."""
        positions: int | None = getattr(self.config, "max_position_embeddings", None)
        return None if positions is None else min(positions, self.tokenizer.model_max_length)

    def build(self, auto: str, **config: Any) -> nn.Module:
        """A fresh model by the class ``auto`` of transformers, such as "AutoModelForCausalLM", adapters put on.

        What is not in the checkpoint (a head, adapters) is drawn from torch's present random state.
        """
        base, fresh = self.load(auto, **config)
        kept = {name: tensor for name, tensor in base.state_dict().items() if name not in fresh}
        return Outputs(self._tuned(base, fresh), self._digest(kept), self.precision)

    def load(self, auto: str, **config: Any) -> tuple[nn.Module, set[str]]:
        """The model as it was pretrained, and the names of parameters that its checkpoint does not have."""
        loader = getattr(extra("transformers"), auto)
        settings = type(self.config).from_dict(self.config.to_dict() | config)
        with self._loading():
            model, found = loader.from_pretrained(
                self.name, config=settings, use_safetensors=True, dtype=torch.float32,
                attn_implementation="eager", output_loading_info=True, ignore_mismatched_sizes=True, **self._source,
            )  # fmt: skip
        return model, set(found["missing_keys"]) | {key[0] for key in found["mismatched_keys"]}  # a head of other size

    def embedded(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean last hidden states of the untouched model, ``[batch, width]``, over the tokens that are no padding."""
        model, _ = self.load("AutoModel")
        encoder = model.get_encoder() if self.config.is_encoder_decoder else model  # type: ignore[operator]
        found = []
        with torch.no_grad():
            for ids, mask in zip(input_ids.split(_AT_ONCE), attention_mask.split(_AT_ONCE), strict=True):
                states = encoder.eval()(input_ids=ids, attention_mask=mask).last_hidden_state
                found.append((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        return torch.cat(found)

    def _tuned(self, base: nn.Module, fresh: set[str]) -> nn.Module:
        if self.tuning == "full":
            return _only(base, self.tuning_args.get("layers"))
        peft = extra("peft")
        heads = sorted({name.split(".")[0] for name in fresh})
        transposed = any(type(module).__name__ == "Conv1D" for module in base.modules())
        given = {"modules_to_save": heads or None, "fan_in_fan_out": transposed}
        try:
            if self.tuning == "lora":
                adapters = peft.LoraConfig(**(given | _LORA | dict(self.tuning_args)))
            else:
                adapters = peft.IA3Config(**(given | dict(self.tuning_args)))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # peft's, of what transformers will drop
                found: nn.Module = peft.get_peft_model(base, adapters)
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"tuning {self.tuning!r} of {str(self.name)!r}: {error}") from None
        return found

    def _digest(self, weights: Mapping[str, Tensor]) -> str:
        """SHA-256 over the pretrained weights, taken once."""
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
        """Quietly, and with errors that say what to do.

        Raises:
            InvalidInput: in place of the libraries' own errors.
        """
        name = str(self.name)
        if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
            raise InvalidInput(f"there is no folder {name!r}: give a folder with a saved model, or a name on the hub")
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
    """A Hugging Face model whose outputs are one tensor, its logits.

    Args:
        model: any model whose outputs have ``logits``.
        weights: digest of what it was before tuning; part of a task's fingerprint.
        precision: as of ``Pretrained``.
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
        """The model's own outputs."""
        if self.precision is None:
            return self.model(**inputs)
        with torch.autocast(next(self.parameters()).device.type, getattr(torch, self.precision)):
            return self.model(**inputs)

    def extra_repr(self) -> str:
        return f"weights={self.weights}, precision={self.precision}"


@dataclass(frozen=True, eq=False)
class Factory:
    """What a task builds its models with: fresh ones of ``pretrained``, as ``wrap`` makes them."""

    pretrained: Pretrained
    auto: str
    config: Mapping[str, Any] = field(default_factory=dict)
    wrap: Callable[[nn.Module], nn.Module] | None = None

    def __call__(self) -> nn.Module:
        model = self.pretrained.build(self.auto, **self.config)
        return model if self.wrap is None else self.wrap(model)


def extra(package: str) -> Any:
    """A package of the extra ``hf``.

    Raises:
        InvalidInput: it is not installed; says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise InvalidInput(
            f"language models need the package {package!r} ({error}): pip install 'simfluence[hf]'"
        ) from None


def _only(model: nn.Module, patterns: Any) -> nn.Module:
    """The model with the parameters that match trained, and the others frozen."""
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
    said = str(error).strip().splitlines()
    first = said[0] if said else type(error).__name__
    if "trust_remote_code" in str(error):
        return f"it comes with code of its own, which is run only with trust_remote_code=True ({first})"
    if "safetensors" in str(error):
        return f"its weights must be safetensors, as nothing is unpickled; save them anew as such ({first})"
    if Path(name).is_dir():
        return f"is that a folder that save_pretrained wrote, with config.json, weights and tokenizer? ({first})"
    return (
        f"it is no local folder, not in the cache, and the hub did not give it. On a machine with a network run "
        f"`hf download {name} --local-dir FOLDER`, bring the folder here, and give its path as the name ({first})"
    )

"""Tiny GPT-2-, T5- and BERT-shaped models with random weights, saved as the hub's are, and made-up rows of text."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

import simfluence as sf

SENTENCE = "the a man woman dog cat ball tree ran fell broke kicked saw was wet cold because so it he she yes no"
LABELLED = [
    {"text": text, "label": label, "weight": k / 2}
    for k, (text, label) in enumerate(
        [("the dog ran", "dog"), ("a cat", "cat"), ("the man saw the cat fell", "cat"), ("dog", "dog")] * 3
    )
]
LETTERS = [chr(code) for code in range(33, 127)]


def tokenizer(ending: bool) -> transformers.PreTrainedTokenizerFast:
    """Known words, and single characters for all else; T5's closes each text."""
    special = ["<pad>", "<unk>", "</s>"]
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=[*LETTERS, "▁"], show_progress=False
    )
    raw.train_from_iterator([SENTENCE] * 3, trainer)
    if ending:
        raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )


def saved(kind: str, folder: Path, seed: int = 0) -> str:
    """The folder of a tiny model: "gpt2", "t5" or "bert"."""
    words = tokenizer(ending=kind == "t5")
    size = len(words)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if kind == "gpt2":
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
                vocab_size=size, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=2,
                pad_token_id=0,
            ))  # fmt: skip
        elif kind == "t5":
            model = transformers.T5ForConditionalGeneration(transformers.T5Config(
                vocab_size=size, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0,
                eos_token_id=2, decoder_start_token_id=0,
            ))  # fmt: skip
        else:
            model = transformers.BertModel(transformers.BertConfig(
                vocab_size=size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                max_position_embeddings=48, pad_token_id=0,
            ))  # fmt: skip
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


def copa_rows(count: int) -> list[dict]:
    """Made up: each premise's right choice repeats its noun."""
    nouns, verbs = ["man", "woman", "dog", "cat"], ["ran", "fell", "was wet", "was cold"]
    return [
        {
            "premise": f"The {nouns[k % 4]} {verbs[k // 4 % 4]}.",
            "choice1": f"The {nouns[(k + k % 2) % 4]} saw the ball.",
            "choice2": f"The {nouns[(k + 1 - k % 2) % 4]} kicked the tree.",
            "question": ["cause", "effect"][k // 2 % 2], "idx": k, "label": k % 2,
        }
        for k in range(count)
    ]  # fmt: skip


def rte_rows(count: int) -> list[dict]:
    """Made up: what follows is what was said."""
    nouns = ["man", "woman", "dog", "cat"]
    return [
        {
            "premise": f"The {nouns[k % 4]} saw the {nouns[k // 4 % 4]}.",
            "hypothesis": f"The {nouns[(k + k % 2) % 4]} saw it.", "idx": k, "label": k % 2,
        }
        for k in range(count)
    ]  # fmt: skip


def winogrande_rows(count: int) -> list[dict]:
    """Made up; its answers are texts, as in the real one."""
    nouns = ["man", "woman", "dog", "cat"]
    return [
        {
            "sentence": f"The {nouns[k % 4]} kicked the ball because the _ was {'wet' if k % 2 else 'cold'}.",
            "option1": nouns[k % 4], "option2": "ball", "answer": str(1 + k % 2),
        }
        for k in range(count)
    ]  # fmt: skip


def sst2_rows(count: int) -> list[dict]:
    """Made up."""
    return [{"idx": k, "sentence": f"it was {['cold', 'the tree'][k % 2]} {k}", "label": k % 2} for k in range(count)]


def boolq_rows(count: int) -> list[dict]:
    """Made up; its labels are truth values."""
    return [
        {
            "question": "was the dog wet",
            "passage": f"The {'dog' if k % 2 else 'cat'} was wet {k}.",
            "label": bool(k % 2),
        }
        for k in range(count)
    ]


ROWS = {"copa": copa_rows, "rte": rte_rows, "winogrande": winogrande_rows, "sst2": sst2_rows, "boolq": boolq_rows}


def written(data: str, folder: Path, train: int = 24, test: int = 8) -> Path:
    """A local folder of the data's schema, with made-up rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ROWS[data](train + test)
    for split, part in (("train", rows[:train]), ("validation", rows[train:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def classified(models: dict[str, str], rows: list[dict] = LABELLED, **more) -> sf.Task:
    """A classification task of eight made-up rows, and the rest to test on."""
    return sf.tasks.classification(models["bert"], rows[:8], rows[8:], **more)

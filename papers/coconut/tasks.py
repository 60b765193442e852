"""What a config's task gives to learn: rows for training, development and test, the tokenizer, the model to train."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from papers.coconut import data, method
from papers.coconut.config import Config
from papers.coconut.prontoqa import prontoqa_rows
from papers.coconut.prosqa import balanced_rows, prosqa_rows
from shared.data import arith
from shared.data.gsm8k import load_gsm8k, load_icot
from shared.data.splits import SPLITS
from shared.experiments import files
from shared.experiments.errors import UserError
from shared.experiments.keys import stage_key
from shared.experiments.paper import ROOT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from papers.coconut.model import CoconutForCausalLM

ARITH_MODULUS = 10

# Generated rows are kept on the disk from so many on: all runs of a task ask for the same, and making 10 000 takes 5 s.
KEEP_FROM = 2_000
KEPT = ROOT / "runs" / "coconut" / "data"


def load_rows(config: Config, split: str) -> list[dict]:
    """The rows of `train`, `dev` or `test`. Generated data are the same for every seed and arm: only the model differs.

    Raises:
        UserError: a file that is missing or malformed.
    """
    config_files = {"train": config.train_file, "dev": config.dev_file, "test": config.test_file}
    sizes = {"train": config.n_train, "dev": config.n_dev, "test": config.n_test}
    if config_files[split] is None and sizes[split] >= KEEP_FROM:
        return _kept_rows(config.task, split, sizes[split])
    return _rows(config.task, split, config_files[split], sizes[split])


def _kept_rows(task: str, split: str, n: int) -> list[dict]:
    """Generated rows, from the disk if this very code has made them before."""
    path = KEPT / f"{task}-{split}-{n}-{stage_key(Path(__file__), {})}.jsonl"
    if path.is_file():
        rows = files.read_jsonl(path)
        if len(rows) == n:  # else somebody has cut the file short
            return rows
    rows = _rows(task, split, None, n)
    files.write_jsonl(path, rows)
    return rows


def _rows(task: str, split: str, file: str | None, n: int) -> list[dict]:
    match task:
        case "balanced":
            return balanced_rows(n, split)
        case "balanced_text":
            return balanced_rows(n, split, encoding="text")
        case "prosqa":
            return prosqa_rows(n, split)
        case "prontoqa":
            return prontoqa_rows(n, split)
        case "arith":
            return arith.arith_rows(n, split, modulus=ARITH_MODULUS)
        case "json":
            return data.load_json(file)[:n]
        case "gsm8k":
            rows = load_gsm8k(file, "test") if split == "test" else load_icot(file)
            return rows[:n]
    raise UserError(f"unknown task {task!r}")


def load_model(config: Config, checkpoint: Path | None = None) -> tuple[CoconutForCausalLM, PreTrainedTokenizerBase]:
    """The model and tokenizer of a finished `checkpoint`, or those that training starts from.

    Raises:
        UserError: a model or checkpoint that is missing, damaged or of another architecture.
    """
    from transformers import AutoTokenizer

    import papers.coconut.facts_model  # noqa: F401 - registers the architecture of tiny checkpoints
    from papers.coconut.model import CoconutForCausalLM

    if checkpoint is not None:
        with _load_explained(str(checkpoint), "train it again"):
            return CoconutForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    with _load_explained(f"model={config.model}", "name the directory or the hub id of a decoder-only language model"):
        base, tokenizer = _pretrained(config.model) if config.model else _from_scratch(config)
        ids = method.special_ids(tokenizer)
        markers = {"latent_token_id": ids.latent, "bot_token_id": ids.bot, "eot_token_id": ids.eot}
        model = CoconutForCausalLM.from_base(base, **markers)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = ids.pad, ids.eos
    return model, tokenizer


@contextlib.contextmanager
def _load_explained(what: str, remedy: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{what}: {error}\n{remedy}") from error


def _pretrained(source: str):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if source.startswith(("/", ".", "~")) and not (Path(source) / "config.json").is_file():
        raise UserError(f"model={source}: no checkpoint there (no config.json); give a directory or a hub id")
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    method.add_special_tokens(tokenizer)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    method.init_special_tokens(model, tokenizer)
    return model, tokenizer


def _from_scratch(config: Config):
    from transformers import GPT2Config, GPT2LMHeadModel

    from papers.coconut.facts_model import FactsGPT2Config, FactsGPT2LMHeadModel, init_scales

    facts = config.task == "balanced"
    words = [*data.VOCABULARY, *arith.vocabulary(ARITH_MODULUS)]
    tokenizer = data.facts_tokenizer() if facts else data.word_tokenizer(_rows_of_files(config), words)
    sizes = {
        "vocab_size": len(tokenizer),
        "n_positions": config.positions,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.mlp_width,
        "activation_function": config.activation,
        "initializer_range": config.init_std,
        "resid_pdrop": 0.0,  # problems are generated in numbers: there is nothing to regularise
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if not facts:
        return GPT2LMHeadModel(GPT2Config(**sizes)), tokenizer
    table = data.fact_table(tokenizer).tolist()
    model = FactsGPT2LMHeadModel(FactsGPT2Config(**sizes, fact_table=table))
    init_scales(model, config.embedding_std, config.thought_scale)
    method.share_special_embedding(model, tokenizer)
    return model, tokenizer


def _rows_of_files(config: Config) -> list[dict]:
    """All rows of a task that is read from files, whose words no lexicon has."""
    return [row for split in SPLITS for row in load_rows(config, split)] if config.train_file else []

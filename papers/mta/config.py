"""Every setting of the MTA experiments; configs/SCALE.yaml and the arms in paper.yaml fill it in."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.experiments.config import capped


@dataclass
class Model:
    """Settings of `papers.mta.model.MTAConfig` under their names there, where they are documented."""

    attention: str = "transformer"
    hidden_size: int = 64
    intermediate_size: int | None = None
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    num_key_value_heads: int | None = None
    rope_theta: float | None = 100_000.0
    """None: a checkpoint's own."""
    attention_dropout: float = 0.0
    eval_dropout: bool = False
    kq_pre: bool = True
    kq_post: bool = True
    query_kernel_size: int = 6
    key_kernel_size: int = 11
    kq_layers: list[int] | None = None
    kq_init: str = "identity"
    head_pre: bool = True
    head_post: bool = True
    head_group_size: int | None = None
    head_norm: str = "gate"


@dataclass
class Finetune:
    """A second training stage that begins with the first one's model; 0 steps: none."""

    steps: int = capped(0, smoke=2)
    context_length: int = capped(4096, smoke=32)
    rope_theta: float | None = 500_000.0
    weight_decay: float = 0.0
    warmup_steps: int = 50
    retrofit: bool = False
    """Put identity kernels into a plain Transformer first (Table 10)."""


@dataclass
class Config:
    # ---- task ----
    task: str = "findblock"
    """findblock; docs: text that comes with Python; slimpajama: rows {"text", "meta": {"redpajama_set_name"}}."""
    # find-block, see papers.mta.data.FindBlock
    answer: str = "first"
    block_size: int = 5
    n_blocks: int = 50
    min_blocks: int | None = None
    n_queries: int = 1
    n_test: int = capped(1000, smoke=4)
    """Contexts, each with n_queries questions."""
    # text
    with_source: bool = False
    """docs: the standard library's whole source, not only its docstrings."""
    vocab_size: int = 512
    """docs: size of the byte-level BPE that is trained on the training text."""
    needle_share: float = 0.0
    """docs: share of the training sequences that hide needles in text and ask for one."""
    dataset: str = "cerebras/SlimPajama-627B"
    """slimpajama: a dataset of the hub, a .jsonl or .parquet file, or a directory of them."""
    tokenizer: str | None = None
    """slimpajama: directory or hub id; default: that of init_from."""
    context_length: int = capped(64, smoke=32)
    n_validation: int = capped(1000, smoke=4)
    """Validation sequences (slimpajama: of each domain)."""
    n_dev: int = capped(100, smoke=4)
    """The most validation sequences, or find-block contexts of their own, that are looked at during training."""

    # ---- model ----
    model: Model = field(default_factory=Model)
    init_from: str | None = None
    """A Llama or MTA checkpoint to continue from, directory or hub id. With model.attention=mta, kernels that it lacks
    are added as the identity. Of `model`, only attention, rope_theta and the kernels' settings matter then."""

    # ---- optimization ----
    steps: int = capped(300, smoke=3)
    batch_size: int = capped(32, smoke=4)
    """Sequences per optimizer step, over all processes."""
    micro_batch_size: int | None = None
    """Sequences per process and backward pass; default: all that a process has of a batch."""
    lr: float = 1e-4
    lr_schedule: str = "constant"
    """After the warm-up: constant, or linear to 0."""
    warmup_steps: int = 0
    beta2: float = 0.98
    weight_decay: float = 0.0
    kernel_weight_decay: float | None = None
    """Of key-query kernels and head mixers; None: `weight_decay`, as in the paper."""
    clip: float = 1.0
    """Largest gradient norm."""
    bf16: bool = False
    """Autocast: weights and optimizer stay in float32."""
    eval_every: int = 25
    finetune: Finetune = field(default_factory=Finetune)

    # ---- evaluation ----
    eval_batch_size: int = 50
    needles: list[int] = field(default_factory=list)
    """Numbers of needles hidden in a text; empty: not asked."""
    needle_depths: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    needle_contexts: list[int] = field(default_factory=list)
    """Tokens of text, question and answer; empty: the context that training ended with."""
    needle_samples: int = capped(500, smoke=1)
    """For each number of needles and context, over all depths."""
    babilong: str | None = None
    """Dataset with configurations 0k, 1k, ... and splits qa1, ..., or a directory of 1k/qa1.jsonl and so on."""
    babilong_lengths: list[str] = field(default_factory=lambda: ["0k", "1k", "2k", "4k"])
    babilong_tasks: list[str] = field(default_factory=lambda: ["qa1", "qa2", "qa3", "qa4", "qa5"])
    babilong_samples: int = capped(100, smoke=2)
    babilong_shots: int = 2
    """Solved 0k examples before each question: base models need to see the format (the paper's: NOT FOUND)."""
    harness: list[str] = field(default_factory=list)
    """Tasks of lm-eval-harness, NAME or NAME:SHOTS."""

    def __post_init__(self) -> None:
        for name, valid in (
            ("task", ("findblock", "docs", "slimpajama")),
            ("lr_schedule", ("constant", "linear")),
        ):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(valid)}")
        if self.task == "slimpajama" and not (self.tokenizer or self.init_from):
            raise ValueError("task slimpajama needs a tokenizer (or init_from)")
        if not 0 <= self.needle_share < 1:
            raise ValueError(f"needle_share: {self.needle_share} is not in [0, 1)")
        if self.task == "findblock" and (self.finetune.steps or self.needles or self.babilong or self.harness):
            raise ValueError("finetune, needles, babilong and harness are for text; the task is findblock")
        if self.finetune.retrofit and self.model.attention != "transformer":
            raise ValueError(f"finetune.retrofit starts from attention=transformer, not {self.model.attention}")

"""Every setting of the Coconut experiments; configs/SCALE.yaml and the arms in paper.yaml fill it in."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.experiments.config import capped

TASKS = ("balanced", "balanced_text", "prosqa", "prontoqa", "arith", "json", "gsm8k")


@dataclass
class Config:
    # ---- task ----
    task: str = "balanced"
    """Generated: balanced (one token per fact), balanced_text, prosqa, prontoqa, arith. From files: json (the authors'
    format), gsm8k (GSM8K-Aug text for training and development, GSM8K for the test)."""
    train_file: str | None = None
    dev_file: str | None = None
    test_file: str | None = None
    n_train: int = capped(20_000, smoke=300)
    """Problems to generate, or the most to take from the files."""
    n_dev: int = capped(250, smoke=20)
    n_test: int = capped(500, smoke=20)

    # ---- method ----
    method: str = "coconut"
    """One of papers.coconut.method.ARMS."""
    c_thought: int = 1
    """Thoughts per replaced step, c."""
    max_latent_stage: int = 3
    """K: the most steps that thoughts replace."""
    pad_latent_to_max: bool = True
    uniform_prob: float = 0.0
    """Probability that a batch (`mix_batches`) or an example uses a stage drawn uniformly from 0..number of steps."""
    mix_from_stage: int = 0
    """The first stage that is mixed."""
    mix_batches: bool = True
    """Draw the mixed stage once per batch: equally many thoughts in each row, hence no wasted pass."""

    # ---- schedule ----
    stage_steps: list[int] = capped([], smoke=3)
    """Optimizer steps in each stage of the curriculum, from 0 on. Arms without a curriculum train for their sum."""
    stage_epochs: list[int] = field(default_factory=list)
    """The same in passes over the training data. Give exactly one of the two."""
    reset_optimizer: str = "stage"
    """When AdamW's state is dropped: at each new stage (the paper), at each epoch (the authors' code), or never."""
    select_best: bool = False
    """Keep the checkpoint with the best development accuracy among the epochs of the last stage, not the last one."""

    # ---- optimization ----
    batch_size: int = capped(64, smoke=8)
    """Examples per optimizer step, over all processes."""
    micro_batch_size: int | None = None
    """Examples per process and backward pass; default: all that a process has of a batch."""
    lr: float = 1e-4
    lr_schedule: str = "constant"
    """Within a stage, after the warm-up: constant, or linear to a tenth."""
    warmup_steps: int = 0
    """Linear warm-up at the start and after each optimizer reset."""
    beta2: float = 0.999
    weight_decay: float = 0.01
    clip: float | None = None
    """Largest gradient norm."""
    bf16: bool = False

    # ---- model ----
    model: str | None = None
    """A causal language model to start from: directory or hub id. None: a GPT-2 of the sizes below, from scratch."""
    layers: int = 2
    width: int = 64
    heads: int = 4
    mlp_width: int = 256
    activation: str = "gelu_new"
    positions: int = 48
    init_std: float = 0.02
    embedding_std: float = 0.02
    thought_scale: float = 1.0
    """Initial gain of the final norm: thoughts are its outputs, and should start at the scale of embeddings."""

    # ---- evaluation ----
    max_new_tokens: int = 16
    eval_batch_size: int = 250
    thoughts: list[int] = field(default_factory=list)
    """Numbers of steps k to replace by thoughts before the model goes on in language (the analysis of Section 4)."""
    latency_items: int = capped(50, smoke=3)
    """Test items that are answered one at a time to measure seconds per example."""

    def __post_init__(self) -> None:
        from papers.coconut.method import ARMS

        if self.task not in TASKS:
            raise ValueError(f"task: {self.task!r} is not one of {', '.join(TASKS)}")
        if self.method not in ARMS:
            raise ValueError(f"method: {self.method!r} is not one of {', '.join(ARMS)}")
        if bool(self.stage_steps) == bool(self.stage_epochs):
            raise ValueError("give exactly one of stage_steps and stage_epochs")
        if self.reset_optimizer not in ("stage", "epoch", "never"):
            raise ValueError(f"reset_optimizer: {self.reset_optimizer!r} is not one of stage, epoch, never")
        if self.lr_schedule not in ("constant", "linear"):
            raise ValueError(f"lr_schedule: {self.lr_schedule!r} is not one of constant, linear")
        if not 0 <= self.uniform_prob <= 1:
            raise ValueError(f"uniform_prob: {self.uniform_prob} is not a probability")
        if self.task in ("json", "gsm8k") and not (self.train_file and self.dev_file and self.test_file):
            raise ValueError(f"task {self.task} needs train_file, dev_file and test_file")

"""Every setting of the DARLING experiments; configs/SCALE.yaml and the arms in paper.yaml fill it in."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.experiments.config import capped

TASKS = ("operators", "ideas", "math", "wildchat")
DIVERSITIES = ("none", "classes", "true_classes", "ngram", "unlikeliness", "unlikeliness_min_max")
COMBINATIONS = ("product", "sum")
SHAPES = ("raw", "sigmoid", "min_shift")


@dataclass
class Config:
    # ---- task ----
    task: str = "operators"
    """Generated: operators (verifiable), ideas (a dense, noisy score). From the hub: math (DeepScaleR and competition
    problems), wildchat (WildChat prompts, NoveltyBench)."""
    train_source: str | None = None
    """Hub id, directory or file of the training prompts; default: the data set's own id."""
    test_sets: list[str] = field(default_factory=list)
    """Data sets to evaluate on (math, wildchat): names in shared/data/prompt_sets.py, with `:split` unless test."""
    test_sources: list[str] = field(default_factory=list)
    """Where they are, in the same order; default: their own ids."""
    n_train: int | None = None
    """Training prompts; default: all there are."""
    n_test: int | None = capped(100, smoke=4)
    test_split: str = "test"
    rare: float = 0.5
    """ideas: how strongly the base policy's favourites are the bad ideas, from 0 to 1 (the best are the rarest)."""

    # ---- reward (Eq. 5) ----
    diversity: str = "classes"
    """none; classes (DARLING: joined by the trained classifier); true_classes (the generated world's own semantics);
    ngram (distinct 4-grams); unlikeliness (rank of the log-probability within the group, He et al.);
    unlikeliness_min_max (the log-probability itself, from the least to the most likely, as in the authors' code)."""
    combine: str = "product"
    """product (Eq. 5) or sum (of both, standardised within the group)."""
    shape: str = "raw"
    """What happens to the quality reward before: raw, sigmoid, or min_shift (minus the group's minimum). The product
    rewards *less* diversity wherever the quality is negative."""
    scale_rewards: str = "none"
    """Divide advantages by the group's standard deviation (group) or not (none)."""

    # ---- reinforcement learning ----
    steps: int = capped(160, smoke=2)
    """Batches of rollouts; 0 keeps the starting policy."""
    prompts_per_step: int = capped(16, smoke=2)
    num_generations: int = capped(8, smoke=4)
    """Rollouts per prompt, n."""
    updates_per_step: int = 1
    """Optimizer steps per batch of rollouts; it is cut into as many mini-batches."""
    micro_batch_size: int | None = None
    """Completions per process and backward pass; default: all of a mini-batch."""
    lr: float = 3e-4
    beta: float = 0.0
    """Weight of the KL term to the starting policy (k3 estimator)."""
    clip: float = 0.2
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    temperature: float = 1.0
    max_prompt_tokens: int = 16
    max_new_tokens: int = 20
    bf16: bool = False
    gradient_checkpointing: bool = False
    vllm: bool = False
    """Rollouts and evaluation through vLLM (on GPUs)."""
    vllm_memory: float = 0.3
    """Share of each GPU's memory for vLLM during training."""

    # ---- starting policy ----
    model: str | None = None
    """Causal language model to start from: directory or hub id. None: a small Llama, fine-tuned on generated text."""
    layers: int = 2
    width: int = 64
    heads: int = 2
    init_std: float = 0.02
    """Deviation of the small Llama's first weights; with a width below 100, .02 is too small to learn fast."""
    n_traces: int = capped(24_000, smoke=400)
    sft_steps: int = capped(900, smoke=5)
    sft_batch_size: int = capped(128, smoke=32)
    sft_lr: float = 3e-3

    # ---- classifier of equivalent responses (Section 3.2) ----
    classifier: str | None = None
    """Sequence classifier of pairs: directory or hub id. None: a small ModernBERT, trained on pairs of rollouts."""
    same_label: int = 1
    """The classifier's output that stands for "equivalent"."""
    threshold: float = 0.5
    """Equivalent if the probability of `same_label` exceeds this."""
    short_answer_words: int = 0
    """Texts of at most so many words are compared by shared words instead (5 in the authors' code; 0: never)."""
    classifier_max_tokens: int = 128
    """Of both responses together; each is cut to half of it."""
    classifier_layers: int = 2
    classifier_width: int = 48
    classifier_init: float = 0.1
    """Deviation of its first weights; transformers' default, .02, is for wider models."""
    classifier_steps: int = capped(600, smoke=5)
    classifier_lr: float = 3e-3
    classifier_groups: int = capped(2000, smoke=20)
    """Groups of eight rollouts that give training pairs; the prompts of the held-out pairs are others."""
    label_noise: float = 0.05

    # ---- reward model ----
    reward_model: str | None = None
    """Sequence classifier with one output (wildchat)."""
    reward_at_cls: bool = False
    """The reward model reads its score at its CLS token after the completion (Athene-RM)."""

    # ---- evaluation ----
    n_samples: int = capped(32, smoke=10)
    """Samples per test prompt."""
    ks: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])
    """pass@k for these; those above n_samples are left out."""
    eval_temperature: float = 1.0
    eval_top_p: float = 1.0
    eval_max_new_tokens: int = 20
    sweep: list[float] = field(default_factory=list)
    """Temperatures to evaluate besides, with ten samples each."""
    eval_batch_size: int = 512
    eval_classifier: str | None = None
    """Classifier that counts distinct responses where the truth is not known."""
    eval_threshold: float = 0.102
    eval_reward_model: str | None = None
    pairs_source: str | None = None
    """Labelled pairs (shared/data/prompt_sets.py) to test `classifier` on, in the arm that does not train."""

    def __post_init__(self) -> None:
        for name, valid in (
            ("task", TASKS),
            ("diversity", DIVERSITIES),
            ("combine", COMBINATIONS),
            ("shape", SHAPES),
            ("scale_rewards", ("none", "group")),
        ):
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(valid)}")
        if self.num_generations < 2:
            raise ValueError(
                f"num_generations: diversity needs at least 2 rollouts per prompt, not {self.num_generations}"
            )
        if self.eval_temperature in self.sweep:
            raise ValueError(f"sweep: {self.eval_temperature} is eval_temperature, which is evaluated anyway")
        if self.test_sources and len(self.test_sources) != len(self.test_sets):
            raise ValueError(f"test_sources: {len(self.test_sources)} for {len(self.test_sets)} test_sets")
        if not self.generated:
            needs = {"model": self.model, "test_sets": self.test_sets}
            needs |= {"classifier": self.classifier} if self.diversity == "classes" else {}
            needs |= {"reward_model": self.reward_model} if self.task == "wildchat" else {}
            if missing := [name for name, value in needs.items() if not value]:
                raise ValueError(f"task {self.task} needs {', '.join(missing)}")
            if self.diversity == "true_classes":
                raise ValueError(f"diversity: true_classes needs a generated task, not {self.task}")

    @property
    def generated(self) -> bool:
        """Whether the task is a generated world, whose semantics are known."""
        return self.task in ("operators", "ideas")

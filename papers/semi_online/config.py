"""Every setting of the semi-online experiments; configs/SCALE.yaml and the arms in paper.yaml fill it in."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.experiments.config import capped

WORLDS = ("generated", "hub")
PHASES = ("math", "chat", "both")
METHODS = ("none", "dpo", "group_dpo", "grpo")


@dataclass
class Recipe:
    """How to train on one kind of prompts."""

    steps: int = capped(200, smoke=4)
    """Optimizer steps."""
    prompts: int = capped(16, smoke=4)
    """B: prompts per optimizer step, over all processes."""
    micro_prompts: int | None = None
    """Prompts per process and backward pass; default: all that a process has of a step."""
    n_train: int | None = capped(3200, smoke=40)
    """Training prompts (null: all there are; for math on the hub alone). A pass over them takes n_train / B steps."""
    max_new_tokens: int = 8
    """Longest response."""
    lr: float = 1e-4
    adam_epsilon: float = 1e-8
    clip: float = 1.0
    """Largest gradient norm."""
    beta: float = 0.1
    """DPO's temperature."""
    kl: float = 0.0
    """Weight of GRPO's KL penalty."""
    sync_reference: bool = True
    """DPO: the reference moves with the generator, every `sync_steps`; otherwise it stays the starting policy."""

    def __post_init__(self) -> None:
        for name in ("steps", "prompts", "n_train", "max_new_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}")


@dataclass
class Generated:
    """The generated world: two tasks, a policy that half knows them, a reward model learned from comparisons."""

    n_ops: list[int] = field(default_factory=lambda: [4, 4])
    """Fewest and most operations of an arithmetic problem."""
    modulus: int = 10
    layers: int = 2
    width: int = 64
    heads: int = 4
    mlp_width: int = 256
    """Three times ten times ten results have to be remembered somewhere."""
    sft_steps: int = capped(1500, smoke=20)
    sft_batch_size: int = capped(96, smoke=16)
    """Two thirds arithmetic, one third writing."""
    sft_lr: float = 2e-3
    competence: list[float] = field(default_factory=lambda: [0.25, 0.5])
    """Sampled accuracy on arithmetic (temperature 1) that the starting policy has to have."""
    competence_sums: float = 0.93
    """Least share of right additions and subtractions in the same samples."""
    reward_pairs: int = capped(30_000, smoke=200)
    reward_steps: int = capped(900, smoke=5)
    reward_lr: float = 3e-3
    reward_accuracy: float = 0.8
    """Least share of held-out comparisons that the reward model has to get right."""
    gated: bool = True
    """Refuse a starting policy or reward model that misses these; off at scale smoke."""


@dataclass
class Hub:
    """The paper's models and data."""

    model: str = "meta-llama/Llama-3.1-8B-Instruct"
    reward_model: str = "Nexusflow/Athene-RM-8B"
    reward_batch_size: int = 16
    math_tests: list[str] = field(default_factory=lambda: ["math500", "numinamath", "amc23"])
    """The first one gives the metric `accuracy`."""
    chat_tests: list[str] = field(default_factory=lambda: ["alpacaeval"])
    sources: dict[str, str] = field(default_factory=dict)
    """Prompt set -> file or directory to read it from instead of the hub."""


@dataclass
class Config:
    # ---- what an arm is ----
    phases: list[str] = field(default_factory=lambda: ["math"])
    """Kinds of prompts to train on, one after the other: math (verifier), chat (reward model), both (mixed)."""
    method: str = "dpo"
    """none (the starting policy), dpo, group_dpo (Eq. 4), grpo (Eq. 1)."""
    sync_steps: int | None = 1
    """s: optimizer steps between copies of the policy to the generator; None: never (offline)."""
    num_generations: int = 8
    """N: responses per prompt."""
    nll_weight: float = 0.0
    """Weight of the NLL of the chosen response in the DPO loss."""
    entropy_weight: float = 0.0
    """lambda_H: weight of the chosen response's mean next-token entropy, which the DPO loss rewards."""
    grpo_weight: float = 0.0
    """Weight of GRPO's loss beside GroupDPO's."""
    advantage_std: bool = False
    """GRPO: divide advantages by their group's standard deviation (the paper's formula does not; its code did)."""

    # ---- training ----
    math: Recipe = field(default_factory=Recipe)
    chat: Recipe = field(default_factory=Recipe)
    both: Recipe = field(default_factory=Recipe)
    save_every: int = capped(50, smoke=2)
    """Optimizer steps between the checkpoints among which evaluation chooses."""
    bf16: bool = False
    gradient_checkpointing: bool = False
    generation_batch_size: int = 512
    use_vllm: bool = False
    """Sample with vLLM."""
    vllm_mode: str = "colocate"
    """colocate, or server (`trl vllm-serve`, at vllm_url)."""
    vllm_url: str | None = None
    vllm_memory: float = 0.3
    """Share of the GPU for vLLM in mode colocate."""

    # ---- evaluation ----
    n_dev: int = capped(200, smoke=8)
    """Held-out prompts of each task for choosing checkpoints."""
    dev_samples: int = 2
    n_test: int = capped(400, smoke=8)
    test_samples: int = 4
    eval_temperature: float = 0.6
    eval_top_p: float = 0.9
    judge_model: str | None = None
    """Chat on the hub: a language model that also judges each test prompt's first response against the starting
    policy's."""
    judge_backend: str = "openai"
    """openai (a server at judge_url), vllm or transformers."""
    judge_url: str | None = None
    all_tasks: bool = True
    """Test both tasks, also the one that the arm was not trained on."""

    # ---- where it happens ----
    world: str = "generated"
    generated: Generated = field(default_factory=Generated)
    hub: Hub = field(default_factory=Hub)

    def __post_init__(self) -> None:
        if self.world not in WORLDS:
            raise ValueError(f"world: {self.world!r} is not one of {', '.join(WORLDS)}")
        if self.method not in METHODS:
            raise ValueError(f"method: {self.method!r} is not one of {', '.join(METHODS)}")
        if not self.phases or set(self.phases) - set(PHASES):
            raise ValueError(f"phases: {self.phases} must be some of {', '.join(PHASES)}")
        if self.method in ("group_dpo", "grpo") and "both" in self.phases:
            raise ValueError(f"method {self.method} trains on one kind of prompts at a time, not on both")
        if self.method == "group_dpo" and "chat" in self.phases:
            raise ValueError("method group_dpo needs rewards of 0 and 1: phase math")
        if self.entropy_weight and self.method != "dpo":
            raise ValueError(f"entropy_weight is a term of the loss of method dpo, not of {self.method}")
        if self.judge_model and self.world != "hub":
            raise ValueError(
                "judge_model: the responses of the generated world are no sentences; its hidden reader judges"
            )
        for name in ("math", "chat", "both"):
            if getattr(self, name).n_train is None and (name, self.world) != ("math", "hub"):
                raise ValueError(f"{name}.n_train: give the number of prompts")
        if self.sync_steps is not None and self.sync_steps < 1:
            raise ValueError(f"sync_steps must be at least 1, or null for never, found {self.sync_steps}")
        if self.num_generations < 2:
            raise ValueError(f"num_generations must be at least 2, found {self.num_generations}")

    @property
    def trained_tasks(self) -> list[str]:
        """math, chat or both of them."""
        named = {task for phase in self.phases for task in (("math", "chat") if phase == "both" else (phase,))}
        return [task for task in ("math", "chat") if task in named]

    @property
    def selects(self) -> bool:
        """Whether evaluation chooses among checkpoints: only where there is one task to choose by."""
        return self.method != "none" and len(self.phases) == 1 and len(self.trained_tasks) == 1

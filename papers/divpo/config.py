"""Every setting of the DivPO experiments; configs/SCALE.yaml and the arms in paper.yaml fill it in."""

from __future__ import annotations

from dataclasses import dataclass, field

from shared.experiments.config import capped

CHOICES = {
    "task": ("persona", "keywords", "instruct"),
    "method": ("base", "sft", "dpo", "grpo", "divpo"),
    "criterion": ("probability", "frequency", "overlap", "llm"),
    "rho_mode": ("range", "quantile"),
    "lr_schedule": ("constant", "cosine"),
    "sampler": ("transformers", "vllm"),
    "reward_model_kind": ("classifier", "armo"),
}


@dataclass
class Config:
    # ---- task ----
    task: str = "persona"
    """persona (JSON of one fixed prompt, rule reward), keywords (five for a story's title) or instruct (WildChat)."""
    n_values: int = 100
    """persona: values of each attribute."""
    n_topics: int = 12
    n_words: int = 30
    """keywords: words of each topic."""
    n_styles: int = 10
    train_prompts: int | None = capped(None, smoke=40)
    """keywords and instruct: most prompts to train on."""
    test_prompts: int = capped(60, smoke=5)
    prompts: str | None = None
    """instruct: where WildChat is, a directory, file or hub dataset with its columns. None: the hub."""

    # ---- method ----
    method: str = "divpo"
    """base (no training), sft (on the best sample), dpo (best against worst), grpo (online RL on the reward alone) or
    divpo."""
    online: bool = True
    """Sample from the policy itself at each step; otherwise from the starting policy throughout."""
    criterion: str = "probability"
    """What DivPO calls diverse: low probability, low word frequency, low overlap with the other candidates, or what a
    language model says (llm: `judge_model`)."""
    rho: float = 0.3
    """Width of the good enough and of the bad rewards, as a share of their range; see method.quality_sets."""
    rho_mode: str = "range"
    allow_all_equal: bool = False
    """Whether samples with all the same reward give a pair."""
    beta: float = 0.1
    """DPO's; GRPO has no KL term."""
    nll_weight: float = 0.0
    """Weight of the chosen response's negative log-likelihood per token beside the DPO loss."""

    # ---- optimization ----
    steps: int = capped(160, smoke=3)
    prompts_per_step: int = capped(32, smoke=4)
    """Pools per optimizer step; each gives a pair at most."""
    num_generations: int = capped(16, smoke=4)
    """N: samples of a pool."""
    micro_batch_size: int | None = None
    """Pools per process and backward pass; default: all that a process has of a step."""
    lr: float = 3e-4
    lr_schedule: str = "constant"
    """After the warm-up: constant, or cosine to a fifth."""
    warmup_steps: int = 0
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip: float = 1.0
    bf16: bool = False
    gradient_checkpointing: bool = False

    # ---- models ----
    model: str | None = None
    """The policy that training starts from: an instruct model's directory or hub id. None: a Llama of the sizes below,
    trained on the generated world's author first."""
    layers: int = 2
    width: int = 64
    heads: int = 4
    sft_steps: int = capped(500, smoke=150)
    sft_batch_size: int = 128
    sft_lr: float = 3e-3
    sft_examples: int = capped(20_000, smoke=2000)
    least_competence: float = capped(0.5, smoke=0.0)
    """Least share of valid samples that the policy must have before the arms part."""
    reward_model: str | None = None
    """keywords and instruct at paper scale: directory or hub id."""
    reward_model_kind: str = "classifier"
    """classifier (one output; Athene) or armo (ArmoRM's 19 objectives and gate)."""
    reward_model_learned: bool = False
    """keywords in a generated world: train against a reward model learned from comparisons, not against the rule."""
    reward_model_pairs: int = capped(24_000, smoke=200)
    """Most comparisons; samples without five keywords make about half of them void."""
    reward_model_steps: int = capped(400, smoke=3)
    reward_model_lr: float = 1e-3
    reward_model_accuracy: float = capped(0.65, smoke=0.0)
    """Least share of held-out pairs that it must order right."""
    judge_model: str | None = None
    judge_backend: str = "openai"
    judge_url: str | None = None
    """openai: the server's address."""

    # ---- sampling ----
    sampler: str = "transformers"
    max_new_tokens: int = 14
    generation_batch_size: int = 1024

    # ---- evaluation ----
    n_samples: int = capped(1000, smoke=100)
    """persona: samples of the prompt, more if too few of them are valid."""
    unique_first: int = capped(100, smoke=1)
    """persona: the number of valid samples among which values are counted. Shares of unique values fall as it grows."""
    samples_per_prompt: int = capped(16, smoke=4)
    """keywords and instruct."""
    temperatures: list[float] = field(default_factory=list)
    """Temperatures to evaluate beside 1."""
    matched_unique: float = capped(0.0, smoke=0.0)
    """keywords: unique words at which arms with `temperatures` are compared by reward; 0 for no comparison."""
    stories: bool = False
    """keywords with `model`: that model writes a story for each set of keywords."""
    story_tokens: int = capped(512, smoke=16)

    def __post_init__(self) -> None:
        for name, valid in CHOICES.items():
            if getattr(self, name) not in valid:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(valid)}")
        if not 0 <= self.rho <= 0.5:
            raise ValueError(f"rho: {self.rho} is not between 0 and 0.5")
        if self.num_generations < 2:
            raise ValueError("num_generations: a pair needs at least 2 samples")
        if self.method == "grpo" and self.nll_weight:
            raise ValueError("nll_weight is a term of DPO's loss, method grpo has none")
        if self.method == "grpo" and not self.online:
            raise ValueError("method grpo needs online: true, its gradient is that of the policy that sampled")
        if self.task == "instruct" and not (self.model and self.reward_model):
            raise ValueError("task instruct needs model and reward_model")
        if self.task == "keywords" and self.model and not self.reward_model:
            raise ValueError("task keywords needs a reward_model where the policy is a pretrained model")
        if self.criterion == "llm" and self.method == "divpo" and not self.judge_model:
            raise ValueError("criterion llm needs a judge_model")
        if self.reward_model_learned and (self.task != "keywords" or self.model):
            raise ValueError("reward_model_learned is for task keywords without model")
        if self.stories and not (self.model and self.task == "keywords"):
            raise ValueError("stories needs task keywords and a model to write them")

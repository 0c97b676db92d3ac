"""`EAPOConfig`: every setting of a training run, checked before anything is loaded.

Names and defaults are those of TRL's `GRPOConfig` where the two overlap. `None` in a field that a
recipe also sets (clip range, loss type, ...) means "what the recipe says"; a value overrides it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from eapo_fast.errors import ConfigError, suggest

if TYPE_CHECKING:
    from eapo_fast.experts import Budget
    from eapo_fast.recipes import Recipe

T = TypeVar("T")

_CHOICES: dict[str, tuple[Any, ...]] = {
    "consult_schedule": ("inverse", "constant", "linear", "cosine"),
    "consult_gate": ("before_dispatch", "after_reply"),
    "expert_dedup": ("off", "in_flight", "step", "run"),
    "expert_answers": ("keep", "redact", "decline"),
    "expert_failure": ("keep", "mask", "drop_group", "stop"),
    "importance_sampling_level": (None, "token", "sequence"),
    "scale_rewards": (None, "group", "batch", "none"),
    "loss_type": (None, "dapo", "grpo", "dr_grpo", "bnpo", "cispo"),
    "lr_scheduler_type": (None, "constant", "linear", "cosine"),
    "optim": ("adamw_torch", "adamw_torch_fused"),
    "eval_strategy": ("no", "steps"),
    "save_strategy": ("no", "steps"),
    "report_to": ("none",),
}

_AT_LEAST: dict[str, float] = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_generations": 2,
    "num_iterations": 1,
    "max_completion_length": 1,
    "max_turns": 1,
    "max_queries_per_turn": 1,
    "logging_steps": 1,
    "save_steps": 1,
    "eval_steps": 1,
    "num_generations_eval": 1,
    "micro_batch_tokens": 1,
    "consult_schedule_offset": 1,
    "learning_rate": 0.0,
    "beta": 0.0,
    "epsilon": 0.0,
    "epsilon_high": 0.0,
    "weight_decay": 0.0,
    "warmup_steps": 0.0,
    "top_k": 0,
    "expert_timeout": 0.0,
    "reliance_steps": 1,
    "reliance_rollouts": 0,
}

_UNIT_INTERVAL = ("top_p", "min_p", "consult_floor", "turn_contraction", "expert_failure_share")

# TRL names that have no meaning here: the only value that changes nothing, and what to do instead.
_FOREIGN: dict[str, tuple[Any, str]] = {
    "use_vllm": (False, "eapo_fast samples from the trained weights themselves; remove use_vllm"),
    "use_transformers_continuous_batching": (False, "the paged sampler replaces it; remove it"),
    "cache_implementation": (None, "the paged KV cache replaces it; remove it"),
    "deepspeed": (None, "DeepSpeed is not supported; one process trains the whole model"),
    "fsdp": (None, "sharded training is not supported yet; one process trains the whole model"),
    "repetition_penalty": (1.0, "it would change the sampled distribution; remove it"),
    "fp16": (False, "float16 needs loss scaling; use bf16=True or float32"),
    "remove_unused_columns": (False, "reward functions need the columns; remove it"),
    "sync_ref_model": (False, "the reference stays fixed; remove it"),
    "top_entropy_quantile": (1.0, "no recipe here trains on a share of the tokens; remove it"),
    "generation_kwargs": (None, "temperature, top_p, top_k and min_p are fields of their own"),
    "max_tool_calling_iterations": (None, "max_turns is the limit on consults"),
    "dataloader_num_workers": (0, "prompts are tokenised once, before step 1; remove it"),
    "push_to_hub": (False, "call trainer.save_model(dir) and upload the folder"),
}


def _checked_names(cls: type[T]) -> type[T]:
    """Make an unknown keyword a `TypeError` that proposes the nearest field."""
    generated: Callable[..., None] = cls.__init__
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]

    def __init__(self: Any, **settings: Any) -> None:
        for name in [n for n in settings if n not in names]:
            if name not in _FOREIGN:
                raise TypeError(f"{cls.__name__} has no field {name!r}.{suggest(name, names)}")
            neutral, remedy = _FOREIGN[name]
            if settings.pop(name) != neutral:
                raise ConfigError(f"{name}: only {neutral!r} is accepted: {remedy}")
        generated(self, **settings)

    cls.__init__ = __init__  # type: ignore[method-assign]
    return cls


@_checked_names
@dataclass(frozen=True, kw_only=True, slots=True)
class EAPOConfig:
    """Settings of a run; see each field. Raises `TypeError` (unknown name) or `ConfigError`."""

    output_dir: str | None = None
    """Where metrics, rollouts, checkpoints and the final model go; None: `runs/<model>-EAPO`."""
    run_name: str | None = None
    """Title of the live view and the report; None: the name of `output_dir`."""
    recipe: str | Recipe = "eapo"
    """Policy-optimization method: a name of `recipes.names()` or a `Recipe`."""

    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""
    lr_scheduler_type: str | None = None
    """constant, linear or cosine, after the warm-up; None: constant for eapo, linear otherwise."""
    warmup_steps: float | None = None
    """Linear warm-up in steps (a value below 1: share of all steps); None: 20 for eapo, else 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices."""
    adam_beta1: float = 0.9
    """First-moment decay."""
    adam_beta2: float = 0.999
    """Second-moment decay."""
    adam_epsilon: float = 1e-8
    """Denominator floor of Adam."""
    max_grad_norm: float = 1.0
    """Gradient norm is clipped to this; 0 switches clipping off."""
    optim: str = "adamw_torch_fused"
    """Optimizer implementation."""

    per_device_train_batch_size: int = 8
    """Completions (not prompts) of one accumulation slice."""
    gradient_accumulation_steps: int = 1
    """Slices of one optimizer step: completions per step = this x per_device_train_batch_size."""
    steps_per_generation: int | None = None
    """Slices sampled at once; None: gradient_accumulation_steps."""
    generation_batch_size: int | None = None
    """Completions sampled at once; the other way to say steps_per_generation."""
    num_generations: int = 8
    """G, rollouts of one prompt group."""
    num_iterations: int = 1
    """Optimizer passes over one sampled batch (mu)."""
    micro_batch_tokens: int | None = None
    """Token budget of one packed forward; changes memory and speed, never the gradient. None:
    4096 on CPU (activations stay in cache), 16384 on a GPU."""
    max_steps: int = -1
    """Optimizer steps; -1: from num_train_epochs."""
    num_train_epochs: float = 3.0
    """Passes over the training prompts when max_steps is -1."""

    max_completion_length: int = 512
    """Most policy tokens of a rollout (expert text does not count)."""
    max_prompt_length: int | None = None
    """Longer prompts are dropped, with a warning; None keeps all."""
    temperature: float = 1.0
    """Sampling and training temperature."""
    top_p: float = 1.0
    """Nucleus truncation; 1 is off. Training on truncated samples is biased: keep it off."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 is off."""
    min_p: float | None = None
    """Keep tokens of at least this share of the top probability; None is off."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Passed on to the tokenizer's chat template."""
    system_prompt: str | None = None
    """System text before every problem; None: none."""
    consult_prompt: str | None = None
    """How to consult, shown in training only; None: the protocol's text; "" shows nothing."""

    epsilon: float | None = None
    """Lower clip range of the ratio."""
    epsilon_high: float | None = None
    """Upper clip range of the ratio."""
    delta: float | None = None
    """Dual clip for negative advantages."""
    beta: float | None = None
    """KL coefficient to the reference model; 0 loads no reference."""
    loss_type: str | None = None
    """TRL's name of an aggregation: overrides the recipe's."""
    importance_sampling_level: str | None = None
    """token or sequence ratio."""
    scale_rewards: str | bool | None = None
    """Advantage scale: group, batch or none (True is group, False is none)."""
    entropy_coef: float | None = None
    """Entropy bonus."""
    reward_weights: Sequence[float] | None = None
    """Weight of each reward function; None: all 1."""
    mask_truncated_completions: bool = False
    """Leave rollouts that ran into max_completion_length out of loss and group statistics."""

    max_turns: int = 10
    """T_0, turns of a rollout at the start of training; one turn means no consult."""
    max_queries_per_turn: int = 3
    """K, queries in one consult block."""
    consult_schedule: str = "inverse"
    """Acceptance rate over steps: inverse, constant, linear or cosine."""
    consult_schedule_offset: float = 1
    """s0 of rho(s) = min(1, (s / s0) ** -p)."""
    consult_schedule_power: float = 1.0
    """p of rho(s)."""
    consult_floor: float = 0.0
    """Acceptance never falls below this."""
    consult_gate: str = "before_dispatch"
    """Draw the gate before the call (nothing is bought in vain) or after the reply (the paper)."""
    turn_contraction: float = 0.5
    """Share of the steps over which max_turns falls linearly to 1; 0 keeps max_turns."""
    expert_timeout: float = 60.0
    """Seconds after which an unanswered consult gets the notice."""
    expert_step_timeout: float | None = None
    """Seconds from a step's first consult after which every unanswered one gets the notice."""
    expert_hedge_after: float | None = None
    """Seconds after which a late call gets a second one beside it, inside the budget; None: never.
    """
    expert_dedup: str = "in_flight"
    """Share replies between equal requests: off, in_flight, step or run."""
    expert_answers: str = "keep"
    """Replies with a boxed answer: keep, redact the box, or decline the reply."""
    expert_failure: str = "keep"
    """When the expert fails en masse (rate, timeout, down): keep the rollouts, mask those that
    were hit, drop_group (theirs), or stop the run."""
    expert_failure_share: float = 0.5
    """Share of a generation's dispatched consults from which failures count as such."""
    reliance_steps: int = 10
    """Steps between measurements of how much correct assisted rollouts lean on the advice."""
    reliance_rollouts: int = 8
    """Most rollouts measured; 0: never."""
    expert_budget: Budget | Sequence[Budget] | None = None
    """Caps on consults, tokens or money."""
    expert_cache: str | Path | None = None
    """SQLite file of replies that may be used again, in later runs too."""
    expert_record: str | Path | None = None
    """JSONL file that every reply and its engine step are written to."""
    expert_replay: str | Path | None = None
    """JSONL file to answer from instead of asking the expert: the recorded run, to the bit."""

    eval_strategy: str = "no"
    """no or steps (solo evaluation on eval_dataset)."""
    eval_steps: int = 500
    """Steps between evaluations."""
    eval_on_start: bool = False
    """Evaluate before step 1 as well."""
    num_generations_eval: int = 1
    """Samples per problem in evaluation."""
    eval_temperature: float | None = None
    """Evaluation temperature; None: 0.6 for eapo (LeaP's protocol), else temperature."""
    eval_top_p: float | None = None
    """Evaluation nucleus; None: 0.95 for eapo, else top_p."""
    eval_max_completion_length: int | None = None
    """None: max_completion_length."""

    logging_steps: int = 10
    """Steps between lines of metrics.jsonl (values are means over them)."""
    save_strategy: str = "steps"
    """no or steps (checkpoints)."""
    save_steps: int = 500
    """Steps between checkpoints."""
    save_total_limit: int | None = None
    """Newest checkpoints kept; None keeps all."""
    save_only_model: bool = False
    """Checkpoints without optimizer state: smaller, cannot be resumed."""
    save_rollouts_steps: int | None = None
    """Steps between saved rollouts; None: logging_steps; 0 saves none."""
    report_to: str = "none"
    """Only none: metrics.jsonl is the record; use a callback for anything else."""
    disable_tqdm: bool = False
    """No live view, not even plain lines."""
    log_completions: bool = False
    """Print one rollout at every logging step."""

    seed: int = 42
    """Seed of every draw."""
    data_seed: int | None = None
    """Seed of the prompt order; None: seed."""
    shuffle_dataset: bool = True
    """Permute the prompts in each epoch."""
    bf16: bool | None = None
    """Train and sample in bfloat16; None: on a GPU that has it, float32 on CPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward."""
    disable_dropout: bool = True
    """Dropout would make the trained policy differ from the sampled one."""
    use_cpu: bool = False
    """Stay on CPU even when a GPU is there."""
    full_determinism: bool = False
    """Ask torch for deterministic algorithms only (slower on a GPU)."""
    sampler_max_batch: int = 256
    """Rollouts decoded at once."""
    sampler_block_size: int | None = None
    """Tokens of one KV block; None: 16 on CPU, 64 on a GPU."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Free notes of the user, saved with the run."""

    def __post_init__(self) -> None:
        self._normalise()
        for name, allowed in _CHOICES.items():
            _check_choice(name, getattr(self, name), allowed)
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and value >= least):
                raise ConfigError(f"{name}: got {value!r}, allowed is a number, {least:g} or more")
        for name in _UNIT_INTERVAL:
            value = getattr(self, name)
            if value is not None and not 0.0 <= value <= 1.0:
                raise ConfigError(f"{name}: got {value!r}, allowed is 0 to 1")
        if not self.temperature > 0:
            raise ConfigError(f"temperature: got {self.temperature!r}, training needs more than 0")
        if self.max_steps == 0 or self.max_steps < -1:
            raise ConfigError(f"max_steps: got {self.max_steps}, allowed is -1 or 1 and more")
        self._check_batches()

    def _normalise(self) -> None:
        if isinstance(self.scale_rewards, bool):
            object.__setattr__(self, "scale_rewards", "group" if self.scale_rewards else "none")

    def _check_batches(self) -> None:
        if self.steps_per_generation is not None and self.generation_batch_size is not None:
            raise ConfigError(
                "steps_per_generation and generation_batch_size say the same thing: give one"
            )
        size = self.per_device_train_batch_size
        if self.generation_batch_size is not None and self.generation_batch_size % size:
            raise _not_divisible(
                "generation_batch_size", self.generation_batch_size, size,
                "per_device_train_batch_size",
            )  # fmt: skip
        slices, accumulation = self.slices_per_generation, self.gradient_accumulation_steps
        if slices % accumulation:
            raise _not_divisible(
                "steps_per_generation", slices, accumulation, "gradient_accumulation_steps"
            )
        if self.completions_per_generation % self.num_generations:
            raise self._group_error()

    def _group_error(self) -> ConfigError:
        got, group, slices = (
            self.completions_per_generation,
            self.num_generations,
            self.slices_per_generation,
        )
        sizes = _neighbours(self.per_device_train_batch_size, lambda b: b * slices % group == 0)
        groups = _neighbours(group, lambda g: g > 1 and got % g == 0)
        return ConfigError(
            f"{got} completions are sampled at once (per_device_train_batch_size "
            f"{self.per_device_train_batch_size} x {slices} slices), which num_generations {group} "
            f"does not divide. Nearest valid: per_device_train_batch_size {_either(sizes)}, "
            f"or num_generations {_either(groups)}"
        )

    @property
    def slices_per_generation(self) -> int:
        """Accumulation slices sampled at once."""
        if self.generation_batch_size is not None:
            return self.generation_batch_size // self.per_device_train_batch_size
        return self.steps_per_generation or self.gradient_accumulation_steps

    @property
    def completions_per_step(self) -> int:
        """Rollouts of one optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def completions_per_generation(self) -> int:
        """Rollouts sampled at once."""
        return self.per_device_train_batch_size * self.slices_per_generation

    @property
    def prompts_per_generation(self) -> int:
        """Prompt groups sampled at once."""
        return self.completions_per_generation // self.num_generations

    @property
    def steps_per_cycle(self) -> int:
        """Optimizer steps between two generations."""
        return self.slices_per_generation // self.gradient_accumulation_steps * self.num_iterations

    @property
    def recipe_name(self) -> str:
        """Name of the recipe."""
        return self.recipe if isinstance(self.recipe, str) else self.recipe.name

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> EAPOConfig:
        """Build from a mapping (a YAML file, a saved run). Raises as the constructor does."""
        return cls(**dict(settings))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-able values (a `Recipe` or `Budget` as its mapping)."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def replace(self, **changes: Any) -> EAPOConfig:
        """Return a copy with some fields changed, checked again."""
        names = [f.name for f in dataclasses.fields(self)]
        return type(self)(**{n: getattr(self, n) for n in names} | changes)


def _check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value in allowed:
        return
    words = [a for a in allowed if isinstance(a, str)]
    raise ConfigError(
        f"{name}: got {value!r}, allowed is one of {', '.join(words)}.{suggest(str(value), words)}"
    )


def _not_divisible(name: str, got: int, unit: int, unit_name: str) -> ConfigError:
    near = _either(_neighbours(got, lambda n: n % unit == 0))
    return ConfigError(
        f"{name}: got {got}, allowed are multiples of {unit_name} ({unit}). Nearest valid: {near}"
    )


def _neighbours(start: int, valid: Callable[[int], bool]) -> list[int]:
    below = next((n for n in range(start - 1, 0, -1) if valid(n)), None)
    above = next((n for n in range(start + 1, 64 * start + 65) if valid(n)), None)
    return [n for n in (below, above) if n is not None]


def _either(values: Sequence[int]) -> str:
    return " or ".join(str(v) for v in values) or "none"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value

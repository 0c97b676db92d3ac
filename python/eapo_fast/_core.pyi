from collections.abc import Sequence
from typing import Literal, TypedDict, final, type_check_only

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__version__: str

def isa() -> str: ...
def supported_isas() -> list[str]:
    """Instruction sets of the CPU kernels that this CPU runs, narrowest first.

    Of "scalar", "avx2", "avx512" and "avx512bf16": avx512 whose attention multiplies pairs of
    bfloat16; elsewhere both are the same code.
    """

def set_isa(name: str) -> None: ...
def num_threads() -> int: ...
def set_num_threads(count: int) -> None: ...
def share_openmp(gomp_parallel: int) -> None: ...
def shares_openmp() -> bool: ...

class OutOfBlocks(RuntimeError):
    """No KV block is free."""

def philox4x32(
    counter: tuple[int, int, int, int], key: tuple[int, int]
) -> tuple[int, int, int, int]:
    """One block of Philox4x32-10 (Salmon et al., SC 2011)."""

def keyed_uniform(seed: int, purpose: str, indices: Sequence[int]) -> float:
    """A float in [0, 1) with 53 random bits, a pure function of the arguments.

    Seed and indices are integers of 64 bits, signed or unsigned (ValueError beyond).
    """

@final
class BlockAllocator:
    """Reference-counted KV blocks whose free list is the eviction list.

    Free blocks are handed out in this order: those released without `keep`, the last one first,
    then the others, the least recently released first.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None: ...
    def allocate(self) -> int:
        """A block with one owner; OutOfBlocks if none is free."""

    def reuse(self, block: int) -> None:
        """A free block gets an owner, wherever it is in the list; ValueError for a used one."""

    def share(self, block: int) -> None:
        """One owner more; ValueError for a free block."""

    def release(self, block: int, keep: bool = False) -> None:
        """One owner less, the last one frees the block; ValueError for a free block."""

    def ref_count(self, block: int) -> int:
        """Owners of the block, 0 when it is free."""

    def check(self) -> None:
        """RuntimeError if the free list disagrees with the reference counts."""
    @property
    def num_free(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...

@final
class KvPool:
    """The KV blocks of a device, what is cached in them, and host blocks to swap to.

    It outlives schedulers, which use it one after another. Cached are full blocks whose KV was
    computed: rows of the same weights epoch that begin with the same tokens find them until they
    are handed out anew.
    """

    def __init__(self, num_blocks: int, block_size: int, host_blocks: int = 0) -> None: ...
    def advance_epoch(self) -> None:
        """The weights have changed: nothing that is cached so far will be found again."""

    def check(self) -> None:
        """RuntimeError if an invariant is broken."""
    @property
    def epoch(self) -> int:
        """0 at first."""
    @property
    def num_blocks(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def num_free(self) -> int:
        """Blocks without an owner, the cached ones among them included."""
    @property
    def num_cached(self) -> int:
        """Cached blocks, with an owner or without, of this epoch or an earlier one."""
    @property
    def host_blocks(self) -> int: ...
    @property
    def num_host_free(self) -> int: ...

@final
class Vocabulary:
    """The bytes of every token; make one per tokenizer. Schedulers and threads may share it."""

    def __init__(self, token_bytes: Sequence[bytes]) -> None: ...
    def __len__(self) -> int: ...

@final
class TagMatcher:
    """Finds byte patterns in a stream of tokens with one integer of state (Aho and Corasick)."""

    def __init__(self, patterns: Sequence[bytes], vocabulary: Vocabulary) -> None: ...
    @property
    def root(self) -> int: ...
    def advance(self, state: int, token: int) -> tuple[int, int, int]:
        """(next state, pattern or -1, bytes of the token behind the match).

        Of several matches in the token the one that ends first counts, of several that end at one
        byte the longest. Tokens beyond the vocabulary have no bytes.
        """

    def completing_tokens(self, state: int) -> list[int]:
        """Sorted tokens that would complete some pattern; computed once per state."""

@final
class StepPlan:
    """Inputs of a forward pass over T tokens of S rows, logits at L of them, N >= L samples.

    `input_ids`, `positions`, `slots`: [T]. `seqs`, `kv_lens`: [S], `cu_q`: [S + 1],
    `block_tables`: [S, blocks] padded with 0. Rows that decode come first, the members of a group
    side by side. `max_q_len`, `max_kv_len`: most tokens of a row in this step, most of `kv_lens`.

    Before the forward move all blocks of `swap_out` [K, 2] (block, host block), then of `swap_in`
    [K, 2] (host block, block), then of `copies` [C, 2] (source, destination); each in any order.

    `shared_spans` [P, 2] (first segment, number of segments >= 2), `shared_lens` [P]: the segments
    of a span have one token each, belong to one group and begin with the same blocks for so many
    tokens (a multiple of the block size).

    `logits_rows`: [L] indices into T. `sample_rows`: [N] indices into L (the first tokens of a
    group share a row, so N may exceed max_batch); `sample_seqs`, `uniforms`, `temperatures`,
    `top_ks`, `top_ps`, `min_ps`: [N]. `ban_rows`, `ban_ids`: [B], sample `ban_rows[i]` must not be
    `ban_ids[i]`.

    The arrays look into the plan and keep it alive.
    """

    @property
    def input_ids(self) -> NDArray[np.int64]: ...
    @property
    def positions(self) -> NDArray[np.int64]: ...
    @property
    def slots(self) -> NDArray[np.int64]: ...
    @property
    def seqs(self) -> NDArray[np.int32]: ...
    @property
    def cu_q(self) -> NDArray[np.int32]: ...
    @property
    def kv_lens(self) -> NDArray[np.int32]: ...
    @property
    def block_tables(self) -> NDArray[np.int32]: ...
    @property
    def max_q_len(self) -> int: ...
    @property
    def max_kv_len(self) -> int: ...
    @property
    def swap_out(self) -> NDArray[np.int32]: ...
    @property
    def swap_in(self) -> NDArray[np.int32]: ...
    @property
    def copies(self) -> NDArray[np.int32]: ...
    @property
    def shared_spans(self) -> NDArray[np.int32]: ...
    @property
    def shared_lens(self) -> NDArray[np.int32]: ...
    @property
    def logits_rows(self) -> NDArray[np.int64]: ...
    @property
    def sample_rows(self) -> NDArray[np.int32]: ...
    @property
    def sample_seqs(self) -> NDArray[np.int32]: ...
    @property
    def uniforms(self) -> NDArray[np.float32]: ...
    @property
    def temperatures(self) -> NDArray[np.float32]: ...
    @property
    def top_ks(self) -> NDArray[np.int32]: ...
    @property
    def top_ps(self) -> NDArray[np.float32]: ...
    @property
    def min_ps(self) -> NDArray[np.float32]: ...
    @property
    def ban_rows(self) -> NDArray[np.int32]: ...
    @property
    def ban_ids(self) -> NDArray[np.int32]: ...

@final
class Event:
    """A row that finished or was parked by its newest token.

    `pattern` is the index in the stop patterns (finished) or park patterns (parked) of its rules,
    -1 where none matched; `overshoot` counts the bytes of the token behind the pattern.
    """

    @property
    def seq(self) -> int: ...
    @property
    def kind(self) -> Literal["finished", "parked"]: ...
    @property
    def pattern(self) -> int: ...
    @property
    def overshoot(self) -> int: ...

@type_check_only
class SequenceTokens(TypedDict):
    """All that follows the prompt, one entry a token; bans are (position, id) pairs."""

    token_ids: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    kept_mass: NDArray[np.float32]
    mask: NDArray[np.uint8]
    ban_positions: NDArray[np.int32]
    ban_ids: NDArray[np.int32]
    finish_reason: str

@final
class Scheduler:
    """Paged continuous batching: plan a step, run it, commit its tokens.

    Rows run in groups that share their prompt. A row that completes a park pattern leaves the batch
    until `inject`. What a row samples depends on its request alone, never on blocks, budget, batch
    or preemption. The oldest runnable row is part of every plan.

    `plan` and `commit` release the GIL. A scheduler and its pool are for one thread at a time.

    Args:
        pool: unused by other schedulers (RuntimeError); all blocks are given back to it when the
            scheduler is destroyed.
        vocabulary: token bytes for stop, park and banned patterns.
        max_batch: rows that compute in one step; parked rows don't count.
        max_step_tokens: tokens of one step.
        max_context: tokens of a row.
        prefix_cache: rows find cached blocks and their own are cached. Siblings share their prompt
            either way; without the cache a row that lost its prompt computes it again.
    """

    def __init__(
        self,
        pool: KvPool,
        vocabulary: Vocabulary,
        max_batch: int,
        max_step_tokens: int,
        max_context: int,
        prefix_cache: bool = True,
    ) -> None: ...
    def add_rules(
        self,
        stop_token_ids: Sequence[int] = (),
        stop_patterns: Sequence[bytes] = (),
        park_patterns: Sequence[bytes] = (),
        banned_token_ids: Sequence[int] = (),
        banned_patterns: Sequence[bytes] = (),
    ) -> int:
        """The id of these rules; equal rules have equal ids.

        Stop ids come before patterns; of patterns in one token the one that ends first counts.
        ValueError for empty or repeated patterns and negative ids.
        """
    def add_group(
        self,
        prompt: Sequence[int],
        n: int,
        rules: int,
        max_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        step: int = 0,
        prompt_id: int = 0,
        temperature_schedule: Sequence[float] = (),
    ) -> list[int]:
        """Sequence ids of n samples, drawn by (seed, step, prompt_id, sample, position).

        The i-th sampled token of a row (from 0, injected ones don't count) has temperature
        `temperature_schedule[min(i, len - 1)]`, or `temperature` if the schedule is empty.

        ValueError if the prompt and one token do not fit the context and the pool, or a value is
        out of range.
        """

    def plan(self) -> StepPlan | None:
        """The next step, or None if no row is runnable; RuntimeError before the last commit."""
    def commit(
        self,
        tokens: NDArray[np.int64],
        logprobs: NDArray[np.float32],
        kept_mass: NDArray[np.float32],
    ) -> list[Event]:
        """Takes the N samples of the planned step, [N] each; a ValueError changes nothing.

        A token of -1 (no distribution) ends its row as "error"; nothing is appended to it.
        """

    def inject(self, seq: int, ids: Sequence[int]) -> bool:
        """Appends tokens with mask 0 to a parked row and makes it runnable.

        False if no policy token could follow: the row is then finished as "length", without `ids`.
        """

    def finish(self, seq: int, reason: str) -> None:
        """Ends an unfinished row and frees its KV; RuntimeError while it is planned."""

    def set_rules(self, seq: int, rules: int) -> None:
        """Other rules for the tokens to come; matchers see the tokens since the last injection."""

    def expect_wait(self, seq: int, seconds: float) -> None:
        """How long a parked row will wait for its injection (infinity: unknown, the default).

        Rows with the longest waits give their blocks away first. Once the prefill rate is known,
        rows that wait longer than prefilling the whole pool takes don't keep their KV against new
        work.
        """

    def set_prefill_rate(self, tokens_per_second: float) -> None:
        """How fast prompts are computed; unknown at first, then all parked rows keep their KV."""

    def tokens(self, seq: int) -> SequenceTokens:
        """The row's record, copied."""

    def release(self, seq: int) -> None:
        """Forgets the row, finished or not; RuntimeError while it is planned."""

    def clear(self) -> None:
        """Forgets all rows and the planned step; their blocks go back to the pool."""

    def stats(self) -> dict[str, int]:
        """Gauges free_blocks, free_host_blocks, running (in the batch), waiting (runnable outside),
        parked; totals preemptions, prefill_tokens, decode_tokens, prefix_hit_tokens (found in the
        cache instead of computed), shared_blocks (by forks), copied_blocks (on write),
        evicted_blocks (cached ones handed out anew), swapped_out_blocks, swapped_in_blocks."""

    def check(self) -> None:
        """RuntimeError if an invariant is broken."""

def sample(
    logits: Tensor,
    sample_rows: Tensor,
    temperatures: Tensor,
    top_ks: Tensor,
    top_ps: Tensor,
    min_ps: Tensor,
    uniforms: Tensor,
    ban_rows: Tensor,
    ban_ids: Tensor,
    out_tokens: Tensor,
    out_logprobs: Tensor,
    out_kept: Tensor,
) -> None: ...
def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    cu_q: Tensor,
    kv_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    softcap: float,
    window: int,
    sinks: Tensor | None,
    shared_spans: Tensor | None,
    shared_lens: Tensor | None,
    out: Tensor,
) -> None: ...
def copy_blocks(cache: Tensor, copies: Tensor) -> None: ...
def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    center: str,
    scale: str,
    lengths: Tensor | None,
    eps: float,
    ddof: int,
    valid: Tensor | None,
    out: Tensor,
) -> None: ...
def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    unit_offset: bool,
    cast_before_weight: bool,
    out: Tensor,
) -> None: ...
def gated_activation(gate: Tensor, up: Tensor, kind: str, out: Tensor) -> None: ...
def rotary(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None: ...

POLICY_SUMS: int
"""Numbers in `sums` of `policy_loss`."""

class PolicyMethod:
    """The settings of a token-local recipe, by the names of csrc/cpu/policy.h."""

    def __init__(
        self,
        *,
        surrogate: str,
        kl: str,
        aggregation: str,
        least: float,
        most: float,
        delta: float,
        beta: float,
        entropy_coef: float,
        max_length: float,
    ) -> None: ...

def policy_loss(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    *,
    mask: Tensor | None,
    ref_logprob: Tensor | None,
    entropy: Tensor | None,
    factor: Tensor | None,
    method: PolicyMethod,
    num_tokens: float,
    num_sequences: float,
    a: Tensor,
    b: Tensor | None,
    token_loss: Tensor,
    sums: Tensor,
) -> None:
    """Fill a, b, token_loss [N] and sums (float64) from float32 vectors; see csrc/cpu/policy.h."""

def logits_policy_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    out: Tensor,
    state: Tensor,
    logprob: Tensor,
    entropy: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    ref_logprob: Tensor | None,
    factor: Tensor | None,
    method: PolicyMethod,
    num_tokens: float,
    num_sequences: float,
    a: Tensor,
    b: Tensor | None,
    token_loss: Tensor,
    sums: Tensor,
) -> None:
    """Fill `out` [N, V], of the dtype of logits, with the gradient; see
    csrc/cpu/logits_policy_loss.h."""

LOSS_BLOCK: int
"""Columns that share a reference: see csrc/cpu/loss.h."""
LOSS_STATE: int
"""Numbers in the state of a row: max, mass, moment, target, mass2, mass3."""

def absorb_logits(
    logits: Tensor,
    column: int,
    targets: Tensor,
    bias: Tensor | None,
    shift: Tensor | None,
    own: Tensor | None,
    temperature: float,
    softcap: float,
    ban_starts: Tensor | None,
    ban_ids: Tensor | None,
    state: Tensor | None,
    powers: bool,
    out: Tensor | None,
    references: Tensor | None,
) -> None: ...
def logit_gradient(
    tile: Tensor,
    column: int,
    references: Tensor,
    state: Tensor,
    targets: Tensor,
    source: Tensor,
    target: Tensor,
    a: Tensor,
    b: Tensor | None,
    temperature: float,
    softcap: float,
) -> None: ...
def fill_rows(out: Tensor, values: Tensor) -> None: ...
def add_to_planes(high: Tensor, low: Tensor, addend: Tensor) -> None: ...
def take_transposed(to: Tensor, source: Tensor, add: bool) -> None:
    """Make `to` [R, C] the transpose of `source` [C, R], or the sum of both; float32."""

def round_planes(high: Tensor, low: Tensor) -> None: ...
def advise_huge_pages(tensor: Tensor) -> None: ...

"""The named recipes, each with the paper it restates.

Clip ranges, estimators and aggregations are the published ones; where a paper leaves a constant to
its trainer, the comment beside it says which value was taken.
"""

from __future__ import annotations

from eapo_fast.recipes.recipe import Recipe

_DAPO = Recipe(
    name="dapo",
    source="DAPO, arXiv 2503.14476",
    epsilon=0.2,
    epsilon_high=0.28,
    delta=10.0,
    group_filter="accuracy",
)

_GRPO = Recipe(
    name="grpo",
    source="GRPO, arXiv 2402.03300",
    beta=0.0,  # the paper's 0.04 needs a reference model; TRL's default asks for none
    aggregation="seq-mean-token-mean",
)

RECIPES: tuple[Recipe, ...] = (
    # DAPO's objective as EAPO writes it: no dual clip, no KL.
    _DAPO.replace(name="eapo", source="EAPO, arXiv 2509.23730", delta=None),
    _DAPO,
    _GRPO,
    Recipe(
        name="dr_grpo",
        source="Dr.GRPO, arXiv 2503.20783",
        scale="none",
        aggregation="seq-mean-token-sum-norm",
    ),
    # TRL's loss_type of this name: GRPO with the mean over the tokens of the batch. It is not the
    # Beta-normalised BNPO of arXiv 2506.02864. TRL's mean is local to a micro-batch; the mean here
    # is over the tokens the loss is told about, so it does not depend on how a batch is cut.
    _GRPO.replace(name="bnpo", source="TRL, loss_type='bnpo'", aggregation="token-mean"),
    Recipe(
        name="rloo",
        source="RLOO, arXiv 2402.14740",
        center="loo",
        scale="none",
        surrogate="none",
    ),
    Recipe(
        name="opo",
        source="OPO, arXiv 2505.23585",
        center="length",
        scale="none",
        surrogate="none",
    ),
    Recipe(
        name="gspo",
        source="GSPO, arXiv 2507.18071",
        ratio="sequence",
        epsilon=3e-4,
        epsilon_high=4e-4,
        aggregation="seq-mean-token-mean",
    ),
    Recipe(
        name="gspo_token",
        source="GSPO-token, arXiv 2507.18071",
        ratio="sequence_token",
        epsilon=3e-4,
        epsilon_high=4e-4,
        aggregation="seq-mean-token-mean",
    ),
    Recipe(
        name="gmpo",
        source="GMPO, arXiv 2507.20673",
        surrogate="geo_mean",
        epsilon=0.4,
        aggregation="seq-mean-token-mean",
    ),
    Recipe(
        name="cispo",
        source="CISPO, arXiv 2506.13585",
        surrogate="detached_clip",
        epsilon=1.0,  # no lower bound, as in the paper
        epsilon_high=0.28,  # the paper tunes it and prints no value; DAPO's
    ),
    Recipe(
        name="reinforce",
        source="REINFORCE, Williams 1992",
        center="none",
        scale="none",
        surrogate="reinforce",
    ),
    # PPO's clipped surrogate on group advantages: no value model.
    Recipe(name="ppo", source="PPO, arXiv 1707.06347"),
    Recipe(name="ppo_dual_clip", source="dual-clip PPO, arXiv 1912.09729", delta=3.0),
)

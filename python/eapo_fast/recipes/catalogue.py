"""The named recipes, each with the paper it restates.

Clip ranges, estimators and aggregations are the published ones; where a paper leaves a constant to
its trainer, the comment beside it says which value was taken.
"""

from __future__ import annotations

from eapo_fast.recipes.parts import EntropyBand, EntropyTarget, Reweighting, Selection
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
    # Global advantage normalisation; clip range and token mean as in PPO. The paper's KL enters the
    # rewards of tokens (`ops.token_advantages` takes those), so beta is 0 here.
    Recipe(
        name="reinforce_pp",
        source="REINFORCE++, arXiv 2501.03262",
        center="none",
        scale="none",
        whiten=True,
    ),
    Recipe(
        name="reinforce_pp_baseline",
        source="REINFORCE++-baseline, arXiv 2501.03262",
        center="mean",
        scale="none",
        whiten=True,
    ),
    # PPO's clipped surrogate on group advantages: no value model.
    Recipe(name="ppo", source="PPO, arXiv 1707.06347"),
    Recipe(name="ppo_dual_clip", source="dual-clip PPO, arXiv 1912.09729", delta=3.0),
    Recipe(
        name="clip_cov",
        source="Clip-Cov, arXiv 2505.22617",
        epsilon=1.0,
        group_filter="accuracy",
        selection=Selection(
            score="covariance",
            low=1.0,
            high=5.0,
            skip_clipped=True,
            pick="random",
            fraction=2e-4,
            effect="drop",
        ),
    ),
    Recipe(
        name="kl_cov",
        source="KL-Cov, arXiv 2505.22617",
        surrogate="none",
        selection=Selection(
            score="covariance",
            pick="highest",
            fraction=2e-3,  # the paper's 7B setting; 2e-4 for 32B
            effect="kl_to_old",
        ),
    ),
    Recipe(
        name="lp_reg",
        source="Lp-Reg, arXiv 2510.03222",
        epsilon=1.0,
        epsilon_high=9.0,
        selection=Selection(
            score="logprob",
            sign="negative",
            pick="lowest",
            fraction=0.01,
            minimum=2,
            effect="kl_to_proxy",
            kl="k3",
        ),
    ),
    _DAPO.replace(
        name="steer",
        source="STEER, arXiv 2510.10150",
        group_filter=None,
        reweighting=Reweighting(),
    ),
    # The method adds a term to any policy loss; PPO's on group advantages here.
    Recipe(
        name="epo",
        source="EPO, arXiv 2509.22576",
        entropy_coef=1e-3,
        entropy_band=EntropyBand(),
    ),
    Recipe(
        name="siren",
        source="SIREN, arXiv 2509.25133",
        scale="none",
        epsilon=0.28,
        aggregation="seq-mean-token-sum-norm",
        entropy_target=EntropyTarget(),
    ),
)

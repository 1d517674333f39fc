"""Published samplers as data: which policy, cache and guidance each of them is.

Where a released sampler has a defect ours is right, and the preset says in a line what differs. Steps are
handed to the loop, as ever: `steps` of a paper per block are times the number of blocks here.
"""

from __future__ import annotations

from mmdlm.diffusion.schedule import Cosine, Linear
from mmdlm.sampling.caching import Approximate, Cache, Drifting, Faintest, Suffix, Window
from mmdlm.sampling.modality import ByModality
from mmdlm.sampling.order import Drawn, Halton, Margin, NegativeEntropy, Order, Peak, Random
from mmdlm.sampling.plan import Blocks, Path
from mmdlm.sampling.policy import Ancestral, Policy, Unmask
from mmdlm.sampling.quota import (
    Bounded,
    Even,
    Factor,
    Fixed,
    Proportional,
    Quota,
    Scheduled,
    Stable,
    Threshold,
)
from mmdlm.sampling.remask import Capped, Remask
from mmdlm.sampling.revise import Edited, Planned, Uniform, Verified
from mmdlm.sampling.scale import Constant
from mmdlm.sampling.stop import Ended, Settled

# Presets for text


def llada(*, block: int, temperature: float = 0.0, random: bool = False) -> Unmask:
    """LLaDA's `generate`: even quotas, block by block, the surest draws first (arXiv:2502.09992).

    Confidences are float32 or better where the released ones are the network's 16 bits, the mask is never
    drawn, and masks inside a prompt take nothing from a block's quota.
    """
    order = Random() if random else Drawn()
    return Unmask(Even(), order, plan=Path(blocks=Blocks(block)), temperature=temperature)


def fast_dllm(*, block: int, threshold: float | None = 0.9, factor: float | None = None) -> Unmask:
    """Fast-dLLM: all above a threshold, or by the factor rule, at least one a step (arXiv:2505.22618).

    The released factor rule fills one position too many where the last candidate fails.
    """
    if (threshold is None) == (factor is None):
        raise ValueError(f"wanted a threshold or a factor, got {threshold} and {factor}")
    rule = Threshold(threshold) if threshold is not None else Factor(factor if factor is not None else 1.0)
    return Unmask(Fixed(1), Peak(), rule, plan=Path(blocks=Blocks(block)), temperature=0.0)


def fast_dllm_cache(kind: str, *, block: int) -> Cache:
    """Fast-dLLM's caches, "prefix" and "dual". Approximate; the released ones waste a forward a block."""
    selectors = {"prefix": Suffix(block), "dual": Window(block)}
    if kind not in selectors:
        raise ValueError(f"cache {kind!r}: there are {', '.join(selectors)}")
    return Approximate(selectors[kind])


def dllm_cache(*, share: float = 0.25, every: int = 7) -> Cache:
    """dLLM-Cache's adaptive update, of whole rows: prompt and answer are not told apart. Approximate."""
    return Approximate(Drifting(share), every=every)


def dream(
    algorithm: str = "entropy",
    *,
    temperature: float = 0.0,
    top_p: float | None = None,
    top_k: int | None = None,
    choice_temperature: float = 0.0,
    eps: float = 1e-3,
) -> Policy:
    """Dream's `diffusion_generate`: "origin", "maskgit_plus", "topk_margin" or "entropy".

    A step fills at least one position, where the released quota may be none; quotas are each row's own, not
    the batch's mean; confidences are the model's, before temperature and truncation.
    """
    if algorithm == "origin":
        return Ancestral(Linear(), eps=eps, temperature=temperature, top_p=top_p, top_k=top_k)
    orders: dict[str, Order] = {
        "maskgit_plus": Drawn(),
        "topk_margin": Margin(),
        "entropy": NegativeEntropy(),
    }
    if algorithm not in orders:
        raise ValueError(f"algorithm {algorithm!r}: there are origin, {', '.join(orders)}")
    return Unmask(
        Proportional(eps),
        orders[algorithm],
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        choice_temperature=Constant(choice_temperature) if choice_temperature else 0.0,
    )


def klass(
    *, block: int, probability: float = 0.9, kl: float = 0.01, steps: int = 2, temperature: float = 0.0
) -> Unmask:
    """KLASS: sure and steady at once, else an even quota of the surest (arXiv:2511.05664)."""
    plan = Path(blocks=Blocks(block))
    return Unmask(Even(), Peak(), Stable(probability, kl, steps), plan=plan, temperature=temperature)


def entropy_bounded(*, nats: float = 0.1, temperature: float = 1.0, block: int | None = None) -> Unmask:
    """EB-Sampler: the least entropies first, as many as the bound allows (arXiv:2505.24857)."""
    plan = Path(blocks=None if block is None else Blocks(block))
    return Unmask(Fixed(1), NegativeEntropy(), Bounded(nats), plan=plan, temperature=temperature)


def diffusion_gemma(
    ids: tuple[int, int],
    *,
    nats: float = 0.1,
    temperature: float = 1.0,
    confidence: float = 0.005,
    steps: int = 1,
) -> Policy:
    """DiffusionGemma's canvas: the least entropies stand, all others become random ids, all are drawn anew.

    `ids` are the first one and the one behind the last. For models of uniform noise. A row is done when all
    of it stands, or when its most probable tokens were the same for `steps` steps at a mean entropy below
    `confidence`, which the released loop takes after temperature.
    """
    policy = Unmask(
        Fixed(1), NegativeEntropy(), Bounded(nats), revision=Uniform(text=ids), temperature=temperature
    )
    return Settled(policy, confidence, steps)


def wino(*, block: int, threshold: float = 0.6, keep: float = 0.9) -> Unmask:
    """WINO: many drafts a step, and what the others make improbable is drafted again (arXiv:2507.18578).

    Its denoiser is `Shadowed`; a draft of a step is at least one, and none is capped.
    """
    plan = Path(blocks=Blocks(block))
    return Unmask(Fixed(1), Peak(), Threshold(threshold), plan, Verified(keep), temperature=0.0)


def llada2(
    *,
    block: int = 32,
    threshold: float = 0.95,
    edit: float | None = None,
    after: int = 16,
    end: int | None = None,
) -> Policy:
    """LLaDA2: an even quota or all above a threshold, block by block; with `edit` tokens are edited (2.1).

    A full block is then looked at up to `after` more times: give steps for that. For a model that is
    block-causal; the mask is never drawn, where diffusers' pipeline may commit it.
    """
    policy = Unmask(
        Even(),
        Peak(),
        Threshold(threshold),
        plan=Path(blocks=Blocks(block)),
        temperature=0.0,
        revision=None if edit is None else Edited(edit, after),
    )
    return policy if end is None else Ended(policy, end)


def remdm(remask: Remask | None = None, *, temperature: float = 1.0, top_p: float | None = 0.9) -> Ancestral:
    """ReMDM: ancestral steps that also noise what is written (arXiv:2503.00307)."""
    return Ancestral(
        Linear(), remask=Capped() if remask is None else remask, temperature=temperature, top_p=top_p
    )


def p2(*, eta: float = 1.0, temperature: float = 1.0) -> Unmask:
    """P2, planned by the model itself: all positions are ranked anew at every step (arXiv:2502.03540)."""
    return Unmask(Scheduled(Linear()), Drawn(), revision=Planned(eta), temperature=temperature)


# Presets for images


def maskgit(*, temperature: float = 1.0, choice_temperature: float = 4.5) -> Unmask:
    """MaskGIT: cosine quotas of what was unknown, noise on the choice that falls to 0 (arXiv:2202.04200)."""
    return Unmask(
        Scheduled(Cosine()), Drawn(), temperature=temperature, choice_temperature=choice_temperature
    )


def halton(grid: tuple[int, int], *, temperature: float = 1.0, rolled: bool = False) -> Unmask:
    """The Halton sampler: spread positions, few at first (arXiv:2503.17076).

    Every cell of any grid is met, and known codes stay, where the released one loses cells of large grids and
    writes over what it was given.
    """
    return Unmask(Scheduled(Cosine()), Halton(grid, rolled), temperature=temperature)


def lumina(*, temperature: float = 1.0) -> Unmask:
    """Lumina-DiMOO's pictures: cosine quotas, steady noise on the choice (arXiv:2510.06308).

    Draws have the model's law in any precision, where the released noise is drawn in 16 bits.
    """
    heat = Constant(temperature) if temperature else 0.0
    return Unmask(Scheduled(Cosine()), Drawn(), temperature=temperature, choice_temperature=heat)


def lumina_cache(*, share: float = 0.1, every: int = 5, first: int = 1) -> Cache:
    """Lumina-DiMOO's cache: the faintest rows at a step, everything at each `every`-th one. Approximate."""
    return Approximate(Faintest(share), every=every, first=first)


def mmada(*, temperature: float = 1.0) -> Unmask:
    """MMaDA's pictures: MaskGIT. Its temperature does not compound, and no mask is left at the end."""
    return maskgit(choice_temperature=temperature)


# Presets for both at once


def mmada_parallel(
    *, image_steps: int, text_temperature: float = 0.0, image_temperature: float = 1.0
) -> Unmask:
    """MMaDA-Parallel: text at every step, the image at `image_steps` of the last three quarters.

    arXiv:2511.09611. No code is left to chance, the image's quota follows its own clock, its noise is
    Gumbel's, and the branches of guidance see the canvas that the main one sees.
    """
    quota: ByModality[Quota] = ByModality(Even(), Scheduled(Cosine()))
    return Unmask(
        quota,
        Drawn(),
        plan=Path(image=(0.25, 1.0), ticks=ByModality[int | None](None, image_steps)),
        temperature=ByModality(text_temperature, 1.0),
        choice_temperature=ByModality(0.0, image_temperature),
    )


def unidisc(*, choice_temperature: float = 10.0) -> Unmask:
    """UniDisc's MaskGIT: text and image compete for one quota (arXiv:2503.20853)."""
    return Unmask(
        Scheduled(Cosine()), Drawn(), plan=Path(together=True), choice_temperature=choice_temperature
    )

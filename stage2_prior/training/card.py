"""Model cards of exported priors."""

from collections.abc import Sequence
from typing import Any

from stage2_prior.base import Prior

TEMPLATE = """---
library_name: unspool
tags: [text-to-image, autoregressive, continuous-latents]
---
# Unspool prior
{picture}
Draws {K} latents of {C} floats from a caption, for the tokenizer with fingerprint `{fingerprint}`; another tokenizer is
refused.

```python
from stage2_prior import Pipeline

pipeline = Pipeline.from_pretrained("prior", "tokenizer")  # folders or Hub ids
images = pipeline.generate(["a large red circle"], guidance=2.0)  # (1, 3, H, W) in [-1, 1]
```

- Parameters: {millions:.2f} M.
- Latents that are drawn by default: {length}.

## Figures
{figures}

## Limits
It knows the words and pictures that it was trained on. What a caption leaves open is drawn by chance, and so is detail
that the model could not learn. Distances are in the features that they are named with, and none of them is FID unless
it says so.
{attribution}"""


def prior_card(prior: Prior, figures: Sequence[dict[str, Any]], attribution: str = "", picture: bool = False) -> str:
    """The README.md of an exported prior.

    figures: headlines of its report (name, value, note). attribution: whose pictures it was trained on, where their
    licence asks for it. picture: `pictures.png` lies beside the card (`live.card_picture`).
    """
    rows = "\n".join(f"| {f['name']} | {f['value']} | {f['note']} |" for f in figures)
    return TEMPLATE.format(
        K=prior.num_latents,
        C=prior.latent_dim,
        fingerprint=prior.fingerprint,
        millions=sum(p.numel() for p in prior.parameters()) / 1e6,
        length="all" if prior.best_length is None else f"the first {prior.best_length}, as its report found best",
        figures=f"| held out | value | |\n|---|---|---|\n{rows}"
        if rows
        else "None yet: `python -m stage2_prior test`.",
        picture="\n![Drawn for held-out captions, from the first latents](pictures.png)\n" if picture else "",
        attribution=f"\n## Pictures\n{attribution}\n" if attribution else "",
    )

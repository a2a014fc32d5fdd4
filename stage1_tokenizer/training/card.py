"""Model cards of exported folders."""

from stage1_tokenizer.tokenizer import Tokenizer

TEMPLATE = """---
library_name: unspool
tags: [image-tokenizer, autoregressive, continuous-latents]
---
# Unspool tokenizer
{picture}
Turns an image of {size} x {size} pixels into {K} ordered continuous latents of {C} floats, and any prefix of them back
into pixels.

```python
from stage1_tokenizer import Tokenizer
tokenizer = Tokenizer.from_pretrained("this folder")
z = tokenizer.encode(images)        # (B, 3, {size}, {size}) in [-1, 1] -> (B, {K}, {C})
x = tokenizer.decode(z[:, :4])      # any prefix -> (B, 3, {size}, {size}) in [-1, 1]
```

- Parameters: {millions:.2f} M. Latent space: `{fingerprint}`.
- Text supervision of prefixes: {text}.

## Figures
{figures}

## Limits
It knows the kind of picture it was trained on, at this size, and nothing else. Short prefixes decode to an average of
what they leave open, which looks blurred. Figures above are from the end of training, on part of the held-out split;
the reconstruction report has the full ones.
{attribution}"""


def tokenizer_card(
    tokenizer: Tokenizer, figures: dict[str, float], attribution: str = "", picture: bool = False
) -> str:
    """The README.md of an exported tokenizer.

    figures: held-out metrics by name. attribution: whose pictures it was trained on, where their licence asks for it.
    picture: `pictures.png` lies beside the card (`live.card_picture`).
    """
    rows = "\n".join(f"| {name} | {value:.3f} |" for name, value in sorted(figures.items()))
    return TEMPLATE.format(
        size=tokenizer.image_size,
        K=tokenizer.num_latents,
        C=tokenizer.latent_dim,
        millions=sum(p.numel() for p in tokenizer.parameters()) / 1e6,
        fingerprint=tokenizer.fingerprint,
        picture="\n![Held-out pictures from their first latents](pictures.png)\n" if picture else "",
        attribution=f"\n## Pictures\n{attribution}\n" if attribution else "",
        text="none" if tokenizer.text is None else f"prefixes of {tokenizer.text.lengths} latents",
        figures=f"| held out | value |\n|---|---|\n{rows}" if rows else "None were measured during training.",
    )

"""What the parts of a tokenizer must agree on, and the text by which a latent space is known.

Letters: K latents, C latent channels.
"""

import json
from collections.abc import Mapping
from typing import Any

from stage1_tokenizer.bottleneck import Bottleneck
from stage1_tokenizer.encoder import Encoder


def check_sizes(encoder: Encoder, bottleneck: Bottleneck, parts: Mapping[str, Any]) -> None:
    """K is the encoder's and C the bottleneck's; every other part by name (None: not there) must have the same.

    A size is an attribute, or else an argument of the constructor; a part that has neither cannot disagree. Raises
    ValueError naming the first two parts that do.
    """
    sizes = {
        "num_latents": ("encoder.num_latents", encoder.num_latents),
        "latent_dim": ("bottleneck.latent_dim", bottleneck.latent_dim),
    }
    for name, part in parts.items():
        for size, (owner, wanted) in sizes.items():
            got = getattr(part, size, part.spec["init_args"].get(size, wanted)) if part is not None else wanted
            if got != wanted:
                raise ValueError(f"{owner} is {wanted} but {name}.{size} is {got}; make them equal.")


def describe(encoder: dict[str, Any], bottleneck: dict[str, Any]) -> str:
    """Specs of encoder and bottleneck as the text that a fingerprint begins with.

    A loaded tokenizer keeps the text of its export: classes move and constructors gain arguments, and a latent space
    stays what it was.
    """
    return json.dumps([encoder, bottleneck], sort_keys=True)

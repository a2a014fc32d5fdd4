"""What is read from a prefix of latents: a linear probe against constructed targets, classes named by captions."""

import torch

from stage1_tokenizer.evaluation.probes import class_prompts, linear_probe, zero_shot


def test_linear_probe_separates_what_is_linear_and_not_what_is_noise() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 8, generator=generator)
    y = torch.stack([(x[:, 0] > 0).long(), torch.randint(0, 2, (600,), generator=generator)], dim=1)
    accuracy = linear_probe(x[:400], y[:400], x[400:], y[400:], [2, 2])
    assert accuracy[0] > 0.9 and 0.35 < accuracy[1] < 0.65 and accuracy[2] < 0.7


def test_zero_shot_takes_the_nearest_class_by_its_prompts() -> None:
    class Space:
        def embed_text(self, captions: list[str]) -> torch.Tensor:
            return torch.stack([torch.eye(3)[int(c[-1])] for c in captions])

        def embed_latents(self, z: torch.Tensor) -> torch.Tensor:
            return z[:, 0]

    prompts = class_prompts([["a 0", "the 0"], ["a 1"], ["a 2"], ["a 1"]], [0, 1, 2, 1])
    assert prompts == {0: ["a 0", "the 0"], 1: ["a 1"], 2: ["a 2"]}
    vectors = torch.eye(3)[[0, 1, 2, 2]]
    assert zero_shot(Space(), {1: vectors}, torch.tensor([0, 1, 2, 0]), prompts) == {1: 0.75}

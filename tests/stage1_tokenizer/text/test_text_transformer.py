"""The text transformer computes what open_clip's does, from the same draws, and loading a tokenizer imports little."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from open_clip.transformer import TextTransformer as OpenClipTransformer

from stage1_tokenizer.text.transformer import TextTransformer
from stage1_tokenizer.text.vocabulary import END, PAD
from tests.tiny import tiny_tokenizer


def test_it_is_open_clips_to_the_last_bit() -> None:
    torch.manual_seed(0)
    ours = TextTransformer(7, 20, 16, 2, 2, 8, PAD, END)
    torch.manual_seed(0)
    theirs = OpenClipTransformer(
        7, 20, 16, 2, 2, output_dim=8, no_causal_mask=True, use_pad_mask=True, pad_id=PAD, eos_id=END, pool_type="eos"
    )
    assert {n: p.tolist() for n, p in ours.named_parameters()} == {n: p.tolist() for n, p in theirs.named_parameters()}
    assert set(ours.state_dict()) == set(theirs.state_dict())
    ids = torch.tensor([[1, 5, 6, END, PAD], [1, 7, END, PAD, PAD], [1, 4, 5, 6, END]])
    ours.output_tokens = theirs.output_tokens = True
    results = []
    for transformer in (ours, theirs):
        pooled, tokens = transformer(ids)
        (pooled.square().sum() + tokens[:, 0].sum()).backward()
        results.append([pooled, tokens, *(p.grad for p in transformer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch.equal(results[0][0], ours(ids.flip(0))[0])  # control


def test_loading_and_encoding_import_neither_open_clip_nor_torchvision_nor_lightning(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    code = (
        "import sys, json, torch\n"
        "from stage1_tokenizer import Tokenizer\n"
        f"t = Tokenizer.from_pretrained({str(tmp_path)!r})\n"
        "t.encode(torch.zeros(1, 3, t.image_size, t.image_size))\n"
        "heavy = {'open_clip', 'torchvision', 'lightning', 'timm', 'transformers', 'matplotlib', 'torch._dynamo'}\n"
        "print(json.dumps([sorted(heavy & set(sys.modules)), 'safetensors' in sys.modules]))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(run.stdout) == [[], True]

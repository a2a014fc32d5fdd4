"""Caption text to a few rows of token ids: open_clip's byte-pair encoding over the rows that the captions use.

open_clip's vocabulary has 49,408 rows; an embedding of that size would cost a good part of every step of a small model
in dense gradients and optimiser state, for rows that no caption ever touches. `CaptionVocabulary` keeps the most
frequent `rows` of them: the table from byte-pair id to row is a buffer of the exported model, learned once from the
training captions. Four rows are special: 0 padding, 1 start, 2 end, 3 unknown.

Letters: B batch, L text tokens.
"""

import functools
import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from stage1_tokenizer.spec import Spec

PAD, START, END, UNKNOWN = range(4)
SPECIAL = 4
BPE_SIZE = 49408
MAX_CHARACTERS = 2000  # a longer caption is cut before byte-pair encoding, whose cost grows with it

log = logging.getLogger(__name__)


@functools.cache
def byte_pairs() -> Any:
    """open_clip's tokenizer, imported when a caption is first read."""
    from open_clip import SimpleTokenizer

    return SimpleTokenizer()


@functools.lru_cache(maxsize=200_000)
def byte_pair_ids(caption: str) -> tuple[int, ...]:
    """open_clip byte-pair ids of one caption, without start and end."""
    return tuple(byte_pairs().encode(caption[:MAX_CHARACTERS]))


class CaptionVocabulary(Spec, nn.Module):
    """Byte-pair ids mapped to `rows` compact rows; sequences of at most `context_length` tokens.

    Raises ValueError where a caption is not a string, or where captions are encoded before `fit`.
    """

    row_of: Tensor
    id_of: Tensor

    def __init__(self, rows: int = 4096, context_length: int = 32):
        super().__init__()
        if rows <= SPECIAL or context_length < 3:
            raise ValueError(f"got rows={rows}, context_length={context_length}; want rows > {SPECIAL}, length >= 3.")
        self.rows, self.context_length = rows, context_length
        self.register_buffer("row_of", torch.full((BPE_SIZE,), UNKNOWN, dtype=torch.int32))
        self.register_buffer("id_of", torch.full((rows,), -1, dtype=torch.int32))
        self.truncated = 0  # captions that were longer than context_length, so far
        self.unknown = 0  # tokens without a row of their own

    @property
    def size(self) -> int:
        """Rows in use, special ones included."""
        return SPECIAL + int((self.id_of >= 0).sum())

    def fit(self, captions: Iterable[str]) -> int:
        """Keep the most frequent tokens of `captions`; returns how many distinct tokens had to be left out."""
        counts: Counter[int] = Counter()
        for caption, times in Counter(captions).items():
            for token in byte_pair_ids(caption):
                counts[token] += times
        kept = [token for token, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))][
            : self.rows - SPECIAL
        ]
        self.row_of.fill_(UNKNOWN)
        self.id_of.fill_(-1)
        ids = torch.tensor(kept, dtype=torch.int32)
        self.id_of[SPECIAL : SPECIAL + len(kept)] = ids
        self.row_of[ids.long()] = torch.arange(SPECIAL, SPECIAL + len(kept), dtype=torch.int32)
        return len(counts) - len(kept)

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Captions -> ids (B, L) long and text_mask (B, L) bool, True = a real token, on the vocabulary's device.

        A caption that is too long is cut (counted in `truncated`, the first time with a warning); an empty one is
        start and end alone. Tokens that are not in the vocabulary become one unknown token (counted in `unknown`, named
        in a warning the first time outside of training).
        """
        if not isinstance(captions, (list, tuple)) or not captions or not all(isinstance(c, str) for c in captions):
            raise ValueError(f"got {captions!r:.40} for captions, wanted a list of at least one string.")
        length, table = self.context_length, self.table()
        out = torch.full((len(captions), length), PAD, dtype=torch.long)
        for row, caption in enumerate(captions):
            ids = self.line(caption, table)
            out[row, : len(ids)] = torch.tensor(ids)
        if self.row_of.is_cuda:
            out = out.pin_memory()  # so that the step does not wait for it
        out = out.to(self.row_of.device, non_blocking=True)
        return out, out != PAD  # (B,L), (B,L)

    def line(self, caption: str, table: list[int]) -> list[int]:
        pairs = byte_pair_ids(caption)
        if len(pairs) > self.context_length - 2 or len(caption) > MAX_CHARACTERS:
            if not self.truncated:
                log.warning("a caption of %d tokens was cut to %d: %.60r", len(pairs), self.context_length - 2, caption)
            self.truncated += 1
        rows = [table[t] for t in pairs[: self.context_length - 2]]
        if UNKNOWN in rows and not self.training and not self.unknown:
            names = byte_pairs().decoder
            words = [names[t].replace("</w>", "") for t, row in zip(pairs, rows, strict=False) if row == UNKNOWN]
            log.warning("not in this vocabulary, so read as one and the same unknown token: %s", ", ".join(words))
        self.unknown += rows.count(UNKNOWN)
        return [START, *rows, END]

    def table(self) -> list[int]:
        """`row_of` as a plain list, read from the device once and again only after it changed."""
        version = (self.row_of.data_ptr(), self.row_of._version)
        if getattr(self, "_table_version", None) != version:
            if not bool((self.id_of >= 0).any()):
                raise ValueError(
                    "this vocabulary has no rows yet; call fit(captions) or load an exported folder first."
                )
            self._table, self._table_version = self.row_of.tolist(), version
        return self._table

    def decode(self, ids: Tensor) -> list[str]:
        """(B, L) ids -> captions, up to the first end token; unknown rows are written as <unk>."""
        lines = []
        id_of, names = self.id_of.tolist(), byte_pairs().decoder
        for row in ids.tolist():
            words = []
            for token in row:
                if token == END:
                    break
                if token >= SPECIAL:
                    words.append(names[id_of[token]] if id_of[token] >= 0 else "<unk></w>")
                elif token == UNKNOWN:
                    words.append("<unk></w>")
            lines.append("".join(words).replace("</w>", " ").strip())
        return lines

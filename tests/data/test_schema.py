"""Keys and splits: pure functions of a name."""

from __future__ import annotations

from data.schema import clean_key, split_named


def test_keys_are_safe_and_never_meet() -> None:
    assert clean_key("000000123") == "000000123" and clean_key("a_b-C") == "a_b-C"
    names = ["a.b", "a_b", "a b", "../a", "ä", "", "日本", "a/b", "x" * 300, "x" * 301]
    keys = [clean_key(name) for name in names]
    assert len(set(keys)) == len(names)
    assert max(map(len, keys)) + len(".safetensors") == 100, "a plain tar has room for names of 100 bytes"
    assert all(
        key and set(key) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-") for key in keys
    )


def test_split_names() -> None:
    assert [split_named(n) for n in ("train", "train2017", "Training", "val-00001", "test", "trained")] == [
        *("train", "train", None, "val", "val", None)
    ]

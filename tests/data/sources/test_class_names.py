"""Class folders with ids get the names of a file of ImageNet's, whichever of the three; what does not fit is named."""

import json
from pathlib import Path

import pytest

from data.schema import DataError, Sample
from data.sources.open import SourceConfig, open_source
from tests.data_samples import encoded, photo

IDS = ["n01440764", "n01443537", "n02123045"]
FILES = {
    "words.txt": "n00000001\tx\nn01440764\ttench, Tinca tinca\nn01443537\tgoldfish\nn02123045\ttabby, tabby cat\n",
    "LOC_synset_mapping.txt": "n01440764 tench, Tinca tinca\nn01443537 goldfish\nn02123045 tabby, tabby cat\n",
    "imagenet_class_index.json": json.dumps(
        {str(i): [w, n] for i, (w, n) in enumerate(zip(IDS, ["tench", "goldfish", "tabby"], strict=True))}
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, wnid in enumerate(IDS):
        (tmp_path / "train" / wnid).mkdir(parents=True)
        (tmp_path / "train" / wnid / "0.jpg").write_bytes(encoded(photo(number)))
    return tmp_path / "train"


def samples(folder: Path, *names: str) -> list[Sample]:
    source = open_source(SourceConfig("classes", (str(folder),), class_names=names))
    read = [sample for sample in source.read(0, 3) if isinstance(sample, Sample)]
    assert len(read) == 3
    return read


@pytest.mark.parametrize("file", list(FILES))
def test_names_come_from_the_file(file: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / file).write_text(FILES[file])
    read = samples(folder, str(tmp_path / file))
    assert [sample.captions for sample in read] == [
        ["a photo of a tench"],
        ["a photo of a goldfish"],
        ["a photo of a tabby"],
    ]
    assert [(sample.label, sample.label_name) for sample in read] == [(0, "tench"), (1, "goldfish"), (2, "tabby")]


def test_names_in_the_order_of_the_folders_and_none_at_all(folder: Path) -> None:
    assert samples(folder, "a", "b", "c")[1].captions == ["a photo of a b"]
    assert samples(folder)[0].captions == ["a photo of a n01440764"]


def test_what_does_not_fit_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("n01440764\ttench\n")
    with pytest.raises(DataError, match="no name for 2 of 3 class folders, the first is n01443537"):
        samples(folder, str(tmp_path / "words.txt"))
    with pytest.raises(DataError, match="got 2 --class-names for 3 class folders"):
        samples(folder, "a", "b")
    (tmp_path / "words.txt").write_text("tench\n")
    with pytest.raises(DataError, match="does not hold lines of an id and a name"):
        samples(folder, str(tmp_path / "words.txt"))

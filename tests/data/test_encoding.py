"""Latents of a slow encoder, whose preparation is killed and goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from job import prepare
from job.data import fitting
from job.data.like import read_pattern

OPTIONS = ["--vocab-size", "300", "--validation-fraction", "0.2", "--shard-size", "100"]
SLOW = ["--encoder", "sentence_transformers", "--encoder-model", "name", "--encoder-prompt", "query: ", "--normalize"]


class Model(torch.nn.Linear):
    """Stands in for a sentence-transformers model. It knows what it has encoded, and dies after so many calls."""

    encoded: list[str] = []  # noqa: RUF012
    calls_left = 10**9

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__(1, 3, bias=False)
        torch.nn.init.ones_(self.weight)

    def encode(self, texts: list[str], **options: Any) -> torch.Tensor:
        assert (options["prompt"], options["normalize_embeddings"]) == ("query: ", True)
        if texts == ["width"]:
            return torch.ones(1, 3)
        if Model.calls_left == 0:
            raise KeyboardInterrupt
        Model.calls_left -= 1
        Model.encoded += texts
        return torch.tensor([[float(len(text)), float(ord(text[4])), 1.0] for text in texts])


def test_a_killed_preparation_encodes_nothing_twice(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Model))
    monkeypatch.setattr(fitting, "CHUNK", 30)
    for name, calls in (("whole", 10**9), ("killed", 6)):
        Model.encoded, Model.calls_left = [], calls
        command = ["--out", str(tmp_path / name), "--source", str(corpus), *OPTIONS, *SLOW]
        code = prepare.main(command)
        if name == "killed":
            assert code != 0
            assert 0 < len(Model.encoded) < 640
            Model.calls_left = 10**9
            assert prepare.main(command) == 0
        assert len(Model.encoded) == len(set(Model.encoded)) == 640
    whole, killed = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("whole", "killed")
    )
    assert whole == killed
    made = json.loads(whole["dataset.json"])
    assert (made["encoder"]["prompt"], made["encoder"]["normalize"]) == ("query: ", True)
    like = read_pattern(str(tmp_path / "whole")).options()
    assert (like["encoder_prompt"], like["normalize"]) == ("query: ", True)


@pytest.mark.parametrize("option", ["--normalize", "--encoder-prompt x"])
def test_they_are_of_sentence_transformers_alone(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare.main(["--out", "x", *option.split()]) == 2
    assert f"{option.split()[0]} has no effect with --encoder lsa" in capsys.readouterr().err

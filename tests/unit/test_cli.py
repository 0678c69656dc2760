"""The command line: what is typed is parsed, mistakes are one sentence on stderr and exit code 2, bugs are code 1."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import yaml

from ringctx import cli
from ringctx.cli import main, read_document
from ringctx.config import Config
from ringctx.errors import ConfigError

TINY = str(Path(__file__).parents[2] / "configs" / "tiny_cpu.yaml")


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("In the beginning.")
    return str(path)


def test_print_config_shows_the_overrides_and_stops(capsys):
    assert main(["generate", TINY, "--set", "ring.timeout=3", "--print-config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["ring"]["timeout"] == 3.0
    assert list(shown) == list(Config.__dataclass_fields__)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["generate", "none.yaml"], "Cannot read the configuration 'none.yaml': No such file or directory."),
        (["generate", TINY, "--set", "rnig.timeout=3"], "There is no key 'rnig'; did you mean 'ring'?"),
        (["generate", TINY, "--question", "Who?"], "needs --document FILE"),
        (["generate", TINY, "--document", "DOCUMENT"], "needs --question TEXT"),
        (["generate", TINY, "--document", "none.txt", "--question", "Who?"], "Cannot read the document 'none.txt': No such file"),
        (["generate", TINY, "--document", "DOCUMENT", "--question", "Who?", "--set", "model.path=none"], "model.path 'none' is no folder"),
        (["generate", TINY, "--ranks", "0"], "0 is not in the range x>=1"),
        (["generate"], "Missing argument 'CONFIG'"),
        (["genrate"], "No such command 'genrate'"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, sentence, document, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = [document if a == "DOCUMENT" else a for a in arguments]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err
    assert "Traceback" not in err


def test_a_bug_shows_its_traceback_and_is_exit_code_1(capsys, monkeypatch):
    monkeypatch.setattr(cli.configuration, "load", lambda *_: 1 / 0)
    assert main(["generate", TINY]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "This is a bug in ringctx (ZeroDivisionError" in err


def test_ranks_that_torchrun_did_not_start_are_refused(document, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    assert main(["generate", TINY, "--document", document, "--question", "Who?", "--ranks", "3"]) == 2
    assert "[ring 0/2] --ranks 3 was given, but torchrun started 2 ranks" in capsys.readouterr().err


def test_doctor_says_what_is_here_and_what_is_not(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "+ kernel reference, cpu" in text
    assert "- kernel flash, cpu" in text
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert all(list(finding) == ["what", "good", "says"] for finding in findings)


@pytest.mark.parametrize("carry", ["none", "selective"])
def test_bench_prints_rows_with_their_pinned_keys(capsys, carry):
    asked = ["--ranks", "1", "--length", "64", "--rounds", "1", "--transport", "rotate", "--carry", carry]
    assert main(["bench", *asked, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert {"name", "S", "ranks", "dtype", "forward_ms", "backward_ms", "efficiency", "error"} <= set(row)


def test_documents_are_text_or_gzip(tmp_path):
    plain, packed = tmp_path / "a.txt", tmp_path / "a.txt.gz"
    plain.write_text("schön")
    packed.write_bytes(gzip.compress("schön".encode()))
    assert read_document(plain) == read_document(packed) == "schön"


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.gz", b"no gzip", "Cannot read the document"),
        ("a.gz", gzip.compress(b"text", mtime=0)[:-9], "Cannot read the document"),
        ("a.txt", b"\xff\xfe", "is not text in UTF-8"),
        ("a.txt", b" \n", "is empty"),
    ],
)
def test_documents_that_cannot_be_read_are_refused(name, data, sentence, tmp_path):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=sentence):
        read_document(path)


@pytest.mark.parametrize("asked", [["--nodes", "2"], ["--heads", "3"]], ids=str)
def test_bench_refuses_to_fold_ranks_that_do_not_divide(asked, capsys):
    assert main(["bench", "--ranks", "1", *asked]) == 2
    assert "1 ranks cannot be folded" in capsys.readouterr().err

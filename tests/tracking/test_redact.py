"""No secret in what is stored: configs, command lines, texts."""

import pytest

from trainer.tracking.redact import redact, redact_arguments, redact_text


def test_config_keeps_everything_but_secrets() -> None:
    config = {
        "model": {
            "max_tokens": 16384,
            "encoder": {"backbone": "bert-base", "normalize": "auto"},
            "rate": 5e-5,
        },
        "hub": {"hf_token": "abc", "api_key": "def", "password": 1234, "private": True, "revision": None},
        "sources": [{"path": "s3://me:pw@bucket/x.jsonl", "key": ["k1", "k2"]}],
    }
    assert redact(config) == {
        "model": config["model"],
        "hub": {
            "hf_token": "[redacted]",
            "api_key": "[redacted]",
            "password": "[redacted]",
            "private": True,
            "revision": None,
        },
        "sources": [{"path": "s3://[redacted]@bucket/x.jsonl", "key": ["[redacted]", "[redacted]"]}],
    }


def test_what_a_run_reads_stays() -> None:
    """It is read again: by the export, and by the run that goes on."""
    config = {
        "model": {"encoder": {"prompt": "Find the text of the key:value pair: "}},
        "data": {"train": [{"where": {"key": "a", "token": ["b"]}, "columns": {"anchor": "password"}}]},
    }
    assert redact(config) == config
    assert redact({"prompts": {"anchor": "hf_SECRETSECRETSECRET to "}}) == {"prompts": {"anchor": "[redacted] to "}}


@pytest.mark.parametrize(
    "argument",
    [
        "az://store/data.parquet?sv=2022&sig=SECRET",
        "https://me:SECRET@host/data.jsonl",
        "https://host/data.jsonl?sig=1&token=SECRET&x=2",
        '{"path": "a", "api_key": "SECRET"}',
        "hf_SECRETSECRETSECRET",
    ],
)
def test_texts(argument: str) -> None:
    assert "SECRET" not in redact_text(argument)


def test_values_of_secret_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "correct horse")
    assert redact_text("the correct horse was here") == "the [redacted] was here"


def test_arguments() -> None:
    arguments = ["fit", "--config", "c.yaml", "--model.max_tokens=512", "--model.max_tokens", "512"]
    secret = [
        "--hub.token=SECRET",
        "--hub.token",
        "SECRET",
        "--x.password=1234567",
        "--flag",
        "--y.api_key",
        "SECRET",
    ]
    assert redact_arguments(arguments) == arguments
    safe = redact_arguments(secret)
    assert "SECRET" not in " ".join(safe)
    assert "1234567" not in " ".join(safe)
    assert [argument.partition("=")[0] for argument in safe if argument.startswith("--")] == [
        "--hub.token",
        "--hub.token",
        "--x.password",
        "--flag",
        "--y.api_key",
    ]


def test_ordinary_texts_stay() -> None:
    for text in (
        "tokenizer: bert",
        "data/keys.jsonl",
        "monkey",
        "user@example.com",
        "a:b",
        "https://host/x@y",
    ):
        assert redact_text(text) == text

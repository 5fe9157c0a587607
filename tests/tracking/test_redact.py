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
    for place in ("models/sk-sentence-encoder-base", "hf_sentence_encoders/x", "data/key=5/part.parquet"):
        assert redact({"backbone": place, "train": [{"path": [place]}]}) == {
            "backbone": place,
            "train": [{"path": [place]}],
        }
        assert redact_arguments([f"--data.train.path={place}"]) == [f"--data.train.path={place}"]
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


@pytest.mark.parametrize(
    "text",
    [
        "https://user:SECRET@more@host/x.jsonl",
        "s3://bucket/x?X-Amz-Signature=SECRET&X-Amz-Date=1",
        "https://host/x.jsonl?access_token=SECRET",
        "glpat-SECRET1234567890abcd",
        "xoxb-SECRET-1234567890",
        "Authorization: Bearer SECRET.SECRET.SECRET",
        "sk-proj-SECRET_1234567890abc",
        "sk-SECRETSECRETSECRETSECRET",
        "AKIASECRET1234567890",
    ],
)
def test_credentials_go_from_places_too(text: str) -> None:
    assert "SECRET" not in str(redact({"path": text}))
    assert "more" not in str(redact({"path": text}))


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

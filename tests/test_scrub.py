"""What counts as a secret, and that it is taken out of whatever is recorded (TRAPS O6)."""

import json

import pytest

from stages.runtime.scrub import REDACTED, scrub, scrub_argv


def test_names_of_secrets_are_told_from_words_of_the_field():
    config: dict[str, object] = {
        "hf_token": "abc", "api-key": "abc", "db": {"password": "abc"}, "secret": "abc", "wandb_api_key": "abc",
        "eos_token": "</s>", "max_tokens": 5, "tokenizer": "bpe", "key": "abc", "n_kv_heads": 2, "special_tokens": ["a"]
    }  # fmt: skip
    redacted = {name for name, value in scrub(config, []).items() if value == REDACTED}
    assert redacted == {"hf_token", "api-key", "secret", "wandb_api_key"}
    assert scrub(config, [])["db"] == {"password": REDACTED}


@pytest.mark.parametrize(
    "text",
    [
        "hf_" + "aB3" * 12,
        "sk-proj-" + "aB3" * 12,
        "ghp_" + "aB3" * 12,
        "AKIAIOSFODNN7EXAMPLE",
        "https://user:hunter2@mirror.example/simple",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3.SflKxwRJSMeKKF2QT4",
    ],
)
def test_shapes_of_keys_are_found_in_any_text(text):
    assert text not in json.dumps(scrub([{"url": f"x {text} y"}], []))


@pytest.mark.parametrize("text", ["<|im_start|>", "https://example.org/a@b", "0f" * 20, "a:b@c", "pretrain-1a2b3c4d"])
def test_digests_tokens_and_plain_addresses_are_no_secrets(text):
    assert scrub({"value": text}, []) == {"value": text}


def test_a_command_line_loses_its_secrets_and_nothing_else():
    argv = [
        "run.py",
        "--api-key",
        "abc",
        "--set",
        "a.hf_token=abc",
        "--lr=3e-4",
        "--password=x=y",
        "--note",
        "my s3cr3t!!",
    ]
    assert scrub_argv(argv, ["s3cr3t!!"]) == [
        "run.py", "--api-key", REDACTED, "--set", f"a.hf_token={REDACTED}", "--lr=3e-4", f"--password={REDACTED}",
        "--note", f"my {REDACTED}",
    ]  # fmt: skip

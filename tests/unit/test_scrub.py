"""Secrets in texts that leave the cluster."""

from __future__ import annotations

import base64
import json
from urllib.parse import quote

import pytest

from atoll.runtime.config import Config
from atoll.runtime.scrub import Scrubber, secrets_of
from atoll.runtime.secrets import SecretBox, new_token

SECRET = 'tr0ub4dor &"3\\+/='


@pytest.mark.parametrize("before", ["", "a", "ab", "abc", "abcd"])
@pytest.mark.parametrize("after", ["", "z", "zy"])
def test_what_is_known_is_hidden_in_every_form(before: str, after: str) -> None:
    scrubber = Scrubber([SECRET])
    raw = f"{before}{SECRET}{after}"
    forms = [raw, json.dumps({"x": raw}), repr(raw), quote(raw, safe=""), raw.encode().hex(), raw.encode().hex().upper()]
    forms += [base64.b64encode(raw.encode()).decode(), base64.urlsafe_b64encode(raw.encode()).decode()]
    for form in forms:
        hidden = scrubber.text(f"it is {form} here")
        assert "***" in hidden, form
        assert SECRET not in hidden
        # Not even a part that is good for anything stays.
        core = base64.b64encode(b"\0" * (-len(before) % 3) + SECRET.encode()).decode()[8:-8]
        assert core not in hidden
    assert scrubber.data({"a": [raw], raw: 1})["a"] != [raw]


@pytest.mark.parametrize(
    "text",
    [
        "password=VALUE",
        "user_password: VALUE",
        '{"password": "VALUE"}',
        '{"msg": "{\\"chpasswd_password\\": \\"VALUE\\"}"}',
        "passphrase: 'VALUE'",
        "--api-key=VALUE",
        "Authorization: Bearer VALUE",
        "authorization: Basic VALUE",
        "https://admin:VALUE@ceph/",
        "ATOLL_TOKEN=VALUE atoll node list",
        "root:$6$rounds=4096$salt$VALUE:19000:0",
        "-----BEGIN OPENSSH PRIVATE KEY-----\nVALUE\nVALUE\n-----END OPENSSH PRIVATE KEY-----\n",
        "-----BEGIN PRIVATE KEY-----\\nVALUE\\n-----END PRIVATE KEY-----",
        "-----BEGIN RSA PRIVATE KEY-----\nVALUE and the log ends",
    ],
)
def test_what_looks_like_a_secret_is_hidden(text: str) -> None:
    value = "hunter2hunter"
    hidden = Scrubber().text(f"before {text.replace('VALUE', value)}\nafter")
    assert value not in hidden
    assert hidden.startswith("before ")


def test_what_this_cluster_makes_is_hidden() -> None:
    from pathlib import Path

    box = SecretBox([bytes(range(32))], Path("x"))
    for secret in (new_token(), box.seal(b"user data", "x"), base64.b64encode(new_token().encode()).decode(), new_token().encode().hex()):
        assert secret not in Scrubber().text(f"the log says {secret} somewhere")


def test_what_helps_stays() -> None:
    text = (
        "2026-01-31T18:00:00 job 17 instance i-00000000000000001 volume vol-0123456789abcdef0 web1-disk0.vol-0123456789abcdef0.raw: "
        "sha256 " + "0123456789abcdef" * 4 + " the token was revoked; /usr/lib/python3.11/site-packages/Some_Long_Directory_Name_Of1/x.py"
    )
    assert Scrubber().text(text) == text
    data = {"tokens": 3, "since": None, "path": "/srv/x", "password": "p"}
    assert Scrubber().data(data) == {**data, "password": "***"}


def test_a_large_log_is_done_soon() -> None:
    # A word without an end must not take the square of its length.
    for word in ("a", "a_", "A1a-", "password", "0a"):
        text = word * (300_000 // len(word))
        assert len(Scrubber(["x" * 20]).text(text)) <= len(text)


def test_the_keys_of_this_machine_are_known(tmp_path: object) -> None:
    from pathlib import Path

    place = Path(str(tmp_path))
    (place / "master").mkdir()
    (place / "master" / "ca-key.pem").write_text("-----BEGIN PRIVATE KEY-----\nAAAAAAAAAAAABBBB\nCCCCCCCCCCCC\n-----END PRIVATE KEY-----\n")
    (place / "master.key").write_text("0123456789secret\n")
    found = secrets_of(Config(etc_dir=place))
    assert {"AAAAAAAAAAAABBBB", "CCCCCCCCCCCC", "AAAAAAAAAAAABBBBCCCCCCCCCCCC", "0123456789secret"} <= set(found)
    assert not any("BEGIN" in secret for secret in found)

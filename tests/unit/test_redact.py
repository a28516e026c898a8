"""Redaction of credentials in URIs and messages, and their restoration."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from job import redact
from job.errors import JobError


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    redact.forget()
    yield
    redact.forget()


@pytest.mark.parametrize(
    ("uri", "plain"),
    [
        ("https://me:Zecret9@h/a.zip", "https://h/a.zip"),
        ("https://Zecret9@h/a.zip", "https://h/a.zip"),
        ("https://h:8080/a.zip?alt=media&X-Goog-Signature=Zecret9&X-Goog-Date=1", "https://h:8080/a.zip?alt=media"),
        ("https://h/a?GoogleAccessId=me&Expires=1&Signature=Zecret9", "https://h/a"),
        ("https://h/a?X-Amz-Credential=Zecret9&X-Amz-Signature=Zecret9&X-Amz-Expires=1", "https://h/a"),
        ("https://h/a?AWSAccessKeyId=Zecret9&Signature=Zecret9&Expires=1", "https://h/a"),
        ("https://a.blob.core.windows.net/c/a?sv=1&sr=c&sp=r&se=2&sig=Zecret9", "https://a.blob.core.windows.net/c/a"),
        ("https://h/a?page=2&access_token=Zecret9", "https://h/a?page=2"),
        ("https://h/a?key=Zecret9&api_key=Zecret9#x", "https://h/a#x"),
        ("s3://AKIA:Zec/ret9@bucket/a", "s3://bucket/a"),
        ("zip://a/b.jpg::https://me:Zecret9@h/z.zip", "zip://a/b.jpg::https://h/z.zip"),
        ("simplecache::s3://AKIA:Zecret9@b/x", "simplecache::s3://b/x"),
    ],
)
def test_identity_and_redaction(uri: str, plain: str) -> None:
    assert redact.identity(uri) == plain
    redacted = redact.redact(f"cannot read {uri}: 403")
    assert "ret9" not in redacted
    assert redact.HIDDEN in redacted
    assert redact.is_redacted(redact.redact(uri))
    assert redact.identity(redact.redact(uri)) == plain
    assert redact.remember(uri) == plain
    assert redact.authorized(plain) == uri
    assert redact.saved_form(plain) == redact.redact(uri)
    assert "ret9" not in str(JobError(f"cannot read {uri}"))


@pytest.mark.parametrize(
    "uri",
    [
        "gs://bucket/ima?es/*.jpg",
        "abfs://container@account.dfs.core.windows.net/a",
        "https://h:8080/a@2x.png",
        "https://h/a?sr=5&page=2",
        "/plain/path?token=5",
        "s3://bucket/x:y@z",
    ],
)
def test_text_without_credentials_is_unchanged(uri: str) -> None:
    assert redact.identity(uri) == uri
    assert redact.remember(uri) == uri


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer Zecret9Zecret9Zecret9",
        "{'secret': 'Zecret9', 'client_secret': \"Zecret9\"}",
        "AccountKey=Zecret9;EndpointSuffix=core.windows.net",
        "aws_secret_access_key = Zecret9",
        "password=Zecret9",
        "-----BEGIN PRIVATE KEY-----\nZecret9\n-----END PRIVATE KEY-----",
        "url='https://h/a%3Fx?sig=Zecret9'",
    ],
)
def test_credentials_in_messages_of_libraries(text: str) -> None:
    assert "Zecret9" not in redact.redact(f"HttpError: {text}, try again")


def test_known_credentials_are_redacted_in_any_context() -> None:
    redact.remember("https://h/a?sig=Zec%2Fret9%3D")
    for spelling in ("Zec%2Fret9%3D", "Zec/ret9=", "Zec%2Fret9="):
        assert "ret9" not in redact.redact(f"strange: <{spelling}>")


def test_credentials_are_restored_for_their_own_uris() -> None:
    redact.remember("https://h/folder?sv=1&sig=Zecret9")
    redact.remember("https://me:Zecret8@h2/tables/t.csv?alt=media")
    redact.remember("https://h3/x/a.zip?X-Goog-Signature=Zecret7")
    assert redact.authorized("https://h/folder/a.jpg?alt=media") == "https://h/folder/a.jpg?alt=media&sv=1&sig=Zecret9"
    assert redact.authorized("https://me:other@h/folder/a.jpg") == "https://me:other@h/folder/a.jpg"
    assert redact.authorized("https://h2/tables/img/a.jpg") == "https://me:Zecret8@h2/tables/img/a.jpg"
    for other in (
        "https://h/folder2/a.jpg",
        "https://h/other",
        "https://h.evil/folder/a",
        "http://h/folder/a.jpg",
        "https://h2/else/a",
        "https://h3/x/b.zip",  # its signature covers one object
    ):
        assert redact.authorized(other) == other


def test_child_processes_inherit_the_known_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    redact.remember("https://h/a?sig=Zecret9")
    monkeypatch.setattr(redact, "_known", {})
    monkeypatch.setattr(redact, "_loaded", False)
    assert redact.authorized("https://h/a") == "https://h/a?sig=Zecret9"

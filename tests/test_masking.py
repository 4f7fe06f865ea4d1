import pytest

from lcmlora import masking
from lcmlora.cli.shell.reporting import reporting_errors
from lcmlora.config import Registry
from lcmlora.errors import Unavailable, UserError
from lcmlora.registry.tracking import reaching

SECRET = "s3same-0pen"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        (f"postgresql+psycopg2://lcmlora:{SECRET}@db:5432/x", "postgresql+psycopg2://lcmlora:***@db:5432/x"),
        ("postgresql://lcmlora:p@ss/w?rd#1@db/x", "postgresql://lcmlora:***@db/x"),
        (f"postgresql:///x?host=db&user=me&password={SECRET}", "postgresql:///x?host=db&user=me&password=***"),
        (
            f"mssql+pyodbc:///?odbc_connect=DRIVER%3D%7BODBC%7D%3BUID%3Dme%3BPWD%3D{SECRET}",
            "mssql+pyodbc:///?odbc_connect=***",
        ),
        (f"https://{SECRET}@mlflow.example/path", "https://***@mlflow.example/path"),
        (f"https://ghp_{'a1' * 18}:x-oauth-basic@github.com/me/it", "https://***@github.com/me/it"),
        (f"redis://:{SECRET}@cache:6379/0", "redis://:***@cache:6379/0"),
        (f"https://h/x?X-Amz-Credential=AKIA%2F1&X-Amz-Signature={SECRET}&X-Amz-Expires=60", None),
        (f"mysql://me@db/x?ssl_ca=/ca.pem&passwd={SECRET}", "mysql://***@db/x?ssl_ca=/ca.pem&passwd=***"),
        ("sqlite:////home/me@work/mlflow.db", "sqlite:////home/me@work/mlflow.db"),
        ("s3://bucket/models@home/x", "s3://bucket/models@home/x"),
        ("models:/lcm-lora-emoji@champion", "models:/lcm-lora-emoji@champion"),
        ("http://127.0.0.1:4200/api", "http://127.0.0.1:4200/api"),
    ],
)
def test_an_address_is_shown_without_what_logs_in(uri: str, shown: str | None):
    assert SECRET not in masking.address(uri)
    if shown is not None:
        assert masking.address(uri) == shown


@pytest.mark.parametrize(
    "text",
    [
        'could not connect: connection to server at "db", user=me password=%s host=db',
        "[08001] DRIVER={ODBC};UID=me;PWD=%s;SERVER=db",
        "PWD={%s;with a semicolon};SERVER=db",
        "401 for Authorization: Bearer %s",
        "Invalid URL 'http://me:%s@h:99999'",
        "SharedAccessSignature=%s",
        "DefaultEndpointsProtocol=https;AccountName=a;AccountKey=%s==;EndpointSuffix=x",
    ],
)
def test_a_text_loses_the_secrets_in_it(text: str):
    assert SECRET not in masking.text(text % SECRET)


@pytest.mark.parametrize(
    "text",
    ["max_tokens=77, sigma=0.5", "3 passes=2, author=me", "models:/lcm@champion: 3 figures", "a@b.c wrote to x@y.z"],
)
def test_other_text_stays(text: str):
    assert masking.text(text) == text


@pytest.mark.parametrize(
    "uri", [f"postgresql://me:{SECRET}@db/x", f"postgresql:///x?password={SECRET}", f"https://{SECRET}@h/x"]
)
@pytest.mark.parametrize("message", ["login failed for %s", "with %%73%s"])
def test_a_text_loses_the_secret_of_an_address_by_itself(uri: str, message: str):
    assert SECRET not in masking.text(message % SECRET, uri)


def test_a_quoted_password_is_masked_in_both_spellings():
    told = masking.text("tried p@ss:word and p%40ss%3Aword", "postgresql://me:p%40ss%3Aword@db/x")
    assert told == "tried *** and ***"


def test_secrets_of_the_environment_are_masked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "admin:hush-hush")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:by-proxy@proxy:3128")
    assert masking.text(f"{SECRET}, hush-hush, admin:hush-hush, by-proxy") == "***, ***, ***, ***"


def test_whoever_shows_an_error_shows_no_secret(capsys: pytest.CaptureFixture[str]):
    error = UserError(f"https://{SECRET}@h/x: refused")
    assert SECRET not in str(error) and SECRET not in f"{error}"
    for fault in (
        error,
        OSError(28, "No space left on device", f"http://me:{SECRET}@h/x"),
        ValueError(f"PWD={SECRET}"),
    ):
        with pytest.raises(SystemExit), reporting_errors():
            raise fault
    told = capsys.readouterr().err
    assert SECRET not in told and told.count("***") >= 3


@pytest.mark.parametrize(
    "uri",
    [
        f"postgresql://{SECRET}:x-oauth-basic@127.0.0.1:1/x",
        f"postgresql://me@127.0.0.1:1/x?password={SECRET}",
        f"mssql+pyodbc:///?odbc_connect=PWD%3D{SECRET}",
        f"https://{SECRET}@127.0.0.1:1",
        f"nonsense://me:{SECRET}@127.0.0.1",
    ],
)
def test_a_registry_out_of_reach_is_told_without_its_secret(uri: str, monkeypatch: pytest.MonkeyPatch):
    from lcmlora.registry.tracking import connect

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    settings = Registry(tracking_uri=uri, experiment="x", alias="champion")
    with pytest.raises((UserError, Unavailable)) as caught, reaching(settings, "ask again later"):
        connect(settings).search_experiments()
    error: BaseException | None = caught.value
    while error is not None:
        assert SECRET not in str(error)
        error = error.__cause__
    assert SECRET not in repr(settings) and SECRET not in str(settings)

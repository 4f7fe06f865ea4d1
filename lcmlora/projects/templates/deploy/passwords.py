"""Makes the passwords of the servers, each in the file of what needs it: python deploy/passwords.py FOLDER

The files are for docker compose and for `kubectl apply --kustomize` alike, and for nobody else to read. Keep FOLDER out
of Git and save it: the databases know these passwords. A folder that has files already stays as it is.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from pathlib import Path


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise SystemExit(f"{folder}: has files already, whose passwords the databases know; nothing was written")
    for name, content in files().items():
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(content)
    print(f"{folder}: {', '.join(sorted(files()))}")


def files() -> dict[str, str]:
    """Returns the files' texts by their names, with new passwords."""
    database, prefect, mlflow = (secrets.token_hex(20) for _ in range(3))
    stores = {name: (secrets.token_hex(10), secrets.token_hex(20)) for name in ("mlflow", "run", "serve")}
    rights = {
        "mlflow": ["Read:lcmlora", "Write:lcmlora", "List:lcmlora", "Tagging:lcmlora", "Admin:lcmlora"],
        "run": ["Read:lcmlora", "Write:lcmlora", "List:lcmlora", "Tagging:lcmlora", "Admin:lcmlora"],
        "serve": ["Read:lcmlora/releases/*", "List:lcmlora/releases/*"],
    }
    identities = [
        {"name": name, "credentials": [{"accessKey": access, "secretKey": secret}], "actions": rights[name]}
        for name, (access, secret) in stores.items()
    ]
    login = f"lcmlora:{prefect}"
    users = {"MLFLOW_TRACKING_URI": "http://mlflow:5000", "MLFLOW_TRACKING_USERNAME": "lcmlora"}
    users |= {"MLFLOW_TRACKING_PASSWORD": mlflow, "LCMLORA_PUBLISH_TO": "s3://lcmlora/releases"}
    server = f"lcmlora:{database}@postgresql:5432"
    variables = {
        "postgresql": {"POSTGRES_PASSWORD": database},
        "prefect": {
            "PREFECT_SERVER_API_AUTH_STRING": login,
            "PREFECT_API_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://{server}/prefect",
        },
        "mlflow": {
            "MLFLOW_BACKEND_STORE_URI": f"postgresql+psycopg2://{server}/mlflow",
            "MLFLOW_AUTH_ADMIN_USERNAME": "lcmlora",
            "MLFLOW_AUTH_ADMIN_PASSWORD": mlflow,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(32),
            "MLFLOW_S3_ENDPOINT_URL": "http://seaweedfs:8333",
            **_keys(*stores["mlflow"]),
        },
        "worker": {"PREFECT_API_URL": "http://prefect:4200/api", "PREFECT_API_AUTH_STRING": login},
        "run": users | _keys(*stores["run"]),
        "serve": users | _keys(*stores["serve"]),
    }
    texts = {f"{name}.env": "".join(f"{key}={value}\n" for key, value in of.items()) for name, of in variables.items()}
    return texts | {"identities.json": json.dumps({"identities": identities}, indent=2) + "\n", ".gitignore": "*\n"}


def _keys(access: str, secret: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": "http://seaweedfs:8333",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": access,
        "AWS_SECRET_ACCESS_KEY": secret,
    }


if __name__ == "__main__":
    main()

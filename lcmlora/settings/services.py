"""Settings of what surrounds the stages: `registry`, `publish`, `flow`, `retention`, `costs`.

No stage's result depends on them.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from lcmlora import names
from lcmlora.settings.fields import Name, Positive, Strict


class Registry(Strict):
    """MLflow: where runs and model versions are kept."""

    # It may hold a password, so that no text of settings has it.
    tracking_uri: Annotated[str, Field(repr=False)] = "sqlite:///mlflow.db"
    """Address of MLflow. The environment variable MLFLOW_TRACKING_URI overrides it: an address with a password does
    not belong in a file."""
    experiment: Annotated[
        str, Field(max_length=256, pattern=r"^/?[A-Za-z0-9][A-Za-z0-9._@ -]*(/[A-Za-z0-9][A-Za-z0-9._@ -]*)*$")
    ] = "lcmlora"
    """MLflow's experiment. Where it keeps experiments in folders, as on Databricks, with the folders before it."""
    alias: Name = "champion"
    """Alias of the champion in the registry, and the channel of published releases."""
    system_metrics: bool = True
    """Record CPU, memory, GPU and network while a model is distilled."""

    @field_validator("alias")
    @classmethod
    def _alias_of_mlflow(cls, alias: str) -> str:
        if "." in alias or alias.lower() == "latest" or re.fullmatch(r"[vV][0-9]+", alias):
            raise ValueError("is no alias: MLflow takes none with '.', nor `latest`, nor `v` with a number")
        if alias.lower() == "previous":
            raise ValueError("is no alias of its own: `previous` is that of the champion before the present one")
        return alias


class Publish(Strict):
    """Where releases are published."""

    to: str | Annotated[list[str], Field(min_length=1)] = "releases"
    """A directory, s3://bucket/prefix, or hf://owner/name on the hub. Or a list of these: the first is the one that
    versions name and that names such as MODEL@CHANNEL are looked up in. `{model}` in it stands for the model. The
    environment variable LCMLORA_PUBLISH_TO overrides it."""
    access: Literal["private", "gated", "public"] = "private"
    """Who may read a repository of the hub: one that lcmlora makes, or at most, one that it finds."""
    endpoint_url: str | None = None
    """Address of MinIO, R2, SeaweedFS and the like. The environment variable AWS_ENDPOINT_URL does as well."""
    region: str | None = None
    """Region of the bucket."""
    encryption: Literal["AES256", "aws:kms"] | None = None
    """Encryption of every object by the server."""
    kms_key: str | None = None
    """Key of encryption aws:kms."""
    tags: Annotated[dict[str, str], Field(max_length=10)] = {}
    """Tags of every object."""
    tolerate: list[Literal["create", "swap", "checksum"]] = []
    """What the S3 server may ignore, at your risk: `create`, that an object is created once; `swap`, that it is
    replaced only if nobody has changed it; `checksum`, that an upload with a wrong SHA-256 is refused. Without the
    first two no more than one publisher may be at work at a time. Without the third each upload is read back."""
    signing_key: str | None = None
    """PEM file of a private key. Releases are then signed."""
    verify_key: str | None = None
    """PEM file of its public key. Unsigned releases are then refused."""

    @model_validator(mode="after")
    def _encrypted(self) -> Self:
        if self.kms_key is not None and self.encryption != "aws:kms":
            raise ValueError(f"kms_key goes with encryption aws:kms, and encryption is {self.encryption}")
        return self

    @field_validator("to", mode="before")
    @classmethod
    def _split(cls, to: object) -> object:
        # An environment variable names several by spaces, which an address has none of, and a path may have.
        words = to.split() if isinstance(to, str) else []
        return words if len(words) > 1 and all("://" in word for word in words) else to

    @field_validator("to")
    @classmethod
    def _each_once(cls, to: str | list[str]) -> str | list[str]:
        if not isinstance(to, str) and len({*to}) < len(to):
            raise ValueError("names a store more than once")
        return to

    @property
    def stores(self) -> list[str]:
        """The addresses of all stores in `to`."""
        return [self.to] if isinstance(self.to, str) else list(self.to)

    @property
    def first(self) -> str:
        """The address of the store that is looked into and that versions name."""
        return self.stores[0]

    def to_one(self, address: str) -> Publish:
        """Returns these settings for one store."""
        return self if self.to == address else self.model_copy(update={"to": address})

    def of(self, model: str) -> Publish:
        """Returns these settings with the addresses of one model's stores."""
        own = [address.replace("{model}", model) for address in self.stores]
        return self.model_copy(update={"to": own[0] if len(own) == 1 else own})


class Flow(Strict):
    """How the Prefect flows run the stages."""

    gpu_limit: Name = "gpu"
    """Prefect's concurrency limit for what trains or draws, one at a time. The environment variable LCMLORA_GPU_LIMIT
    overrides it, for a worker with GPUs of its own."""
    models_at_once: Positive = 4
    """Models that are worked on at once."""
    retries: Annotated[int, Field(ge=0)] = 3
    """Retries of what needs the network."""
    retry_seconds: Annotated[float, Field(gt=0)] = 5.0
    """Seconds before the first retry, doubled for each further one."""
    timeout_hours: Annotated[float, Field(gt=0)] = 72.0
    """Hours after which a stage is stopped."""
    pull_minutes: Annotated[float, Field(gt=0)] = 30.0
    """Minutes that a stage waits for DVC's remote to give former results, before it is computed without."""
    push_minutes: Annotated[float, Field(gt=0)] = 240.0
    """Minutes after which sending results to DVC's remote is left to the next run, which sends what is missing."""
    outage_hours: Annotated[float, Field(gt=0)] = 12.0
    """Hours for which a run waits for a Prefect server that does not answer. It goes on meanwhile, and reports when the
    server is back."""

    @property
    def patience(self) -> float:
        """Seconds for which a run waits for a Prefect server that does not answer."""
        return self.outage_hours * 3600

    @property
    def limit(self) -> str:
        """The limit's name; LCMLORA_GPU_LIMIT, which a worker with GPUs of its own sets, overrides `gpu_limit`."""
        return names.check(os.environ.get("LCMLORA_GPU_LIMIT") or self.gpu_limit, "LCMLORA_GPU_LIMIT")


class Retention(Strict):
    """What `lcmlora prune` keeps. What an alias or a channel names is kept in any case."""

    versions: Positive = 10
    """The newest versions of each model are kept, so many."""
    days: Annotated[float, Field(ge=0)] = 90.0
    """Versions, runs and releases younger than so many days are kept."""
    scratch_days: Annotated[float, Field(ge=1)] = 14.0
    """Unfinished work in scratch/, and old logs, are kept for so many days after the last change."""
    dvc: Literal["everything", "commits", "branches", "workspace"] = "commits"
    """Whose results stay in DVC's cache: everything; those of all commits; of the ends of branches and tags; of the
    workspace alone."""
    dvc_remote: bool = False
    """Prune DVC's default remote in the same way. Only where no other project and no other clone uses it: what they
    alone need is deleted, too."""


class Costs(Strict):
    """What a device costs, and how much a model may cost in a month."""

    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = "EUR"
    """Currency of all prices, ISO 4217."""
    per_hour: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Price of a device's hour, by `cpu` or by the beginning of the GPU's name, such as `NVIDIA H100`. The longest
    that fits counts."""
    budget: Annotated[float, Field(gt=0)] | None = None
    """What a model may cost in a calendar month (UTC). Once it is spent, scheduled runs leave the model to a person."""

"""Settings: read from the environment once in each process, and passed down as arguments.

Every name has the prefix OURVIDZ_ (`OURVIDZ_PROFILE=gpu-24gb`); `DATABASE_URL` is read as well. A Serve config gives
values in its `args`; the environment wins over those. Secrets come from the environment only. On the laptop profile
missing secrets are made at random and kept in the state folder; any other profile refuses to start without them.
"""

import base64
import json
import os
import secrets
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from db import embedded
from db.retention import RetentionPolicy
from deployments.destinations import AllowedHost, EgressPolicy
from models.origin.provenance import Algorithm
from models.profile import Profile, load_profile

GENERATED = ("signing_secret", "callback_secret", "job_callback_secret")  # on a laptop, where they are missing
SECRET_FIELDS = frozenset({"database_url", "metrics_token", "replicate_webhook_secret", "jwt_secret", *GENERATED})
LOOPBACK = ("127.0.0.1", "::1", "localhost")
PUBLISHED_SECRETS = frozenset(  # what Supabase's own papers and tools set until somebody changes it
    {
        "super-secret-jwt-token-with-at-least-32-characters-long",
        "your-super-secret-jwt-token-with-at-least-32-characters-long",
    }
)


class SettingsError(RuntimeError):
    """The settings can't work together, or a secret is missing. The message names the variable."""

    code = "settings"


def default_state_dir() -> Path:
    """Where state lives by default, after the XDG base directory specification."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "ourvidz"


class Settings(BaseSettings):
    """What an operator can set. Durations are in seconds, sizes in bytes."""

    model_config = SettingsConfigDict(
        env_prefix="OURVIDZ_",
        env_file=None,
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,  # a message about two settings would show all of them, secrets included
    )

    profile: str = Field("laptop", description="Name of a profile in configs/profiles, or a path to one.")
    state_dir: Path = Field(
        default_factory=default_state_dir,
        description="Embedded Postgres, local object store, tiny weights and generated secrets.",
    )
    database_url: SecretStr | None = Field(
        None, description="A Postgres of your own (15 or later). Empty: the embedded one. DATABASE_URL is read too."
    )
    blob_url: str | None = Field(
        None, description="Object store: file:///folder, s3://bucket?endpoint=…; empty: a folder in the state folder."
    )
    public_url: str = Field(
        "http://127.0.0.1:8000", description="Where clients reach the API; signed URLs begin with it."
    )
    signing_secret: SecretStr | None = Field(None, description="Signs asset URLs. At least 32 characters.")
    callback_secret: SecretStr | None = Field(
        None, description="Master secret from which each user's callback secret is derived. At least 32 characters."
    )
    job_callback_secret: SecretStr | None = Field(
        None, description="Shared secret of outside providers that report to /functions/v1/job-callback."
    )
    replicate_webhook_secret: SecretStr | None = Field(
        None, description="What Replicate signs webhooks with (whsec_…). Empty: its predictions are only polled."
    )
    provider_slots: int = Field(8, ge=1, le=200, description="Jobs at outside providers that one replica looks after.")
    provider_seconds: float = Field(
        1800, ge=10, le=86400, description="How long a prediction at an outside provider may take before it is stopped."
    )
    max_output_bytes: int = Field(
        200_000_000, ge=1000, description="Largest file that is fetched from an outside provider."
    )
    metrics_token: SecretStr | None = Field(
        None, description="When set, /metrics wants it as a bearer token. It names no user and no prompt either way."
    )
    jwt_secret: SecretStr | None = Field(
        None,
        description="The secret with which your auth service, such as Supabase, signs users' tokens (HS256). At least "
        "32 bytes. Empty: no such token is accepted.",
    )
    jwks_url: str | None = Field(
        None,
        description="Where your auth service lists the public keys of its tokens (ES256, RS256): https, or http on "
        "this machine; on Supabase https://<project>.supabase.co/auth/v1/.well-known/jwks.json.",
    )
    jwt_issuer: str | None = Field(
        None, description="The issuer that tokens must name; on Supabase https://<project>.supabase.co/auth/v1."
    )
    egress_allow: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Origins that callbacks and references may reach although private, e.g. http://10.0.0.7:9000."
    )
    signed_url_seconds: int = Field(3600, ge=1, le=7 * 86400, description="How long a signed asset URL works.")
    callback_url_seconds: int = Field(
        7 * 86400, ge=60, le=7 * 86400, description="How long the signed URLs inside a callback work."
    )
    callback_schedule: Annotated[tuple[float, ...], NoDecode] = Field(
        (0, 5, 300, 1800, 7200, 18000, 36000, 50400, 72000, 86400),
        min_length=1,
        description="Seconds before each delivery attempt of a callback; after the last one it is dead.",
    )
    callback_concurrency: int = Field(32, ge=1, le=1000, description="Callbacks that one deliverer sends at once.")
    lease_seconds: float = Field(
        30, ge=2, le=3600, description="How long a replica may be silent before it loses a job."
    )
    renew_seconds: float = Field(5, ge=0.2, le=600, description="How often a replica renews its leases.")
    poll_seconds: float = Field(1, ge=0.05, le=60, description="How often replicas look for work without a wake-up.")
    upkeep_seconds: float = Field(
        2, ge=0.1, le=60, description="How often leases, deadlines and delays are looked after."
    )
    preview_seconds: float = Field(
        1, ge=0.2, le=60, description="Least time between two previews of a job that asked for previews."
    )
    drain_seconds: float = Field(
        30, ge=0, le=7200, description="How long a stopping replica lets its job finish before it hands it back."
    )
    store_patience_seconds: float = Field(
        60, ge=0, le=240, description="How long a replica keeps finished work in hand while the object store is away."
    )
    store_outage_seconds: float = Field(
        3600,
        ge=0,
        le=7 * 86400,
        description="How long after its first failure for the store's sake a job may fail so again.",
    )
    max_attempts: int = Field(3, ge=1, le=20, description="Failed runs and lost leases that a job may have.")
    max_body_bytes: int = Field(1_000_000, ge=1000, description="Largest request body.")
    max_reference_bytes: int = Field(20_000_000, ge=1000, description="Largest reference image.")
    max_reference_pixels: int = Field(40_000_000, ge=1000, description="Most pixels of a reference image.")
    sweep_seconds: float = Field(600, ge=1, description="How often the object store is searched for orphaned files.")
    orphan_grace_seconds: float = Field(3600, ge=0, description="How old a file that nothing speaks of must be to go.")
    event_retention_days: int = Field(30, ge=1, le=36500, description="How long the events of ended jobs are kept.")
    delivery_retention_days: int = Field(
        30, ge=1, le=36500, description="How long the log of each try to deliver a callback is kept."
    )
    job_retention_days: int | None = Field(
        None,
        ge=2,
        le=36500,
        description="How many days after their end `ourvidz archive` takes jobs out of the database. Empty: they are "
        "kept for ever. Nothing but that command deletes old jobs, and none that it has not written.",
    )

    provenance: Literal["none", "iptc", "c2pa"] = Field(
        "iptc",
        description="How files say that an AI model made them: not at all, by IPTC's digitalSourceType (XMP), or by "
        "that and a C2PA signature. Every file carries its manifest either way.",
    )
    c2pa_certificate: Path | None = Field(
        None, description="Certificate chain (PEM, the signer's first) that C2PA signatures are made with."
    )
    c2pa_key: Path | None = Field(
        None, description="Its private key (PEM, PKCS#8, without a passphrase). Only replicas need to read the file."
    )
    c2pa_algorithm: Algorithm = Field("es256", description="The signature algorithm that fits the key.")
    image_classifier: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$",
        description="Your own judge of what is made, as package.module:Name: replicas ask it about every result.",
    )
    on_reject: Literal["hold", "fail"] = Field(
        "hold",
        description="What the classifier rejects: `hold` keeps it for its owner and the moderators, `fail` keeps "
        "nothing and fails the job (`content_rejected`).",
    )

    @field_validator("egress_allow", "callback_schedule", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("egress_allow")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            AllowedHost.parse(origin)
        return value

    @field_validator("public_url")
    @classmethod
    def _no_slash(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")):
            raise ValueError("must begin with http:// or https://")
        return value.rstrip("/")

    @field_validator("jwks_url")
    @classmethod
    def _keys_come_safely(cls, value: str | None) -> str | None:
        if value is not None:
            parts = urlsplit(value)
            if not (parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK)):
                raise ValueError("must begin with https://, or be on this machine")
            if parts.username or parts.password:
                raise ValueError("takes no user name or password")
        return value

    @model_validator(mode="after")
    def _issues_something(self) -> Self:
        if self.jwt_issuer is not None and self.jwt_secret is None and self.jwks_url is None:
            raise ValueError("jwt_issuer has no effect without jwt_secret or jwks_url")
        return self

    @model_validator(mode="after")
    def _lease_outlasts_renewals(self) -> Self:
        if 2 * self.renew_seconds > self.lease_seconds:
            raise ValueError(
                "renew_seconds may be at most half of lease_seconds, so that one lost renewal costs no job"
            )
        return self

    @model_validator(mode="after")
    def _signs_with_something(self) -> Self:
        given = {"c2pa_certificate": self.c2pa_certificate, "c2pa_key": self.c2pa_key}
        if self.provenance == "c2pa" and (missing := [name for name, path in given.items() if path is None]):
            raise ValueError(f"provenance c2pa needs {' and '.join(missing)}")
        if self.provenance != "c2pa" and any(given.values()):
            raise ValueError("c2pa_certificate and c2pa_key have no effect unless provenance is c2pa")
        return self

    @model_validator(mode="after")
    def _rejects_with_something(self) -> Self:
        if self.image_classifier is None and self.on_reject != "hold":
            raise ValueError("on_reject has no effect without an image_classifier")
        return self

    @classmethod
    def load(cls, args: dict[str, Any] | None = None) -> Self:
        """The settings of this process: `args` of a Serve config, overruled by the environment."""
        given = {name: value for name, value in (args or {}).items() if not os.environ.get(f"OURVIDZ_{name.upper()}")}
        if os.environ.get("DATABASE_URL") and not os.environ.get("OURVIDZ_DATABASE_URL"):
            given["database_url"] = os.environ["DATABASE_URL"]
        return cls(**given)

    def shared(self) -> dict[str, Any]:
        """What the builder tells every deployment: all but the secrets, which each process reads for itself."""
        return self.model_dump(mode="json", exclude=set(SECRET_FIELDS))

    @classmethod
    def in_deployment(cls, shared: dict[str, Any]) -> Self:
        """The settings of a deployment: the builder's values, and the secrets of its own environment."""
        url = os.environ.get("OURVIDZ_DATABASE_URL") or os.environ.get("DATABASE_URL")
        return cls(**(shared | ({"database_url": url} if url else {})))

    @cached_property
    def loaded_profile(self) -> Profile:
        """The profile that is named."""
        return load_profile(self.profile)

    def postgres(self) -> str:
        """The URL of Postgres; starts the embedded one where no other is set. May take seconds the first time."""
        if self.database_url is not None:
            return self.database_url.get_secret_value()
        return embedded.ensure_running(self.state_dir / "postgres")

    @property
    def embedded_postgres(self) -> Path | None:
        """The data folder of the embedded Postgres; None where another one is set."""
        return None if self.database_url is not None else self.state_dir / "postgres"

    def blobs(self) -> str:
        """The URL of the object store."""
        return self.blob_url or f"file://{self.state_dir / 'blobs'}"

    def retention_policy(self) -> RetentionPolicy:
        """What upkeep forgets by itself, and when."""
        return RetentionPolicy(event_days=self.event_retention_days, delivery_days=self.delivery_retention_days)

    def egress_policy(self) -> EgressPolicy:
        """What callbacks and references may reach: public https, and the origins of `egress_allow`."""
        return EgressPolicy(allow=tuple(AllowedHost.parse(origin) for origin in self.egress_allow))

    def provider_webhook(self) -> str | None:
        """Where a provider may report to; None where it could not reach us, or could not be told from anybody."""
        if self.replicate_webhook_secret is None or not self.public_url.startswith("https://"):
            return None
        return f"{self.public_url}/functions/v1/replicate-webhook"

    def secret(self, name: str) -> bytes:
        """A secret by its field's name. Raises `SettingsError` when it is missing outside the laptop profile."""
        value: SecretStr | None = getattr(self, name)
        if value is not None:
            text = value.get_secret_value()
            if len(text) < 32:
                raise SettingsError(f"OURVIDZ_{name.upper()} must have at least 32 characters")
            return text.encode()
        if not self.loaded_profile.laptop:
            raise SettingsError(f"OURVIDZ_{name.upper()} must be set on the profile {self.loaded_profile.name}")
        return base64.b64decode(self._laptop_secrets()[name])

    def token_secret(self) -> bytes | None:
        """The secret of users' tokens, where one is set. Raises `SettingsError` for one that others can guess."""
        if self.jwt_secret is None:
            return None
        text = self.jwt_secret.get_secret_value()
        if len(text.encode()) < 32:
            raise SettingsError("OURVIDZ_JWT_SECRET must have at least 32 bytes")
        if text in PUBLISHED_SECRETS and not self.loaded_profile.laptop:
            raise SettingsError("OURVIDZ_JWT_SECRET is a published default; whoever knows it is anybody")
        return text.encode()

    def _laptop_secrets(self) -> dict[str, str]:
        path = self.state_dir / "secrets.json"
        self.state_dir.mkdir(parents=True, exist_ok=True)
        fresh = {name: base64.b64encode(secrets.token_bytes(32)).decode() for name in GENERATED}
        draft = path.with_name(f".secrets.{os.getpid()}.{secrets.token_hex(4)}")
        if not path.exists():
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                json.dump(fresh, file)
            try:
                os.link(draft, path)  # the first process wins; the others read what it wrote
            except FileExistsError:
                pass
            finally:
                draft.unlink()
        stored: dict[str, str] = json.loads(path.read_text())
        return stored

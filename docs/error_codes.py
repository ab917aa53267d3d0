"""Collects every stable error code from the code: what is raised, and what the API makes of it.

A code that is raised somewhere and has no meaning here, or the other way round, stops `make docs`.
"""

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from starlette.exceptions import HTTPException

from db.blobs import StorageUnavailable
from db.idempotency import IdempotencyConflict, IdempotencyInFlight
from db.limits import LimitReached
from deployments import destinations, enhancer, replica, storing
from deployments.provider import api as provider_api
from models import generation, params
from models.catalog import UnknownJobType
from models.lora import files as lora_files
from models.policy import ContentRejected
from models.prompting import answers
from models.prompting.prompts import NoTemplate
from serve_app.api.problems import problem_of

ROOT = Path(__file__).parent.parent
PACKAGES = ("models", "db", "deployments", "serve_app")

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]

# what fails a job without an exception of ours being raised for it
ENDINGS = {
    "worker_lost": (
        "yes",
        "The lease ran out: the replica died, was killed or hung. Fails a job that has used up its budget.",
    ),
    "internal": ("yes", "Something escaped the replica's own handling. The job is run again while its budget lasts."),
    "deadline_exceeded": ("no", "`deadline_seconds` passed, while the job waited or ran."),
    "start_deadline_exceeded": ("no", "`start_deadline_seconds` passed before the first claim."),
    "claim_unheard": (
        "",
        "Only in the history: a replica lost the connection while it claimed the job, and put it back. Costs nothing.",
    ),
    "drained": ("", "Only in the history: a replica that stops handed the job back. Costs nothing of the budget."),
}
FIELD_CODES = {
    "missing": "It is required, or goes together with another field.",
    "type": "It has the wrong type. Numbers in strings and booleans as numbers are wrong types.",
    "unknown": "There is no such parameter.",
    "range": "It is outside the range that the message names, or no finite number.",
    "choice": "It is none of the values that the message lists.",
    "length": "It is too long, or empty.",
    "characters": "It has control characters.",
    "unsupported": "This job type can't honour it.",
    "conflict": "It has no effect, or contradicts another field.",
}
# better words than the messages have
MEANINGS = {
    "missing_key": "There is no `Authorization: Bearer …`.",
    "invalid_token": "A token of the auth service is not accepted; the message says what about it.",
    "token_expired": "The token has expired. Refresh it with the auth service.",
    "anonymous_token": "The token is a project's public key, or of somebody who signed in as nobody. Sign in first.",
    "service_token": "The token is a project's service key, which stands for no user. Use the API key of an admin.",
    "user_erased": "The user is being erased, or was after the token was issued. Sign in anew to begin again.",
    "token_keys_unavailable": "The auth service's keys can't be fetched. Try again after `Retry-After`.",
    "invalid_key": "The API key is unknown, revoked or expired.",
    "admin_only": "Only an admin may do this.",
    "job_open": "The job has not ended. Cancel it first.",
    "nsfw_not_allowed": "The profile, or the user's age verification, does not allow nsfw.",
    "too_many_references": "The jobs of a batch have more references together than the message says.",
    "age_not_verified": "nsfw needs an age-verified user.",
    "CROSS_USER_REFERENCE": "The path of a reference, or its signed URL, is under another user's id.",
    "invalid_reference_path": "The path of a reference is written as none of ours is, or lies in another bucket.",
    "reference_not_found": "The caller has no such picture, or it has been deleted.",
    "reference_not_allowed": "In nsfw mode a reference must be an image that this system made, in sfw mode none that "
    "was made in nsfw mode; and none that moderation rejected.",
    "moderators_only": "Only a moderator or an admin may do this.",
    "moderation_changed": "Somebody has decided otherwise since. Read the result again.",
    "not_publishable": "Moderation has rejected the item, so nobody else may see it.",
    "invalid_signature": "403: the signature of a file's URL. 401: the signature or the time of a provider's report.",
    "job_not_found": "There is no such job, or it is somebody else's.",
    "key_not_found": "There is no such API key, or it is somebody else's.",
    "not_retryable": "The job is not failed or cancelled.",
    "not_rerunnable": "The job is not completed, was run elsewhere, or something it was made from is gone.",
    "url_expired": "The signed URL has expired. Read the job again for a new one.",
    "body_too_large": "The body is larger than `OURVIDZ_MAX_BODY_BYTES`.",
    "invalid_request": "The shape of the request is wrong; `errors` names the fields, with pydantic's codes.",
    "metadata": "`metadata` is too large, too deep, or holds what can't be given back as it is.",
    "asset_file_missing": "The file is gone from the store, or is not the one that its row speaks of.",
    "too_many_uploads": "The user has as many uploads as one may have. Delete some.",
    "unsupported_media_type": "The body has a media type that the operation does not take.",
    "not_implemented": "A scene for enhance-prompt, or a function of the older system that is not made here.",
    "output_host": "A provider's report names a file at a host that is not among its `output_hosts`.",
    "asset_path": "A provider's report names a file that does not lie in the job's own folder.",
    "gone": "A function of the older system that nothing calls any more.",
    "destination_not_found": "`metadata.destination` names no scene or character that the caller may change.",
    "character_ambiguous": "Several characters have the name that was given.",
    "worker_not_found": "The profile has no model of that kind.",
    "invalid_url": "A worker's address must be an http or https URL without a user or password.",
    "generation_failed": "The job that a picture was waited for has failed. The message names the job and its code.",
    "model_not_installed": "Neither the profile nor an outside provider has a model for this job type.",
    "MODEL_VERSION_NOT_FOUND": "`apiModelId` names no image model of the provider that is turned on and has a version.",
    "webhook_not_configured": "`OURVIDZ_REPLICATE_WEBHOOK_SECRET` is not set, so that nobody's webhooks are believed.",
    "reference_type_unavailable": "The profile has no model or adapter for this kind of reference.",
    "no_template_available": "No active prompt template fits.",
    "conversation_not_found": "There is no such conversation, or it is somebody else's.",
    "character_not_found": "There is no such character, or it is not for you to see.",
    "project_not_found": "There is no such project, or it is somebody else's.",
    "template_not_found": "There is no active chat template of that id.",
    "message_too_long": "The message and its system prompt leave the language model no room for an answer.",
    "language_model_unavailable": "No language model runs here, or it can't be reached. Nothing was stored.",
    "language_model_failed": "The language model raised an error. Nothing was stored.",
    "model_busy": "Too much waits for the language model. Try again after `Retry-After`.",
    "database_unavailable": "Postgres is away or full. Try again after `Retry-After`.",
    "internal": "A fault of ours, with nothing told. It is in the log.",
}
ANSWERS: tuple[tuple[Exception, str], ...] = (
    (params.InvalidParams([]), "A parameter is wrong; `errors` names each, with the codes of the next table."),
    (UnknownJobType(), "There is no such job type."),
    (ContentRejected("content_minors", ""), "The content policy: sexual content that involves minors, in any mode."),
    (ContentRejected("content_sexual_in_sfw", ""), "The content policy: sexual content in sfw mode."),
    (generation.InvalidInput(""), "A reference image or its mask can't be used."),
    (IdempotencyConflict(), "The key was used before, with another body."),
    (IdempotencyInFlight(), "A request with the key is being accepted now. Try again after `Retry-After`."),
    (LimitReached("rate_limited", ""), "More requests than `rateLimitRequestsPerMinute` and `burst` let in."),
    (LimitReached("hourly_limit", ""), "As many jobs as `maxJobsPerHour` were submitted in the last 60 minutes."),
    (LimitReached("user_limit", ""), "As many of the user's jobs wait or run as `maxJobsPerUser`."),
    (LimitReached("concurrent_limit", ""), "As many jobs of all users wait or run as `maxConcurrentJobs`."),
    (LimitReached("storage_limit", ""), "The user's files take up `maxStoragePerUserGB`."),
    (LimitReached("credits_exhausted", ""), "The operator charges for jobs, and the balance is too low."),
    (LimitReached("maintenance", ""), "The installation is maintained, and takes new work of admins only."),
    (destinations.EgressRefused("scheme", ""), "A callback or reference URL is refused by rule."),
    (destinations.EgressFailed("timeout", ""), "A callback or reference URL gave nothing usable."),
    (StorageUnavailable(), "The object store is away. Try again after `Retry-After`."),
    (HTTPException(404), "There is no such path. Other statuses of the framework likewise, such as `http_405`."),
)


@dataclass(frozen=True)
class Codes:
    """The tables of the page, by the names of its blocks."""

    http: Table
    fields: Table
    job: Table
    egress: Table
    enhancement: Table
    inside: Table


@cache
def collect() -> Codes:
    """Everything, read anew from the code."""
    return Codes(http(), field_codes(), job_codes(), egress_reasons(), enhancement_reasons(), inside())


def http() -> Table:
    """Status and code of every problem that the API answers. Without a meaning in `MEANINGS`, the message stands."""
    statuses: dict[str, set[int]] = {NoTemplate.code: {503}}
    meanings = {}
    for _, tree in modules("serve_app"):
        for call in calls(tree, "Problem"):
            status, code, message = (*call.args, None, None, None)[:3]
            if isinstance(status, ast.Constant) and isinstance(code, ast.Constant) and code.value not in FIELD_CODES:
                statuses.setdefault(str(code.value), set()).add(int(str(status.value)))
                meanings[str(code.value)] = said(message)
    for error, meaning in ANSWERS:
        problem = problem_of(error)
        statuses.setdefault(problem.code, set()).add(problem.status)
        meanings[problem.code] = meaning
    agree("codes of the API with a meaning", set(MEANINGS) & set(statuses), set(MEANINGS))
    meanings |= MEANINGS
    agree("codes of the API", set(statuses), {code for code, meaning in meanings.items() if meaning})
    rows = [(f"`{code}`", ", ".join(map(str, sorted(found))), meanings[code]) for code, found in statuses.items()]
    return ("Code", "Status", "Meaning"), sorted(rows, key=lambda row: (row[1], row[0]))


def said(message: ast.expr | None) -> str:
    """A message as far as it stands in the call; what is put in is shown as an ellipsis."""
    parts = message.values if isinstance(message, ast.JoinedStr) else [message]
    text = "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in parts)
    return "" if text == "…" else text[:1].upper() + text[1:] + "."


def field_codes() -> Table:
    """The codes of single fields."""
    documented = inspect.getdoc(params.FieldError) or ""
    listed = re.search(r"`code`: ([\w\s,]+)\.", documented)
    assert listed is not None, "models.params.FieldError lists its codes"
    names = set(re.findall(r"\w+", listed[1])) - {"or"}
    agree("field codes", names, set(FIELD_CODES))
    return ("Code", "Meaning"), [(f"`{name}`", meaning) for name, meaning in FIELD_CODES.items()]


def job_codes() -> Table:
    """The codes with which a job fails."""
    tree = dict(re.findall(r"[├└]── (\w+) +\w+ {2,}(.+)", inspect.getdoc(generation) or ""))
    rows = []
    for kind in leaves(generation.GenerationError):
        meaning = tree.get(kind.__name__) or (inspect.getdoc(kind) or "").partition("\n\n")[0]
        assert meaning, f"{kind.__name__} has no docstring"
        if kind.code != "cancelled":  # a state of its own, not a failure
            meaning = meaning[:1].upper() + meaning[1:].replace("\n", " ").rstrip(".") + "."
            rows.append((f"`{kind.code}`", "yes" if kind.retryable else "no", meaning))
    raised = set()
    for _, module in modules("deployments"):
        for node in ast.walk(module):
            values: list[ast.expr] = []
            if isinstance(node, ast.keyword) and node.arg == "error_code":
                values = [node.value]
            elif isinstance(node, ast.Dict):
                pairs = zip(node.keys, node.values, strict=True)
                values = [value for key, value in pairs if isinstance(key, ast.Constant) and key.value == "error_code"]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "_failed":
                values = node.args[:1]
            texts = {part.value for value in values for part in ast.walk(value) if isinstance(part, ast.Constant)}
            raised |= {text for text in texts if isinstance(text, str)}
    sql = (ROOT / "db/queries/queue.sql").read_text(encoding="utf-8")
    raised |= set(re.findall(r"'(\w*deadline_exceeded)'", sql))
    agree("endings of jobs", raised, set(ENDINGS))
    rows += [(f"`{code}`", retryable, meaning) for code, (retryable, meaning) in ENDINGS.items()]
    return ("Code", "Worth a retry", "Meaning"), sorted(rows)


def egress_reasons() -> Table:
    """Why a URL was refused or failed, as callbacks record it."""
    rows = []
    for kind, again in ((destinations.EgressRefused, "no"), (destinations.EgressFailed, "yes")):
        listed = (inspect.getdoc(kind) or "").partition("Reasons: ")[2]
        rows += [(f"`{reason}`", f"`{kind.code}`", again) for reason in dict.fromkeys(re.findall(r"`(\w+)`", listed))]
    return ("Reason", "Code", "Another try may succeed"), [
        row for row in rows if row[0] != "`status`" or row[2] == "yes"
    ]


def enhancement_reasons() -> Table:
    """Why rules stood in for the language model, or why the prompt stayed as it was."""
    outside = {
        "model_unavailable": "The language model is not loaded.",
        "replica_unavailable": "Its replica can't be reached. Only for prompts that are enhanced at once.",
        "model_busy": "Too much waits for it already. Only for prompts that are enhanced at once; jobs wait.",
        "model_failed": "It raised an error.",
        "timed_out": "It was not done in the time that a preset, or the answer, gives it.",
        "too_long": "Its answer was far over the limit.",
        "weights_lost": "Its answer lost weights of a prompt for Compel, and the words to put them back on.",
        "content_rejected": "Its answer, or what rules made of the prompt, breaks the content policy.",
        "no_template_available": "No active template fits; the prompt stays as it was.",
        "tokenizer_unavailable": "The tokenizer of the reader of the prompt can't be read; the prompt stays as it was.",
        "nothing_to_add": "Rules have nothing to add, or no room for it; the prompt stays as it was.",
    }
    meanings = outside | {
        "empty_answer": "It said nothing.",
        "gibberish": "Its answer is no text. The tiny weights of the profile laptop always end here.",
        "refusal": "It refused. A refusal is never cut down to a prompt.",
        "not_a_prompt": "It talked, or wrote markup or code.",
        "echo": "It repeated its instructions.",
        "unchanged": "It gave the prompt back as it was.",
        "unrelated": "Its answer has not one word of the prompt.",
    }
    listed = (inspect.getdoc(answers.unusable) or "").partition("Reasons: ")[2].partition(".")[0]
    names = set(re.findall(r"\b[a-z_]+\b", re.sub(r"\([^)]*\)", "", listed))) - {"or", "and"}
    agree(
        "reasons of an unusable answer",
        names,
        set(meanings) - set(outside),
    )
    return ("Reason", "Meaning"), [(f"`{name}`", meaning) for name, meaning in meanings.items()]


def inside() -> Table:
    """Exceptions that clients of the HTTP API do not see under this name: start-up, and the command line."""
    shown = {row[0] for row in http()[1] + job_codes()[1]} | {"`cancelled`"}
    rows = []
    for module, tree in (entry for package in PACKAGES for entry in modules(package)):
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                for item in node.body:
                    is_code = (
                        isinstance(item, ast.Assign)
                        and isinstance(item.targets[0], ast.Name)
                        and item.targets[0].id == "code"
                    )
                    if is_code and isinstance(item.value, ast.Constant) and f"`{item.value.value}`" not in shown:
                        about = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
                        rows.append((f"`{item.value.value}`", f"`{module}.{node.name}`", about))
    return ("Code", "Exception", "Meaning"), sorted(rows)


def leaves(kind: type[generation.GenerationError]) -> Iterator[type[generation.GenerationError]]:
    """The concrete errors below one, those of the replicas included."""
    assert all((enhancer, lora_files, provider_api, replica, storing))  # imported, so that their errors are known
    for child in kind.__subclasses__():
        if "code" in vars(child):
            yield child
        yield from leaves(child)


def modules(package: str) -> Iterator[tuple[str, ast.Module]]:
    """The modules of a package, parsed."""
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        yield name, ast.parse(path.read_text(encoding="utf-8"))


def calls(tree: ast.Module, name: str) -> Iterator[ast.Call]:
    """The calls of a function or class by that name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name and node.args:
            yield node


def agree(what: str, in_code: set[str], here: set[str]) -> None:
    """Raises `ValueError` when the code and this file name different ones: give a new one a meaning here."""
    if in_code != here:
        raise ValueError(
            f"{what}: only in the code {sorted(in_code - here)}, only in docs/error_codes.py {sorted(here - in_code)}"
        )

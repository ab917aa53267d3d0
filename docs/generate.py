"""Writes the mechanical parts of the reference from the code: `make docs`.

A page under docs/reference/ is written by hand, but for the blocks between `<!-- begin NAME -->` and `<!-- end NAME -->`,
which this script fills. `--check` changes nothing and fails when a page differs from what the code says;
tests/test_docs.py does the same.
"""

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import error_codes
from typer.main import get_command

from deployments import metrics as run_metrics
from deployments.settings import SECRET_FIELDS, Settings, default_state_dir
from models.catalog import FAMILIES, JOB_TYPES, default_for
from models.profile import load_profile, profile_names
from serve_app.api import health
from serve_app.api.auth import authenticate, require_admin
from serve_app.app import api, event_streams, openapi_document
from serve_app.cli import app as command_line

REFERENCE = Path(__file__).parent / "reference"
WITHOUT_KEY = {"getFile": "a signed URL", "jobCallback": "a signed body"}


def table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table. None is an empty cell."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns)]
    lines += [["" if cell is None else str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def code(text: object) -> str:
    """Inline code; nothing for an empty text."""
    return f"`{text}`" if str(text) else ""


def sentence(text: str | None) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join(inspect.cleandoc(text or "").partition("\n\n")[0].split())


# --- settings ---------------------------------------------------------------------------------------------


def settings_table() -> str:
    """Every setting, its variable, its default and its bounds."""
    properties = Settings.model_json_schema()["properties"]
    rows = []
    for name, field in Settings.model_fields.items():
        default: object = field.get_default()
        if field.default_factory is default_state_dir:
            shown = "`$XDG_STATE_HOME/ourvidz`, else `~/.local/state/ourvidz`"
        elif isinstance(default, tuple):
            shown = code(",".join(f"{item:g}" if isinstance(item, float) else str(item) for item in default))
        else:
            shown = "" if default is None else code(f"{default:g}" if isinstance(default, float) else default)
        secret = "secret; " if name in SECRET_FIELDS else ""
        rows.append((code(f"OURVIDZ_{name.upper()}"), shown, bounds(properties[name]), secret + (field.description or "")))
    return table(("Variable", "Default", "Allowed", "Meaning"), rows)


def bounds(schema: Mapping[str, Any]) -> str:
    """The numeric range of a JSON schema."""
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high = schema.get("maximum")
    lower = f"{low:g}" if low is not None else f"more than {above:g}" if above is not None else ""
    if lower and high is not None:
        return f"{lower} to {high:g}"
    return f"at least {lower}" if low is not None else lower if lower else "" if high is None else f"at most {high:g}"


# --- command line -----------------------------------------------------------------------------------------


def commands(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every command below a group, with its full name."""
    below = getattr(command, "commands", None)
    if below is None:
        yield path, command
    else:
        for name, child in below.items():
            yield from commands(child, f"{path} {name}")


def command_sections() -> str:
    """Each command with its arguments and options."""
    sections = []
    for name, command in commands(get_command(command_line), "ourvidz"):
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        usage = " ".join([name, *(argument_usage(p) for p in arguments), "[OPTIONS]" if command.params else ""]).strip()
        paragraphs = [" ".join(part.split()) for part in inspect.cleandoc(command.help or "").split("\n\n")]
        rows = [parameter_row(p) for p in command.params if not getattr(p, "hidden", False)]
        options = table(("Argument or option", "Default", "Meaning"), rows) if rows else ""
        sections.append("\n\n".join(filter(None, (f"### {name}", f"    {usage}", *paragraphs, options))))
    return "\n\n".join(sections)


def argument_usage(parameter: Any) -> str:
    """An argument as a usage line shows it."""
    name = parameter.metavar or parameter.name.upper()
    return name if parameter.required else f"[{name}]"


def parameter_row(parameter: Any) -> tuple[str, str, str]:
    """A row about one argument or option."""
    if parameter.param_type_name == "argument":
        names = parameter.metavar or parameter.name.upper()
    else:
        names = ", ".join(parameter.opts) + "".join(f" / {opt}" for opt in parameter.secondary_opts)
        if parameter.metavar:
            names += f" {parameter.metavar}"
    default = parameter.default
    shown = "" if default is None or default is False or callable(default) else code(default)
    return code(names), shown, parameter.help or ""


# --- HTTP -------------------------------------------------------------------------------------------------


def operations() -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Every operation of the OpenAPI document: method, path, operation."""
    for path, item in openapi_document()["paths"].items():
        for method, operation in item.items():
            yield method.upper(), path, operation


def admin_operations() -> set[str]:
    """The ids of the operations that only an admin may call."""

    def depends(dependant: Any, on: Callable[..., Any]) -> bool:
        return dependant.call is on or any(depends(child, on) for child in dependant.dependencies)

    found = set()
    for app in (api(Settings.load()), event_streams(Settings.load())):
        routers = [route.original_router for route in app.routes if hasattr(route, "original_router")]
        for route in [*app.routes, *(route for router in routers for route in router.routes)]:
            dependant = getattr(route, "dependant", None)
            if dependant is not None and depends(dependant, require_admin):
                assert depends(dependant, authenticate)
                found.add(route.operation_id)
    return found


def operations_table() -> str:
    """Every operation, who may call it, and what it is for."""
    admin, rows = admin_operations(), []
    for method, path, operation in operations():
        name = operation["operationId"]
        keyed = "an admin's key" if name in admin else "an API key"
        who = keyed if operation.get("security") else WITHOUT_KEY.get(name, "anybody")
        success = ", ".join(status for status in operation["responses"] if status < "400")
        rows.append((code(f"{method} {path}"), code(name), who, success, sentence(operation.get("description"))))
    return table(("Operation", "Id", "Needs", "Success", "What it does"), rows)


def parameters_table() -> str:
    """The query parameters and headers of all operations."""
    rows = []
    for _, _, operation in operations():
        for given in operation.get("parameters", ()):
            if given["in"] != "path":
                schema = given["schema"]
                note = given.get("description", "")
                default = schema.get("default")
                rows.append(
                    (
                        code(operation["operationId"]),
                        code(given["name"]),
                        given["in"],
                        type_of(schema),
                        "required" if given["required"] else code("" if default is None else default),
                        note,
                    )
                )
    return table(("Operation", "Name", "Where", "Type", "Default", "Meaning"), rows)


def type_of(schema: Mapping[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(type_of(choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    kind = str(schema.get("type", "any"))
    if kind == "array":
        return f"list of {type_of(schema.get('items', {}))}"
    return " ".join(filter(None, (schema.get("format", kind), bounds(schema))))


def schema_table(name: str) -> str:
    """The fields of one schema of the OpenAPI document."""
    schema = openapi_document()["components"]["schemas"][name]
    required = set(schema.get("required", ()))
    rows = []
    for field, about in schema["properties"].items():
        default = about.get("default")
        shown = "required" if field in required else code("" if default is None else default)
        rows.append((code(field), type_of(about), shown, about.get("description", "")))
    if all(row[2] == "required" for row in rows):
        return table(("Field", "Type", "Meaning"), (row[:2] + row[3:] for row in rows))
    return table(("Field", "Type", "Default", "Meaning"), rows)


# --- models -----------------------------------------------------------------------------------------------


def job_types_table() -> str:
    """The job types with what they use when the caller says nothing."""
    rows = []
    for job_type in JOB_TYPES.values():
        defaults = default_for(job_type.family)
        video = job_type.format == "video"
        rows.append(
            (
                code(job_type.name),
                job_type.family.value,
                job_type.format.value,
                defaults.steps.of(job_type.quality),
                f"{defaults.guidance.of(job_type.quality):g}",
                f"{defaults.frames} at {defaults.fps} fps" if video else "",
                "always" if job_type.enhanced else "on request",
                job_type.credits,
                code(job_type.behaves_as) if job_type.behaves_as != job_type.name else "",
            )
        )
    columns = ("Type", "Model", "Makes", "Steps", "Guidance", "Frames", "Enhanced", "Credits", "Same as")
    return table(columns, rows)


def families_table() -> str:
    """What callers may ask of each family."""
    rows = []
    for family, facts in FAMILIES.items():
        defaults = default_for(family)
        frames = f"{defaults.frames_min} to {defaults.frames_max}, 4n+1" if defaults.makes_video else ""
        rows.append(
            (
                family.value,
                ", ".join(f"{width}x{height}" for width, height in defaults.sizes),
                f"{defaults.width}x{defaults.height}",
                ", ".join(map(str, defaults.image_counts)),
                ", ".join(code(name) for name in defaults.schedulers),
                frames,
                "" if defaults.shift is None else f"{defaults.shift:g}",
                "yes" if facts.takes_reference else "no",
                "yes" if facts.takes_compel else "no",
            )
        )
    names = ("Model", "Sizes", "Usual size", "Images", "Schedulers", "Frames", "Shift", "Reference", "Prompt weights")
    return table(names, rows)


def profiles_table() -> str:
    """The profiles that come with the project, model by model."""
    rows = []
    for name in profile_names():
        for family, spec in load_profile(name).models.items():
            rows.append(
                (
                    code(name),
                    family.value,
                    spec.model_name,
                    code(spec.source),
                    spec.device,
                    spec.dtype,
                    spec.offload,
                    f"{spec.memory_gib:g}",
                    f"{spec.disk_gib:g}",
                    f"{spec.num_gpus:g}",
                )
            )
    columns = ("Profile", "Model", "Name", "Source", "Device", "Type", "Offload", "Card GiB", "Disk GiB", "num_gpus")
    return table(columns, rows)


# --- metrics ----------------------------------------------------------------------------------------------


def metric_calls(module: Any) -> Iterator[tuple[str, str, str, tuple[str, ...], list[float]]]:
    """Every metric that a module makes: name, kind, description, labels, bucket bounds."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        if node.func.id not in ("Counter", "Gauge", "Histogram"):
            continue
        name, about = (ast.literal_eval(argument) for argument in node.args[:2])
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        tags = node.args[2] if len(node.args) > 2 else keywords.get("tag_keys")
        edges = keywords.get("boundaries")
        limits = getattr(module, edges.id) if isinstance(edges, ast.Name) else []
        yield name, node.func.id.lower(), about, ast.literal_eval(tags) if tags else (), limits


def state_metrics_table() -> str:
    """What the API's /metrics exports."""
    rows = [(code(n), kind, ", ".join(map(code, tags)), about) for n, kind, about, tags, _ in metric_calls(health)]
    return table(("Metric", "Kind", "Labels", "Meaning"), rows)


def process_metrics_table() -> str:
    """What Ray exports for our processes."""
    rows = []
    for name, kind, about, tags, edges in metric_calls(run_metrics):
        limits = ", ".join(f"{edge:g}" for edge in edges)
        rows.append((code(f"ray_{name}"), kind, ", ".join(map(code, tags)), about, limits))
    return table(("Metric", "Kind", "Labels", "Meaning", "Buckets (seconds)"), rows)


BLOCKS: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "settings.md": {"settings": settings_table},
    "cli.md": {"commands": command_sections},
    "http.md": {
        "operations": operations_table,
        "parameters": parameters_table,
        **{name: lambda name=name: schema_table(name) for name in ("JobRequest", "Job", "Asset", "CreateKey", "Key")},
    },
    "errors.md": {
        field.name: lambda name=field.name: table(*getattr(error_codes.collect(), name))
        for field in fields(error_codes.Codes)
    },
    "job-types.md": {"job-types": job_types_table, "families": families_table},
    "profiles.md": {"profiles": profiles_table},
    "metrics.md": {"state-metrics": state_metrics_table, "process-metrics": process_metrics_table},
}


def filled(page: Path, blocks: Mapping[str, Callable[[], str]]) -> str:
    """A page with its blocks as the code says now. Raises `ValueError` for a page without a block that it should have."""
    text = page.read_text(encoding="utf-8")
    for name, block in blocks.items():
        begin, end = f"<!-- begin {name} -->\n", f"\n<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{page.name} must have one block {name}")
        text = re.sub(
            re.escape(begin) + ".*?" + re.escape(end), lambda _: begin + block() + end, text, count=1, flags=re.DOTALL
        )
    return text


def pages() -> dict[Path, str]:
    """Every page of the reference with its blocks filled."""
    return {REFERENCE / name: filled(REFERENCE / name, blocks) for name, blocks in BLOCKS.items()}


def main() -> int:
    """Write the pages; with --check, compare."""
    stale = {page: text for page, text in pages().items() if text != page.read_text(encoding="utf-8")}
    if "--check" in sys.argv[1:]:
        for page in stale:
            sys.stderr.write(f"{page} is not what the code says: run make docs\n")
        return 1 if stale else 0
    for page, text in stale.items():
        page.write_text(text, encoding="utf-8")
        sys.stderr.write(f"wrote {page}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

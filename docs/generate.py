"""Writes the mechanical parts of the reference from the code: `make docs`.

A page under docs/reference/ is written by hand, but for its blocks between `<!-- begin NAME -->` and
`<!-- end NAME -->`, which this script fills. `--check` changes nothing and fails when a page differs from what the
code says; tests/test_docs.py does the same.
"""

import ast
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import error_codes
from http_operations import operations_table, parameters_table, schema_table
from tables import bounds, code, number, table
from typer.main import get_command

from deployments import metrics as run_metrics
from deployments.settings import SECRET_FIELDS, Settings, default_state_dir
from models.catalog import FAMILIES, JOB_TYPES, default_for
from models.profile import load_profile, profile_names
from serve_app.api import health
from serve_app.cli import app as command_line

REFERENCE = Path(__file__).parent / "reference"


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
            shown = code(",".join(number(item) if isinstance(item, float) else str(item) for item in default))
        else:
            shown = "" if default is None else code(number(default) if isinstance(default, float) else default)
        secret = "Secret. " if name in SECRET_FIELDS else ""
        rows.append(
            (code(f"OURVIDZ_{name.upper()}"), shown, bounds(properties[name]), secret + (field.description or ""))
        )
    return table(("Variable", "Default", "Allowed", "Meaning"), rows)


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


def error_table(name: str) -> str:
    """One of the tables of error codes."""
    columns, rows = getattr(error_codes.collect(), name)
    return table(columns, rows)


SCHEMAS = ("JobRequest", "Job", "Asset", "CallbackBody", "CreateKey", "Key")

BLOCKS: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "settings.md": {"settings": settings_table},
    "cli.md": {"commands": command_sections},
    "http.md": {
        "operations": operations_table,
        "parameters": parameters_table,
        **{name: partial(schema_table, name) for name in SCHEMAS},
    },
    "errors.md": {field.name: partial(error_table, field.name) for field in fields(error_codes.Codes)},
    "job-types.md": {"job-types": job_types_table, "families": families_table},
    "profiles.md": {"profiles": profiles_table},
    "metrics.md": {"state-metrics": state_metrics_table, "process-metrics": process_metrics_table},
}


def filled(page: Path, blocks: Mapping[str, Callable[[], str]]) -> str:
    """A page with its blocks as the code says now. Raises `ValueError` for a page that lacks one of them."""
    text = page.read_text(encoding="utf-8")
    for name, block in blocks.items():
        begin, end = f"<!-- begin {name} -->\n", f"\n<!-- end {name} -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"{page.name} must have a block {name}")
        text = before + begin + block() + end + after
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

"""The rules that hold the code together: layers, what an import loads, where SQL stands, names and sizes of modules."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("configs", "models", "db", "deployments", "serve_app")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
SCRIPTS = sorted((ROOT / "docs").glob("*.py"))
MODEL_LIBRARIES = {"torch", "diffusers", "transformers", "compel", "accelerate"}
FORBIDDEN_NAMES = {"util", "utils", "helper", "helpers", "common", "manager", "managers", "service", "services", "misc"}
MAX_LINES = 350

# Statements that belong to how a connection is used, or that only ask whether something is there.
SQL_IN_PYTHON = {
    "db/embedded.py": "making the database, through psql, before there is anything to connect to",
    "db/migrate.py": "the table of migrations, and the lock around them",
    "db/notify.py": "NOTIFY and the probe of a LISTEN connection",
    "db/pool.py": "in whose name a transaction acts",
    "serve_app/cli/clusters.py": "whether the database has been migrated at all",
    "serve_app/database_checks.py": "the doctor's questions to a server that may be of any kind",
}
STATEMENT = re.compile(
    r"\s*(WITH\s+\w+\s+AS|SELECT\b.|INSERT\s+INTO|UPDATE\s+\w+\s+SET|DELETE\s+FROM|CREATE\s+\w+|ALTER\s+\w+|DROP\s+\w+"
    r"|SET\s+LOCAL|NOTIFY\s+\S|LISTEN\s+\S|GRANT\s+\w+|TRUNCATE\s)",
    re.DOTALL,
)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has after running `code`."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_application_loads_no_model_library() -> None:
    assert not loaded_by("import serve_app.app") & MODEL_LIBRARIES


def test_importing_every_module_of_models_loads_no_model_library() -> None:
    paths = [relative(path) for path in MODULES if relative(path).startswith("models/")]
    names = [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in paths]
    assert len(names) > 10
    code = "\n".join(f"import {name}" for name in names)
    assert not loaded_by(code) & (MODEL_LIBRARIES | {"ray", "asyncpg"})


def test_the_check_of_imports_would_notice() -> None:
    assert "torch" in loaded_by("import torch")


def test_the_layers_hold() -> None:
    command = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=relative)
def test_a_module_is_no_longer_than_one_concept(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def test_no_module_has_a_name_that_says_nothing() -> None:
    names = {part for path in MODULES for part in path.relative_to(ROOT).with_suffix("").parts}
    assert not names & FORBIDDEN_NAMES


def statements(path: Path) -> Iterator[str]:
    """The strings of a module that are SQL. Docstrings are prose."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        text = node.value if isinstance(node, ast.Constant) and id(node) not in prose else None
        if isinstance(text, str) and STATEMENT.match(text):
            yield text


def test_sql_stands_in_sql_files() -> None:
    found = {relative(path): list(statements(path)) for path in MODULES}
    assert {name: sql for name, sql in found.items() if sql and name not in SQL_IN_PYTHON} == {}


def test_every_exception_to_the_rule_about_sql_is_still_one() -> None:
    assert [name for name in SQL_IN_PYTHON if not list(statements(ROOT / name))] == []


def test_every_query_is_used() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in MODULES)
    unused = set()
    for path in sorted((ROOT / "db/queries").glob("*.sql")):
        assert f'queries("{path.stem}")' in code, f"nothing reads {path.name}"
        names = re.findall(r"^-- name: (\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        unused |= {name for name in names if not re.search(rf"\.{name}((_cursor)?\(|\.sql\b)", code)}
    assert not unused


def test_no_statement_sets_what_outlives_its_transaction() -> None:
    lasting = re.compile(
        r"(?:^|;)\s*SET (?!LOCAL\b)|pg_(?:try_)?advisory_lock|set_config\([^()]*false\)|LISTEN ", re.IGNORECASE
    )
    found = set()
    for path in (ROOT / "db/queries").glob("*.sql"):
        for block in path.read_text(encoding="utf-8").split("-- name:")[1:]:
            body = re.sub("--.*", "", block.split("\n", 1)[1]).strip()
            found |= {(path.name, hit[0]) for hit in lasting.finditer(body)}
    # the archive's lock is given back, and a backup's is taken on a connection of its own
    assert found == {("archives.sql", "pg_try_advisory_lock"), ("backup.sql", "pg_advisory_lock")}

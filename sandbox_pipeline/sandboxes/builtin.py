"""Makes the providers of this package; vendor SDKs are imported only when used."""

from __future__ import annotations

from sandbox_pipeline.sandboxes.base import ProviderHost, SandboxProvider


def local(host: ProviderHost) -> SandboxProvider:
    """Sandboxes on this machine."""
    from sandbox_pipeline.sandboxes.local import LocalProvider

    return LocalProvider(host.home / "sandboxes")


def e2b(host: ProviderHost) -> SandboxProvider:
    """Sandboxes at E2B."""
    from sandbox_pipeline.sandboxes.e2b import E2BProvider

    return E2BProvider.from_environ(host.environ)

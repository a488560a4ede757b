"""The contracts of providers and agents as tests, for those of other packages too.

`pip install 'sandbox-pipeline[conformance]'`, then subclass `providers.ProviderConformance` or
`agents.AgentConformance` in a test module of your own; docs/extending.md shows how.
"""

import pytest

pytest.register_assert_rewrite(
    "sandbox_pipeline.conformance.agents", "sandbox_pipeline.conformance.providers"
)

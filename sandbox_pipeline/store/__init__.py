"""The durable truth: state, events, leases, rate limit, metrics."""

from sandbox_pipeline.store.store import Store as Store

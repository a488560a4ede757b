"""The same work by what people would use instead; `make bench-peers` runs it."""

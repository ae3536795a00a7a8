"""Local mode: the planning code of the operator against an in-memory store, pods as local processes."""

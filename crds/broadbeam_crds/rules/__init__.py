"""What fields must be to each other: one module a subject, each ending in its table `RULES`."""

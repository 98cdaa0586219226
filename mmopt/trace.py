from mmopt.tracing import trace as trace  # noqa: F401

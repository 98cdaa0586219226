from mmopt.tracing import trace as trace

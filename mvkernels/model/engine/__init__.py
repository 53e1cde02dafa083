"""The engine: scheduling, prefill and decode of requests whose paths fork and join."""

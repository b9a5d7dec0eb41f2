"""An HTTP server for a model's verbs: one process answers requests, and workers, each with a model, predict."""

"""The sage command: drives a stack over HTTP, and starts one where none runs."""

"""A small engine with the part of vLLM's HTTP surface that the host uses. Runs in a process of its own."""

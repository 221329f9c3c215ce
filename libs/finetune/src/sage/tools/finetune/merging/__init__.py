"""Adapters folded into their base, tensor by tensor, and checked against the adapter."""

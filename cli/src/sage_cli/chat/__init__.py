"""Conversations: which model answers, and talking to it."""

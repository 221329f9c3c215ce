"""Text indexes with citations: ingest a folder, search it, name the source of every passage."""

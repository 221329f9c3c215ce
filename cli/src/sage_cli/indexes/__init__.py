"""Folders of documents that chats retrieve passages from."""

"""The repository: pinned on the host, put into sandboxes, the patch taken out."""
